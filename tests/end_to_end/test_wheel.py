"""The built wheel, installed without the checkout: commands, configs and a user's project."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rld_lightning import __version__
from rld_lightning.__main__ import commands
from rld_lightning.runs.finished import find_runs

REPOSITORY = Path(__file__).parents[2]
PROJECT = {
    "conf/model/mine.yaml": """
defaults: [pair]
teacher: { name: wrn16_1, weights: fit }
student: { name: resnet8 }
""",
    "conf/loss/own.yaml": "_target_: own_loss.OwnLoss\nweight: 0.5\n",
    "own_loss.py": """
from rld_lightning.losses import DistillationLoss, register_loss


@register_loss("own")
class OwnLoss(DistillationLoss):
    weight: float = 1.0

    def terms(self, step):
        return {"own": self.weight * (step.student.logits - step.teacher.logits).square().mean()}
""",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with the wheel and this environment's other packages; skips if it cannot be built."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, REPOSITORY]
    if (built := subprocess.run(build, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"no wheel can be built here: {(built.stdout + built.stderr).splitlines()[-1:]}")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    # This excludes editable installs: .pth files are only processed in the environment's own site folder.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--no-deps", wheel]
    subprocess.run(install, capture_output=True, check=True)
    return venv


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for name, text in PROJECT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(environment, folder, *words, **variables):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [environment / "bin" / words[0], *words[1:]]
    result = subprocess.run(
        command,
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_package_is_imported_from_the_wheel(environment, project):
    code = "import rld_lightning; from rld_lightning.hydra.options import CONF; print(rld_lightning.__file__, CONF)"
    places = run(environment, project, "python", "-c", code).split()
    assert all(Path(place).is_relative_to(environment) for place in places)
    assert (Path(places[0]).parent / "py.typed").is_file()
    assert run(environment, project, "rld-lightning", "--version").strip() == f"rld-lightning {__version__}"


def test_every_command_has_help(environment, project):
    listed = run(environment, project, "rld-lightning")
    for name in commands():
        assert f"\n  {name} " in listed
        assert run(environment, project, "rld-lightning", name, "--help")
    assert "digits" in run(environment, project, "python", "-m", "rld_lightning", "fit", "--help")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rld-lightning fi", {"fit", "figures"}),
        ("rld-lightning fit loss.alp", {"loss.alpha="}),
        ("rld-lightning fit --config-dir conf model=mi", {"model=mine"}),
        ("rld-lightning report ru", set()),
        ("rld-lightning teachers fit model=wrn40_", {"model=wrn40_2"}),
    ],
)
def test_the_tab_key_completes(environment, project, line, words):
    assert words <= set(run(environment, project, "rld-lightning", "-sc", "query=bash", COMP_LINE=line).split())
    assert run(environment, project, "rld-lightning", "-sc", "install=bash").rstrip().endswith(" rld-lightning")


def test_a_custom_project_needs_no_checkout(environment, project):
    """Trains a custom pair with a custom loss in two processes, then evaluates and reports the run."""
    own = ("--config-dir", "conf", "data=digits", "model=mine", "loss=own", "recipe=quick", "recipe.epochs=1")
    run(environment, project, "rld-lightning", "fit", *own, "trainer=ddp_cpu", "trainer.max_steps=4")
    (found,) = [found for found in find_runs([project / "runs"]) if found.config["model"]["teacher"]]
    assert found.config["loss"] == {"_target_": "own_loss.OwnLoss", "weight": 0.5}
    assert found.environment["command"].startswith("rld-lightning fit --config-dir conf data=digits")
    weights = f"weights={found.folder / 'student.safetensors'}"
    assert "top-1" in run(environment, project, "rld-lightning", "eval", weights, "trainer=cpu")
    run(environment, project, "rld-lightning", "report", "runs", "--out", "page", "--no-latency")
    assert (project / "page" / "report.md").is_file()


def test_a_comparison_starts_its_runs(environment, project):
    own = ("--config-dir", "conf", "data=digits", "model=mine", "losses=own,ce", "seeds=0", "recipe=quick")
    few = ("recipe.epochs=1", "trainer.max_steps=2", "trainer=cpu", "folder=compared")
    run(environment, project, "rld-lightning", "compare", *own, *few)
    methods = {found.config["method"] for found in find_runs([project / "compared"])}
    assert {"own", "ce"} <= methods
