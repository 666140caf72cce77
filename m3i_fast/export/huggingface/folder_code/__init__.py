"""The source that a folder for transformers brings with it: torch and transformers alone."""
