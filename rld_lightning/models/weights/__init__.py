"""Weights files: reading them as data, sealing them with a checksum, their metadata, and loading into a network."""
