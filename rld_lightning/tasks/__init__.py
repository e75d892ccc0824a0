"""The scripts' jobs as functions; each takes the configuration composed by Hydra."""
