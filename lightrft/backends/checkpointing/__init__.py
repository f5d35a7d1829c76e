"""What is kept on disk: checkpoints in one format for all backends, and weights in the Hugging Face layout."""
