"""Checkpoints of other programs, read without running what they hold, and written as ours."""
