"""Several processes: the same training as one, every image evaluated once, one folder, and no process left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.scripts import SCRIPTS, run_script, script_environment
from omegaconf import OmegaConf
from safetensors.torch import load_file

from rld_lightning.tasks.run.processes import run_in_processes

pytestmark = pytest.mark.slow  # each process imports Lightning

FIT = SCRIPTS / "fit.py"
JOB = (
    "data=digits", "model=wrn16_1", "loss=ce", "recipe=quick", "trainer=ddp_cpu", "trainer.precision=32-true",
    "print_config=false", "callbacks.progress=null",
)  # fmt: skip


def fit(*options, folder, check=True):
    flags = [option for option in options if option == "-m"]  # argparse requires them first
    others = [option for option in options if option not in flags]
    return run_script("fit.py", *flags, *JOB, *others, folder=folder, check=check)


def alive(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def children(process):
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def all_ended(processes):
    until = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.2)
    return not any(map(alive, processes))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The records of each rank of 1, 2 and 3 processes."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in script_environment().items():
            patch.setenv(name, value)
        for world in (1, 2, 3):
            folder = tmp_path_factory.mktemp(f"world_{world}")
            run_in_processes(world, "ddp_jobs:train_and_evaluate", OmegaConf.create({"paths": {"run": str(folder)}}))
            seen[world] = [torch.load(folder / f"rank_{rank}.pt") for rank in range(world)]
    return seen


def largest_difference(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_train_like_one_with_the_same_global_batch(jobs, world):
    (alone,), ranks = jobs[1], jobs[world]
    moved = largest_difference(alone["weights"], alone["before"])
    for rank in ranks:
        assert largest_difference(rank["before"], alone["before"]) == 0
        difference = largest_difference(rank["weights"], alone["weights"])
        print(f"{world} processes, weights after 20 steps: {difference:.1e} apart, {moved:.1e} from the start")
        assert difference < 2e-6
        assert difference < 1e-4 * moved
        for several, one in zip(rank["gradients"], alone["gradients"], strict=True):  # first and last step
            assert largest_difference(several, one) < 1e-5 * max(float(value.abs().max()) for value in one.values())
    assert all(largest_difference(rank["weights"], ranks[0]["weights"]) == 0 for rank in ranks)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_one_of_10000_images_is_evaluated_once(jobs, world):
    seen = torch.cat([rank["seen"] for rank in jobs[world]])
    assert torch.equal(seen.sort().values, torch.arange(10_000))
    print(f"world size {world}: top-1 {float(jobs[world][0]['top1']):.4f} %, ce {float(jobs[world][0]['ce']):.6f}")
    for rank in jobs[world]:
        assert float(rank["top1"]) == pytest.approx(float(jobs[1][0]["top1"]), abs=0.0101)  # one image, if any
        assert float(rank["ce"]) == pytest.approx(float(jobs[1][0]["ce"]), rel=1e-5)
        assert rank["top1"] == jobs[world][0]["top1"]


def test_ddp_wraps_trainable_modules_without_the_teacher(jobs):
    for rank in jobs[2]:
        assert rank["wrapped"] == 6
        assert rank["only_what_trains"]
        assert not rank["teacher_in_ddp"]
        assert rank["buffers_in_ddp"] == 0


@pytest.fixture
def machines():
    """Two connected network namespaces: for each, the prefix of its commands, its address and its device."""
    names = [f"rld{os.getpid()}{end}" for end in "ab"]
    first, second = names
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add {first} netns {first} type veth peer name {second} netns {second}")
    for i, name in enumerate(names, 1):
        commands += [f"-n {name} addr add 10.77.0.{i}/24 dev {name}", f"-n {name} link set {name} up"]
        commands.append(f"-n {name} link set lo up")
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        yield [(["ip", "netns", "exec", name], f"10.77.0.{i}", name) for i, name in enumerate(names, 1)]
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            with suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.parametrize("place", ["loopback", "namespaces"])
def test_two_nodes_under_torchrun_write_one_folder_with_the_same_result(tmp_path, place, request):
    nodes = [([], "127.0.0.1", "lo")] * 2 if place == "loopback" else request.getfixturevalue("machines")
    fit("recipe.epochs=2", f"hydra.run.dir={tmp_path / 'here'}", folder=tmp_path)
    agents = []
    for i, (prefix, address, device) in enumerate(nodes):
        options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={nodes[0][1]}:29617"]
        options += [f"--local-addr={address}", *([f"--rdzv-conf=is_host={1 - i}"] if prefix else [])]
        command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, FIT, *JOB]
        agents.append(
            subprocess.Popen(
                [*command, "recipe.epochs=2", "paths.runs=nodes"],
                cwd=tmp_path,
                env=script_environment() | {"GLOO_SOCKET_IFNAME": device},
            )
        )
    assert [agent.wait(400) for agent in agents] == [0, 0]
    (summary,) = (tmp_path / "nodes").rglob("summary.json")
    assert len(list((tmp_path / "nodes").rglob(".hydra"))) == 1
    there, here = (json.loads(path.read_text()) for path in (summary, tmp_path / "here" / "summary.json"))
    own = dict.fromkeys(("run", "images_per_s", "seconds", "peak_memory_gb"))
    assert there | own == here | own
    first, second = (load_file(folder / "student.safetensors") for folder in (summary.parent, tmp_path / "here"))
    assert largest_difference(first, second) == 0
    metrics = pd.read_csv(summary.parent / "metrics.csv")
    assert metrics["val/top1"].dropna().size == 2  # one value per epoch


@pytest.mark.parametrize("sweeper", ["basic", "optuna"])
def test_a_sweep_gives_all_ranks_of_a_trial_the_same_values_and_survives_a_failed_trial(tmp_path, sweeper):
    choice = "recipe.optimizer.lr=0.02,0.03"
    options = ["recipe.epochs=1", "recipe.scheduler=null", "+callbacks.witness._target_=ddp_jobs.Witness"]
    if sweeper == "optuna":
        pytest.importorskip("optuna")
        choice = "recipe.optimizer.lr=choice(0.02,0.03)"
        options += ["hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=2"]
        options += ["hydra.sweeper.n_jobs=1", "hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=0"]
    result = fit("-m", choice, *options, f"hydra.sweep.dir={tmp_path / 'sweep'}", folder=tmp_path, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 1, output  # one trial fails
    trials = {lr: tmp_path / "sweep" / f"recipe.optimizer.lr={lr}" for lr in (0.02, 0.03)}
    groups = []
    for lr, trial in trials.items():
        witnesses = [json.loads((trial / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
        assert witnesses[0] == witnesses[1]
        assert witnesses[0]["lr"] == lr
        groups.append(witnesses[0]["group"])
    assert groups[0] != groups[1]
    why = "rank 1 of 2 failed with RuntimeError: the second rank fails"
    assert re.search(rf"failed  \d/2  recipe.optimizer.lr=0.02: {why}", output)
    assert why in (trials[0.02] / "error.txt").read_text()
    assert not (trials[0.02] / "summary.json").exists()
    summary = json.loads((trials[0.03] / "summary.json").read_text())
    assert summary["run"] == str(trials[0.03])
    score = f"{summary['top1']:.2f} % on 144 held-out training images (stratified), n = 1"
    assert f"recipe.optimizer.lr=0.03: {score}\n" in output
    if sweeper == "optuna":
        best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
        assert best.best_value == pytest.approx(summary["top1"])
        assert float(best.best_params["recipe.optimizer.lr"]) == 0.03


def test_ranks_with_different_configs_end_before_the_first_step(tmp_path):
    result = fit("+note=${oc.env:RANK}", f"hydra.run.dir={tmp_path / 'run'}", folder=tmp_path, check=False)
    assert result.returncode == 2
    assert "process 1 has note=1 where process 0 has 0. Start all of them with the same command." in result.stdout
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("event", ["rank 0 dies", "rank 1 dies", "Ctrl-C", "SIGTERM", "the first process is killed"])
def test_no_process_is_left(tmp_path, event):
    run = tmp_path / "run"
    command = [sys.executable, FIT, *JOB, "recipe.epochs=500", f"hydra.run.dir={run}"]
    env = script_environment(TMPDIR=str(tmp_path))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=env
    )
    while not (run / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.2)
    ranks = children(process)
    assert len(ranks) == 2
    assert all(map(alive, ranks))
    if event.startswith("rank"):
        os.kill(ranks[int(event.split()[1])], signal.SIGKILL)
    else:
        names = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}
        process.send_signal(names.get(event, signal.SIGKILL))
    output, _ = process.communicate(timeout=60)  # waits for all processes that have the pipe open
    print(output)
    assert all_ended(ranks)
    assert "Traceback" not in output
    if event.startswith("rank"):
        assert f"error: {event[:6]} of 2 was killed by SIGKILL, and the others were ended with it" in output
        assert process.returncode == 2
    else:
        assert process.returncode == {"Ctrl-C": 130, "SIGTERM": 143}.get(event, -signal.SIGKILL)
    if event != "the first process is killed":
        assert f"resume={run / 'last.ckpt'}" in output


class Watched:
    """Two ranks of ``waiting_job:wait``, each with a worker, and the process that started them."""

    def __init__(self, folder, event="none"):
        self.folder = folder
        command = [sys.executable, "-m", "waiting_job", str(folder), event]
        env = script_environment(TMPDIR=str(folder))  # a killed process leaves a folder there
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def wait_until_all_run(self):
        """Returns the process ids of the ranks and of their workers."""
        files = [self.folder / f"processes_{rank}.json" for rank in (0, 1)]
        while not all(file.exists() for file in files):
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.1)
        return [json.loads(file.read_text()) for file in files]

    def end(self):
        """Waits for the end; returns the exit code, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=60)  # waits for all processes that have the pipes open
        print(stdout, stderr)
        return self.process.returncode, stdout, stderr


