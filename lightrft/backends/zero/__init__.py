"""DeepSpeed's engines and shards, as the other concerns of a backend see them."""
