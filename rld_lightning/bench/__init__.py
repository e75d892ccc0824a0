"""Measurements: everything against a plain reference, in one process, in alternation."""
