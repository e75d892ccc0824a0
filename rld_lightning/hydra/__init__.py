"""The one room that knows Hydra: resolvers, composing, and the frame of the scripts."""
