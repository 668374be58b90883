"""From what a user or a framework hands over to token ids: passages, messages, chat templates, flat prompts."""
