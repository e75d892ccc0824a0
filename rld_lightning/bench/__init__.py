"""Benchmarks: each measures everything against a plain reference, in alternation."""
