"""Pack images into shards: `python scripts/shards.py data=imagenet out=/shards/imagenet`; or index existing ones."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

from omegaconf import DictConfig

from rld_lightning.hydra.script import run_task


def main(cfg: DictConfig) -> None:
    """Packs images into shards, or indexes existing ones."""
    from rld_lightning.tasks.shards import make_shards  # slow, so not for help and mistakes

    make_shards(cfg)


if __name__ == "__main__":
    run_task(main, "shards")
