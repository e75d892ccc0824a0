"""What Hydra leaves in a job's folder, ``.hydra``, written here instead: Hydra itself would write secrets, too."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rld_lightning.redact import redact, remember
from rld_lightning.runs.files import CHOICES, HYDRA, OVERRIDES
from rld_lightning.whole import write_whole


def note_job(cfg: DictConfig) -> None:
    """Writes the configuration, Hydra's own, and the overrides of the job that Hydra runs, all without secrets.

    Interpolations stay as they are. What secrets are is remembered for all that this process writes later.

    Args:
        cfg: the job's configuration.
    """
    own = HydraConfig.get()
    folder = Path(own.runtime.output_dir)
    hydra: Any = OmegaConf.to_container(own, enum_to_str=True)
    remember(OmegaConf.to_container(cfg))
    _write(folder / HYDRA / "config.yaml", OmegaConf.to_container(cfg, enum_to_str=True))
    _write(folder / CHOICES, {"hydra": hydra})
    _write(folder / OVERRIDES, hydra["overrides"]["task"])
    if own.mode == RunMode.MULTIRUN and (sweep := Path(own.sweep.dir) / "multirun.yaml").exists():
        _write(sweep, OmegaConf.to_container(OmegaConf.load(sweep)))  # which Hydra has written before the first job


def _write(path: Path, values: Any) -> None:
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(redact(values))).encode())
