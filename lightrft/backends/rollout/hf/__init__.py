"""The engine "hf": completions of a transformers model itself, decoded in this process."""
