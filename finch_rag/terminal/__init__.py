"""The terminal: output, progress, engines that are loaded with their progress shown. Needs the extra ``cli``."""
