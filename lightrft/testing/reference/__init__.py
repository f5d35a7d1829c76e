"""What laws compare with: raw torch, numpy and Python, and the words for a difference."""
