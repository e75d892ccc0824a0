"""Pack images into shards: `python scripts/shards.py data=imagenet out=/shards/imagenet`; or index existing ones."""

from rld_lightning.hydra.script import run_task
from rld_lightning.tasks.pack import make_shards

if __name__ == "__main__":
    run_task(lambda cfg: make_shards(cfg) and None, "shards")
