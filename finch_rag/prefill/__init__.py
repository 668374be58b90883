"""The prefill: chunks of passages are scanned under a question, and what matters stays."""
