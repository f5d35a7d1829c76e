"""Functions that score a completion, by rule, by a task's verifier, or the user's own."""
