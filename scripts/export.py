"""Export a student: `python scripts/export.py run=runs/... formats=[safetensors,onnx,torch_export]`."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

from omegaconf import DictConfig

from rld_lightning.hydra.script import run_task


def main(cfg: DictConfig) -> None:
    """Writes the files, and compares them with PyTorch."""
    from rld_lightning.tasks.export import export  # slow, so not for help and mistakes

    export(cfg)


if __name__ == "__main__":
    run_task(main, "export")
