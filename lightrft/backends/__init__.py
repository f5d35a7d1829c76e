"""How strategies and engines do what the protocols promise: one folder a concern, one module a backend."""
