"""The figures of the RLD paper, drawn from finished runs: one file a figure; ``write.py`` leaves their files."""
