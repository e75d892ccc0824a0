"""Records a run's configuration, command, versions and hardware."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from rld_lightning.distributed import rank_zero_only
from rld_lightning.package_files import invocation
from rld_lightning.redact import redact_command
from rld_lightning.runs.files import CONFIG, ENVIRONMENT, write_json, write_yaml

_COMMAND = "RLD_LIGHTNING_COMMAND"  # environment variable for the processes of a run
_PACKAGES = ("rld-lightning", "torch", "torchvision", "lightning", "torchmetrics", "hydra-core", "timm", "numpy")


@rank_zero_only
def write_provenance(run: Path, cfg: DictConfig) -> None:
    """Writes the run's resolved configuration, without secrets, its command, versions and hardware."""
    write_yaml(run / CONFIG, OmegaConf.to_container(cfg, resolve=True))
    environment: dict[str, Any] = {
        "command": command(),
        "commit": _commit(Path(__file__).parents[2]),
        "python": platform.python_version(),
        **{package.replace("-", "_"): _version(package) for package in _PACKAGES},
        "torch": torch.__version__,  # with its build, such as +cu126
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    write_json(run / ENVIRONMENT, environment)


def processor_name() -> str:
    """Returns the name of this machine's processor."""
    if sys.platform == "darwin":  # such as Apple M2 Pro, which is also the name of its GPU
        ask = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
        return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def command(words: Sequence[str] | None = None) -> str:
    """Returns the run's command line, without secrets; in processes started by a run, that run's.

    Args:
        words: script and arguments, if they differ from ``sys.argv``; the first call sets them.
    """
    script, *rest = words or sys.argv
    return os.environ.setdefault(_COMMAND, shlex.join(redact_command([*invocation(script), *rest])))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    """Returns the checked-out commit, with ``+`` if files have changed since; None without a checkout."""
    if not (checkout / ".git").exists():
        return None
    git = ("git", "-C", str(checkout))
    try:
        head = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True, timeout=5, check=True)
        files = (*git, "status", "--porcelain", "--untracked-files=no")
        changed = subprocess.run(files, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, another user's checkout, a slow disk
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
