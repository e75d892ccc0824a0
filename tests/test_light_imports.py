"""What a library user imports, and what the command line needs before anything runs, stays light."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
HEAVY = {"lightning", "torchvision", "torchmetrics", "pandas", "matplotlib", "scipy", "sklearn", "wandb", "timm"}


def imported_by(code: str) -> set[str]:
    """Top-level packages that are there after some code."""
    tell = "import sys; print('PACKAGES', *{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", f"{code}\n{tell}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
    return set(output.rpartition("PACKAGES")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "from rld_lightning import RLDLoss, rld_loss",
        "from rld_lightning import create_model, FrozenTeacher; create_model('wrn16_1')",
        "import rld_lightning.losses.features",
    ],
)
def test_losses_and_networks_need_torch_alone(code):
    assert not imported_by(code) & (HEAVY | {"hydra", "omegaconf", "rich", "pytorch_lightning"})


def test_a_command_line_needs_torch_and_hydra_alone():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['scripts/fit.py', '--help']\n"
        "try:\n"
        "    runpy.run_path('scripts/fit.py', run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
    )
    packages = imported_by(code)
    assert "hydra" in packages
    assert not packages & HEAVY
