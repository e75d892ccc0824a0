"""Scripts, run as users do: each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
_IMPORTABLE = os.pathsep.join([str(SCRIPTS.parent / "tests" / "end_to_end"), str(SCRIPTS.parent)])


def script_environment(**more):
    """Returns the variables of a script's process, which imports this checkout and the jobs in ``end_to_end``."""
    return os.environ | {"PYTHONPATH": _IMPORTABLE} | more


def run_script(name, *arguments, folder=None, check=True, **options):
    """Runs a script in a folder, and returns the finished process with its output; fails if the script does."""
    command = [sys.executable, SCRIPTS / name, *arguments]
    options |= {"cwd": folder, "env": script_environment(), "timeout": 400}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
