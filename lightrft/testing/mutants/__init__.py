"""Strategies and engines that are wrong on purpose, to show that the laws find what is wrong."""
