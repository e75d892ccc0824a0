"""With what a run was made: its configuration, versions and hardware."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import DictConfig, OmegaConf

from rld_lightning.distributed import rank_zero_only
from rld_lightning.redact import redact
from rld_lightning.runs.files import CONFIG, ENVIRONMENT
from rld_lightning.whole import write_whole


@rank_zero_only
def write_provenance(run: Path, cfg: DictConfig) -> None:
    """Leaves the resolved configuration, without secrets, and the versions that the run used."""
    values = redact(OmegaConf.to_container(cfg, resolve=True))
    write_whole(run / CONFIG, OmegaConf.to_yaml(OmegaConf.create(values)).encode())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
    write_whole(run / ENVIRONMENT, (json.dumps(environment, indent=2) + "\n").encode())


def processor_name() -> str:
    """What the processor of this machine is called."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
