"""One engine that several ranks run together, each with a shard of its weights."""
