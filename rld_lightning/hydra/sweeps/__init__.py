"""How a sweep chooses its trials, and how they run side by side."""
