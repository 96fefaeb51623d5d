"""Pictures of a prompt: read, preprocessed, turned into features, put into the prefill."""
