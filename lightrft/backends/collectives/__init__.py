"""What ranks do together, one module per backend."""