CONTINUE = "Continue with the same command and resume={run}/last.ckpt."
ENDED = "and the others were ended with it: nothing is left running."


@pytest.mark.parametrize(
    ("event", "message", "tracebacks"),
    [
        ("RuntimeError", f"rank 1 of 2 failed with RuntimeError: the second rank fails, {ENDED} {CONTINUE}", 1),
        ("UserError", "the second rank cannot read its data", 0),
        ("SIGKILL", f"rank 1 of 2 was killed by SIGKILL, {ENDED} {CONTINUE}", 0),
    ],
)
def test_a_failed_rank_is_reported_in_one_sentence_and_workers_end(tmp_path, event, message, tracebacks):
    (tmp_path / "last.ckpt").touch()
    watched = Watched(tmp_path, event)
    ranks = watched.wait_until_all_run()
    code, stdout, stderr = watched.end()
    assert code == 2
    assert stdout == f"error: {message.format(run=tmp_path)}\n"
    assert stderr.count("Traceback") == tracebacks
    assert bool(stderr) == bool(tracebacks)  # and nothing else
    assert all_ended([process for rank in ranks for process in rank])


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_ranks_write_their_results(tmp_path, stop, code):
    (tmp_path / "last.ckpt").touch()
    watched = Watched(tmp_path)
    ranks = watched.wait_until_all_run()
    watched.process.send_signal(stop)
    hint = f" stopped  continue with the same command and resume={tmp_path}/last.ckpt\n"
    assert watched.end() == (code, f"stopping  after this step, and saving; once more stops it at once\n{hint}", "")
    assert [(tmp_path / f"result_{rank}").exists() for rank in (0, 1)] == [True, True]
    assert all_ended([process for rank in ranks for process in rank])


