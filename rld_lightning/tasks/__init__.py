"""What the scripts do, as functions that can be imported: each takes the configuration that Hydra composed."""
