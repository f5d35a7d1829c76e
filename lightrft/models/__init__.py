"""Models and tokenizers: building small ones, loading them from disk, and their forward pass up to the head."""
