"""Starting processes, monitoring them, and reporting how they ended."""

import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from helpers.configs import CONF, compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from rld_lightning.callbacks import SameConfiguration, same_configuration
from rld_lightning.distributed import external_launcher, requeued, started_by_run, unique_name
from rld_lightning.errors import UserError
from rld_lightning.tasks import fit
from rld_lightning.tasks.run import processes as launching
from rld_lightning.tasks.run.processes import Failure, processes_to_start


@pytest.fixture(autouse=True)
def _started_by_nobody(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def torchrun(monkeypatch, nodes=2, local=1):
    values = {"WORLD_SIZE": nodes * local, "LOCAL_WORLD_SIZE": local, "RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0}
    for name, value in {**values, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, str(value))


def srun(monkeypatch, nodes=2, local=4):
    values = {"NTASKS": nodes * local, "NNODES": nodes, "NTASKS_PER_NODE": local, "JOB_ID": 71, "STEP_ID": 0}
    for name, value in {**values, "JOB_NAME": "rld", "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["trainer=cpu"], 1),
        (["trainer=ddp_cpu"], 2),
        (["trainer=ddp_cpu", "trainer.devices=3"], 3),
        (["trainer=ddp_cpu", "trainer.devices=1"], 1),
        (["trainer=cpu", "trainer.devices=2"], 2),
        (["trainer=ddp_cpu", "trainer.strategy=ddp_spawn"], 1),  # which starts its own
    ],
)
def test_one_process_per_device(overrides, count):
    assert processes_to_start(compose(*overrides, resolve=False).trainer) == count


def test_counting_devices_prints_none_of_the_lines_of_the_run(caplog):
    limits = ("trainer.fast_dev_run=true", "trainer.limit_train_batches=1", "trainer.overfit_batches=1")
    for limit in limits:
        assert processes_to_start(compose("trainer.accelerator=cpu", limit, resolve=False).trainer) == 1
    assert not [line for line in caplog.messages if "batch" in line]


def test_torchrun_and_srun_determine_devices_and_nodes(monkeypatch):
    torchrun(monkeypatch, nodes=2, local=3)
    trainer = compose("trainer=ddp_cpu").trainer
    assert (trainer.devices, trainer.num_nodes) == (3, 2)
    assert processes_to_start(trainer) == 1
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    srun(monkeypatch)
    trainer = compose("trainer=ddp_cpu").trainer
    assert (trainer.devices, trainer.num_nodes) == (4, 2)
    assert processes_to_start(trainer) == 1
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert external_launcher() is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer=ddp_cpu", "trainer.devices=2"], "torchrun has started 2 process.* needs 2 on 2 node"),
        (["trainer=cpu", "trainer.num_nodes=1"], "needs 1 on 1 node.* choose trainer=ddp"),
    ],
)
def test_number_of_processes_must_match_torchrun(monkeypatch, overrides, sentence):
    torchrun(monkeypatch)
    with pytest.raises(ValueError, match=sentence):
        processes_to_start(compose(*overrides, resolve=False).trainer)


def test_several_nodes_need_torchrun_or_srun():
    with pytest.raises(ValueError, match=r"num_nodes=2 needs a start on every node.*fit\.sbatch"):
        processes_to_start(compose("trainer=ddp_cpu", "trainer.num_nodes=2", resolve=False).trainer)


def test_sweep_in_every_process_is_refused_but_not_a_job_of_a_sweep(monkeypatch):
    srun(monkeypatch)
    monkeypatch.setattr(launching, "is_trial", lambda: True)
    trainer = compose("trainer=ddp_cpu", resolve=False).trainer
    with pytest.raises(ValueError, match="--multirun under srun would sweep once in each process"):
        processes_to_start(trainer)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert processes_to_start(trainer) == 1


@pytest.mark.slow
def test_processes_of_torchrun_agree_on_a_name_and_slurm_jobs_have_one(monkeypatch):
    script = "from rld_lightning.distributed import unique_name; print(unique_name(), unique_name())"
    start = subprocess.Popen
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda *a, **k: start(*a, **k | {"stdout": subprocess.PIPE, "text": True}))
        with launching._running((sys.executable, "-c", script), 2) as processes:
            printed = [process.communicate(timeout=100)[0].split() for process in processes]
    assert len({name for names in printed for name in names}) == 1
    assert [len(names) for names in printed] == [2, 2]
    srun(monkeypatch)
    assert unique_name() == "slurm-71.0"


