"""Files of weights: read as data, sealed with a checksum, described by facts, and held against a network."""
