"""Limits of what is asked for or read from files, where more than one room holds to them. They need no PyTorch."""

LARGEST_SIDE = 4096  # pixels of what a network sees: nobody's memory should be at the mercy of a name in a file
LARGEST_RESIZE = 2 * LARGEST_SIDE  # of an image before it is cropped
MOST_CLASSES = 1 << 24  # each of which gets a name
SEEDS = 1 << 32  # are below it, as NumPy and scikit-learn want them
