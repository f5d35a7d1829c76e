"""What laws draw: plain data, the hypothesis strategies that draw it, and what is built from it."""
