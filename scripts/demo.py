"""See how RLD refines the teacher for your picture: `python scripts/demo.py run=runs/...` opens a local page."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

from omegaconf import DictConfig

from rld_lightning.hydra.script import run_task


def main(cfg: DictConfig) -> None:
    """Serves the page until it is stopped."""
    from rld_lightning.tasks.demo import demo  # slow, so not for help and mistakes

    demo(cfg)


if __name__ == "__main__":
    run_task(main, "demo")
