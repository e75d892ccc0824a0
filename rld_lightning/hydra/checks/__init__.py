"""What is wrong with a command line or a configuration, told in sentences before anything is imported for it."""
