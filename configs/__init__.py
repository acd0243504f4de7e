"""Experiments: one file, one experiment, with its command and its numbers."""
