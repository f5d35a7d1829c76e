"""For anybody who writes a strategy or an engine: checks of signatures, and valid configurations for property tests."""