@pytest.mark.parametrize("when", ["while ranks start", "while ranks work"])
def test_ranks_and_workers_end_after_their_parent_is_killed(tmp_path, when):
    watched = Watched(tmp_path)
    if when == "while ranks work":
        processes = [process for rank in watched.wait_until_all_run() for process in rank]
    else:
        while len(processes := children(watched.process)) < 2:
            assert watched.process.poll() is None
            time.sleep(0.01)
    watched.process.kill()
    assert watched.end() == (-signal.SIGKILL, "", "")
    assert all_ended(processes)
    assert not list(tmp_path.glob("result_*"))


@pytest.mark.parametrize("ranks", ["01", "1"])
def test_torchrun_ends_soon_and_a_mistake_is_printed_once(tmp_path, ranks):
    """Ranks without the mistake are reading data or waiting for the others, and a signal ends them."""
    wrong = f'case {ranks} in *$RANK*) set -- "$@" data=imagefolder data.root=/dev/null/nowhere;; esac'
    script = f'{wrong}; exec {sys.executable} {FIT} "$@" hydra.run.dir={tmp_path}/run'
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    began = time.monotonic()
    ended = subprocess.run(
        [*command, "sh", "-c", script, "sh", *JOB],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=script_environment(), timeout=300,
    )  # fmt: skip
    who = r"rank 1 of 2, on \S+: " * (ranks == "1")
    (said,) = re.findall("^error: .*", ended.stdout, re.MULTILINE)
    assert re.match(rf"error: {who}/dev/null/nowhere is not a folder", said)
    assert ended.returncode != 0
    assert "SIGKILL" not in ended.stderr, f"after {time.monotonic() - began:.0f} s"
    assert (tmp_path / "run").exists() is (ranks == "1")
