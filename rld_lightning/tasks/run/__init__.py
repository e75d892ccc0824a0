"""The steps of one run, from its plan to its results, shared by all tasks that train or evaluate."""
