"""What Hydra leaves in a job's folder, ``.hydra``, written here instead: Hydra itself would write secrets, too."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rld_lightning.redact import remember
from rld_lightning.runs.files import CHOICES, HYDRA, OVERRIDES, SWEEPER, write_yaml


def note_job(cfg: DictConfig) -> None:
    """Writes the configuration, Hydra's own, and the overrides of the job that Hydra runs, all without secrets.

    Interpolations stay as they are. What secrets are is remembered for all that this process writes later.
    """
    own = HydraConfig.get()
    folder = Path(own.runtime.output_dir)
    hydra: Any = OmegaConf.to_container(own, enum_to_str=True)
    remember(OmegaConf.to_container(cfg))
    write_yaml(folder / HYDRA / "config.yaml", OmegaConf.to_container(cfg, enum_to_str=True))
    write_yaml(folder / CHOICES, {"hydra": hydra})
    write_yaml(folder / OVERRIDES, hydra["overrides"]["task"])
    if own.mode == RunMode.MULTIRUN and (sweep := Path(own.sweep.dir) / SWEEPER).exists():
        write_yaml(sweep, OmegaConf.to_container(OmegaConf.load(sweep)))  # as sweepers of others write it
