"""One run, from its plan to its results: what all that trains or measures is built on."""
