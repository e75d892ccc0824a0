"""Runs on disk: their directories, reading them, and comparing their settings."""
