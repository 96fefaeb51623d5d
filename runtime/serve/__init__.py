"""A bundle over HTTP: an API as OpenAI's (README.md)."""
