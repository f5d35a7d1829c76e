"""Holding a strategy or an engine to all laws, and telling what came of it."""
