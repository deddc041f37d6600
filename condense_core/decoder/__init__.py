"""The unmodified LLM: loading it, prompts for it, generating with it, and the model that comes with the package."""
