"""Limits for requested values and values read from files that several packages share. Needs no PyTorch."""

LARGEST_SIDE = 4096  # pixels of a network's input: a name in a file must not exhaust the memory
LARGEST_RESIZE = 2 * LARGEST_SIDE  # of an image before cropping
MOST_CLASSES = 1 << 24  # each has a name
SEEDS = 1 << 32  # exclusive upper bound, as NumPy and scikit-learn require
