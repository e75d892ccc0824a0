"""Everything that uses Hydra: resolvers, composing configs, and running the scripts."""
