"""Choosing the trials of a sweep, and running them in parallel."""
