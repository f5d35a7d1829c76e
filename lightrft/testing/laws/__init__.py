"""The laws, one module per section; `lightrft.testing.laws.registry` lists them all."""
