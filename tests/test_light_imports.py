"""Imports of the library and of the command line before a run stay light."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rld_lightning.hydra import registered_names

REPOSITORY = Path(__file__).parents[1]
HEAVY = {"lightning", "torchvision", "torchmetrics", "pandas", "matplotlib", "scipy", "sklearn", "wandb", "timm"}


def imported_by(*codes: str) -> list[set[str]]:
    """The imported top-level packages after each of some pieces of code, in one new process."""
    tell = "import sys; print('\\nPACKAGES', *{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", "\n".join(f"{code}\n{tell}" for code in codes)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
    return [set(line.split()[1:]) for line in output.splitlines() if line.startswith("PACKAGES")]


def test_losses_networks_and_a_student_import_only_torch_and_image_packages():
    """In one process, since each takes seconds to start: imports of the first piece also count for the second."""
    losses = "import rld_lightning.losses.features; from rld_lightning import RLDLoss, rld_loss"
    networks = "from rld_lightning import create_model, FrozenTeacher; create_model('wrn16_1')"
    student = "import rld_lightning; rld_lightning.load_student; import rld_lightning.data.crops"
    torch_alone, with_images = imported_by(f"{losses}; {networks}", student)
    assert not torch_alone & (HEAVY | {"hydra", "omegaconf", "rich", "pytorch_lightning"})
    assert with_images & (HEAVY | {"hydra", "omegaconf", "pytorch_lightning", "onnx"}) <= {"torchvision"}


RUN = (
    "import runpy, sys\n"
    "sys.argv = ['scripts/fit.py', *{arguments}]\n"
    "try:\n"
    "    runpy.run_path('scripts/fit.py', run_name='__main__')\n"
    "except SystemExit:\n"
    "    pass\n"
)


def test_help_completion_and_mistakes_import_only_hydra(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COMP_LINE", "python scripts/fit.py loss.al")
    registered_names._cached.__wrapped__()  # fills the cache, as an earlier command
    for arguments in (["--help"], ["-sc", "query=bash"], ["loss.gama=1"]):
        (packages,) = imported_by(RUN.format(arguments=arguments))
        assert "hydra" in packages
        assert not packages & (HEAVY | {"torch"})


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["model.student.weights=/dev/null/nowhere.pth", "loss.temperature=0"])
def test_mistakes_in_values_are_reported_before_lightning_is_imported(mistake, tmp_path):
    (packages,) = imported_by(RUN.format(arguments=[mistake, f"paths.runs={tmp_path}"]))
    assert "torch" in packages
    assert not packages & HEAVY
    assert not list(tmp_path.iterdir())


def test_the_list_of_commands_imports_no_packages():
    code = "import sys; from rld_lightning.__main__ import main; sys.argv = ['rld-lightning']; main()"
    (packages,) = imported_by(code)
    assert not packages & (HEAVY | {"torch", "hydra", "omegaconf", "rich"})


def test_ctrl_c_while_a_script_imports_ends_in_one_sentence():
    code = "import rld_lightning.interrupt; raise {}"
    interrupted, failed = (
        subprocess.run([sys.executable, "-c", code.format(error)], capture_output=True, text=True, cwd=REPOSITORY)
        for error in ("KeyboardInterrupt", "ValueError")
    )
    assert (interrupted.returncode, interrupted.stderr) == (130, "")
    assert interrupted.stdout == " stopped  by Ctrl-C, before anything was done\n"
    assert failed.returncode == 1
    assert "ValueError" in failed.stderr
    for script in (REPOSITORY / "scripts").glob("*.py"):
        if "run_task" in (text := script.read_text()):
            assert re.search(r"^(import|from) (\S+)", text, re.MULTILINE)[2] == "rld_lightning.interrupt"


@pytest.mark.slow
def test_reports_do_not_import_lightning():
    (packages,) = imported_by("import rld_lightning.reporting.report, rld_lightning.tasks.cost")
    assert packages & HEAVY <= {"pandas", "matplotlib", "scipy"}