def test_first_failure_ends_the_wait_and_kills_the_others(tmp_path):
    script = (
        "import os, subprocess, sys, time\n"
        "if os.environ['RANK'] == '1': time.sleep(0.3); sys.exit(3)\n"
        f"worker = subprocess.Popen(['sleep', '100']); open('{tmp_path}/worker', 'w').write(str(worker.pid))\n"
        "time.sleep(100)\n"
    )
    with launching._running((sys.executable, "-c", script), 2) as processes:
        while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
            time.sleep(0.01)
        assert launching._wait(processes) == {1: 3}
        assert processes[0].poll() is None
    assert [process.returncode for process in processes] == [-9, 3]
    worker = int((tmp_path / "worker").read_text())
    for _ in range(100):  # its end is not ours to wait for
        if not (stat := Path(f"/proc/{worker}/stat")).exists() or " Z " in stat.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the data loader's process is still there")


def test_wait_ends_when_all_have_succeeded():
    with launching._running((sys.executable, "-c", "pass"), 2) as processes:
        assert launching._wait(processes) == {}


def test_interrupted_processes_have_time_to_save(monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "GRACE", 1.0)
    script = (
        "import os, signal, sys, time\n"
        "rank = os.environ['RANK']\n"
        f"leave = lambda *_: (open('{tmp_path}/result', 'w').close(), sys.exit(0))\n"
        "signal.signal(signal.SIGTERM, leave if rank == '0' else signal.SIG_IGN)\n"
        f"open('{tmp_path}/ready_' + rank, 'w').close()\n"
        "time.sleep(100)\n"
    )
    with launching._running((sys.executable, "-c", script), 2) as processes:
        while len(list(tmp_path.glob("ready_*"))) < 2:
            time.sleep(0.01)
        start = time.monotonic()
        launching._interrupt(processes)
        assert 1 <= time.monotonic() - start < 60
    assert (tmp_path / "result").exists()
    assert [process.returncode for process in processes] == [0, -9]


@pytest.mark.parametrize(
    ("codes", "failures", "sentence", "traceback"),
    [
        (
            {1: -9},
            {0: Failure("connection closed", "trace", 1)},
            "rank 1 of 2 was killed by SIGKILL, and the others",
            "",
        ),
        (
            {1: -6},
            {1: Failure("Early: x", "early", 1)},
            "rank 1 of 2 failed with Early: x",
            "early",
        ),  # and then aborted
        (
            {0: 1, 1: 1},
            {0: Failure("Late: y", "late", 1.02), 1: Failure("Early: x", "early", 1.01)},
            "rank 1 of 2 failed with Early: x",
            "early",
        ),
        ({0: 1}, {0: Failure("Late: y", "late", 2), 1: Failure("Early: x", "early", 1)}, "rank 1 of 2 failed", "early"),
        ({0: 1, 1: 1}, {0: Failure("data.root is wrong", None, 1)}, r"^data\.root is wrong$", ""),
        ({0: 7}, {}, "rank 0 of 2 ended with exit status 7", ""),
    ],
)
def test_one_sentence_describes_the_failure(capsys, codes, failures, sentence, traceback):
    message = launching._explain(codes, failures, 2, None)
    assert re.search(sentence, message)
    assert capsys.readouterr().err == traceback
    if "rank" in message:
        assert "There is no checkpoint yet" in message
        assert "Continue with the same command and resume=a" in launching._explain(codes, failures, 2, "resume=a")


def test_run_is_resumed_from_its_last_checkpoint_and_a_trial_by_its_sweep(monkeypatch, tmp_path):
    assert launching._resume_hint(tmp_path) is None
    (tmp_path / "last.previous.ckpt").touch()  # the latest is gone: it goes on from the one before
    assert launching._resume_hint(tmp_path) == f"resume={tmp_path / 'last.ckpt'}"
    monkeypatch.setattr(launching, "is_trial", lambda: True)
    assert launching._resume_hint(tmp_path) is None  # the sweep says how it goes on


