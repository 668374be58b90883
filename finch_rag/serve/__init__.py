"""An HTTP server in OpenAI's shapes, with documents and citations. Needs the extra ``serve``."""
