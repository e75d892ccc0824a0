"""Pack images into shards: `python scripts/shards.py data=imagenet out=/shards/imagenet`; or index existing ones."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

from omegaconf import DictConfig

from rld_lightning.hydra.script import run_task


def main(cfg: DictConfig) -> None:
    """Packs, or makes an index."""
    from rld_lightning.tasks.shards import make_shards  # takes seconds that help and mistakes need not wait for

    make_shards(cfg)


if __name__ == "__main__":
    run_task(main, "shards")