def test_output_of_a_trial_and_its_error_go_to_its_log(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(launching, "is_trial", lambda: True)
    log, code = tmp_path / "trial.log", "import sys; print('out'); print('err', file=sys.stderr)"
    for _ in range(2):  # one that goes on adds to it
        with launching._running((sys.executable, "-c", code), 1, log) as processes:
            assert not launching._wait(processes)
    failure = Failure("KeyError: 'x'", "Traceback ...\n", 0.0)
    message = launching._explain({0: 1}, {0: failure}, 1, None, log)
    assert message == f"the process of this run failed with KeyError: 'x'. What it printed is in {log}."
    assert sorted(log.read_text().splitlines()) == ["Traceback ...", "err", "err", "out", "out"]
    assert capfd.readouterr() == ("", "")


def test_single_process_is_not_called_a_rank():
    message = launching._explain({0: -9}, {}, 1, "hydra.sweep.dir=runs/sweeps/a")
    assert message == "the process of this run was killed by SIGKILL. Continue with the same command and " + (
        "hydra.sweep.dir=runs/sweeps/a."
    )


def test_ranks_get_the_configuration_with_interpolations_except_those_of_hydra():
    OmegaConf.register_new_resolver("hydra", lambda key: f"<{key}>", replace=True)
    cfg = OmegaConf.create(
        {"paths": {"run": "${hydra:runtime.output_dir}"}, "lr": 1, "recipe": {"lr": "${lr}", "x": "???"}, "n": None}
    )
    assert launching._resolve_hydra(cfg) == {
        "paths": {"run": "<runtime.output_dir>"}, "lr": 1, "recipe": {"lr": "${lr}", "x": "???"}, "n": None,
    }  # fmt: skip


def test_rank_resolves_the_configuration_and_imports_lightning_only_with_its_task():
    script = (
        "import sys; from omegaconf import OmegaConf; import rld_lightning.tasks.run.processes\n"
        "print(OmegaConf.create({'devices': '${devices_per_node:3}'}).devices, 'lightning' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "3 False\n"


@pytest.mark.parametrize("step", [None, 3])
def test_requeued_slurm_job_finds_its_directory(monkeypatch, step):
    srun(monkeypatch, nodes=1, local=1)
    monkeypatch.delenv("SLURM_STEP_ID")
    monkeypatch.setattr(sys, "argv", ["fit.py", "seed=1"])
    monkeypatch.setattr(sys, "stdin", None)
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", str(step))
    name = unique_name()
    assert name.startswith("slurm-71.batch-" if step is None else "slurm-71.3-")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert unique_name() == name
    assert requeued()
    monkeypatch.setattr(sys, "argv", ["fit.py", "seed=2"])  # another run of the same job
    assert unique_name() != name
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # where the same command may be given twice
    assert not unique_name().startswith("slurm")
    assert not requeued()


def test_run_of_a_requeued_job_is_resumed(monkeypatch, tmp_path):
    srun(monkeypatch)
    (tmp_path / "last.ckpt").touch()
    assert fit._requeued_checkpoint(tmp_path) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert fit._requeued_checkpoint(tmp_path) == str(tmp_path / "last.ckpt")
    assert fit._requeued_checkpoint(tmp_path / "other") is None


def test_only_ranks_started_by_a_run_are_recognised(monkeypatch):
    assert not started_by_run()
    torchrun(monkeypatch)
    assert not started_by_run()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launching.JOB)
    assert started_by_run()


def configuration(**values):
    paths = {"run": "/run", "data": "/data", **values.pop("paths", {})}
    return OmegaConf.create(
        {"seed": 0, "data": {"root": "${paths.data}"}, "logger": {"x": 1}, "paths": paths, "lr": 0.1, **values}
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, None),
        ({"logger": {"x": 2}}, None),
        ({"paths": {"data": "/scratch"}}, None),
        ({"paths": {"run": "/other"}}, "process 1 has run=/other where process 0 has /run"),
        ({"lr": 0.2}, "process 1 has lr=0.2 where process 0 has 0.1. Start all of them with the same command."),
        ({"extra": 1, "a": 1, "b": 1, "c": 1}, r"a=1 where process 0 has None, b=.*, c=.* \.\.\."),
    ],
)
def test_ranks_compare_settings_but_not_data_paths(monkeypatch, other, message):
    mine, second = SameConfiguration(configuration()), SameConfiguration(configuration(**other))
    answer = {mine.digest: second.digest}
    monkeypatch.setattr(
        same_configuration, "_gather", lambda value: [value, answer[value] if value is mine.digest else second.values]
    )
    trainer = SimpleNamespace(world_size=2)
    if message is None:
        mine.setup(trainer, None, "fit")
        return
    with pytest.raises(UserError, match=message):
        mine.setup(trainer, None, "fit")
    mine.setup(trainer, None, "validate")
    mine.setup(SimpleNamespace(world_size=1), None, "fit")


def test_slurm_launcher_is_submitit_with_our_settings():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("fit", ["launcher=submitit_slurm", "hydra.launcher.nodes=2"], return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 1, 1)
    assert launcher.setup == ["export SLURM_KILL_BAD_EXIT=1"]


def test_signal_during_a_poll_does_not_block_the_wait():
    with launching._running((sys.executable, "-c", "import time; time.sleep(100)"), 1) as (process,):
        process._waitpid_lock.acquire()  # as a handler leaves it that raises within Popen.poll
        assert launching.poll(process) is None
    assert process.returncode == -signal.SIGKILL


def test_processes_get_secrets_that_no_file_of_the_run_contains(monkeypatch, tmp_path):
    seen = []

    @contextmanager
    def started(command, count, _output):
        path = Path(command[4]) / "config.yaml"
        seen.append((OmegaConf.load(path).data.storage_options.secret, path.parent.stat().st_mode & 0o077))
        yield []

    monkeypatch.setattr(launching, "_running", started)
    cfg = OmegaConf.create({"paths": {"run": str(tmp_path)}, "data": {"storage_options": {"secret": "hunter2"}}})
    launching.run_in_processes(2, "package:task", cfg)
    assert seen == [("hunter2", 0)]  # in a folder that nobody else may enter, and that is gone
    assert not list(tmp_path.iterdir())
