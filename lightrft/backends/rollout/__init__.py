"""Engines that make completions, and the rollout functions of a strategy over any engine."""
