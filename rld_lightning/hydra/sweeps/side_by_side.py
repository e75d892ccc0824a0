"""Parallel trials of a sweep: each is a Hydra job in its own process, with its share of the GPUs."""

import os
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cloudpickle
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from rld_lightning.console import print_line, start_new_line
from rld_lightning.distributed import GRACE, TRIALS, Stopped, exit_with_parent, stop_on_signals, stopped_by
from rld_lightning.errors import UserError
from rld_lightning.forked_processes import PYTHON_M, Process, kill, poll, send_signal, start, wait_for_end
from rld_lightning.hydra.gpu_shares import VISIBLE, gpu_shares
from rld_lightning.runs.files import ERROR

_POLL = 0.05  # seconds between two checks of the processes


@dataclass(frozen=True)
class _Running:
    index: int
    process: Process


class Jobs:
    """Runs jobs of a sweep, ``at_once`` of them in parallel.

    Raises:
        UserError: ``at_once`` is invalid.
    """

    def __init__(self, context: HydraContext, config: DictConfig, task: TaskFunction, at_once: int) -> None:
        if at_once == -1:
            at_once = os.cpu_count() or 1
        if at_once < 1:
            raise UserError(f"hydra.launcher.n_jobs={at_once} must be 1 or more, or -1 for one a core.")
        self.context = context
        self.config = config
        self.task = task
        self.at_once = at_once
        self.shares = gpu_shares(config.get("trainer") or {})

    def run(self, overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Runs all jobs and returns their results; a killed job has failed.

        Raises:
            KeyboardInterrupt: on Ctrl-C; all processes have ended.
            Stopped: on another signal; all processes have ended.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        returned: dict[int, JobReturn] = {}
        waiting, running = deque(range(len(overrides))), dict[int, _Running]()
        with TemporaryDirectory(prefix="rld-jobs-") as scratch:
            folder = Path(scratch)
            # Pickled by value, because a script's ``main`` cannot be imported.
            shared = (self.context, self.config, self.task, Singleton.get_state())
            (folder / "shared").write_bytes(cloudpickle.dumps(shared))
            try:
                while waiting or running:
                    for slot in range(self.at_once):
                        if slot not in running and waiting:
                            index = waiting.popleft()
                            running[slot] = _Running(index, self._start(slot, folder, first + index, overrides[index]))
                    for slot, job in list(running.items()):
                        if (code := poll(job.process)) is not None:
                            del running[slot]
                            if (number := stopped_by([code])) is not None:
                                raise Stopped(number)
                            number = first + job.index
                            returned[job.index] = self._returned(folder, number, code, overrides[job.index])
                    time.sleep(_POLL)
            except (KeyboardInterrupt, Stopped):
                start_new_line()
                print_line("stopping", "after this step, and saving; once more stops it at once")
                with suppress(KeyboardInterrupt, Stopped):
                    jobs = [job.process for job in running.values()]
                    send_signal(jobs, signal.SIGTERM)  # they forward it to their trials
                    wait_for_end(jobs, GRACE + 5)
                raise
            finally:
                for job in running.values():  # also ends the processes that it started
                    kill(job.process)
        return [returned[index] for index in range(len(overrides))]

    def _start(self, slot: int, folder: Path, number: int, overrides: Sequence[str]) -> Process:
        (folder / f"job_{number}").write_bytes(pickle.dumps(list(overrides)))
        command = [*PYTHON_M, __name__, str(folder), str(number), str(os.getpid())]
        return start(command, {**os.environ, TRIALS: str(self.at_once), **self.environment(slot)})

    def environment(self, slot: int) -> Mapping[str, str]:
        """Returns the environment variables of a slot's jobs: slots use the GPU shares in turn."""
        return {VISIBLE: self.shares[slot % len(self.shares)]} if self.shares else {}

    def _returned(self, folder: Path, number: int, code: int, overrides: Sequence[str]) -> JobReturn:
        """Returns the result of a job that has ended."""
        file = folder / f"returned_{number}"
        if file.exists():
            returned: JobReturn = pickle.loads(file.read_bytes())
            return returned
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        error = UserError(f"the process that watches over this trial {end}, and the trial with it.")
        config = job_config(self.context, self.config, number, overrides)
        HydraConfig.instance().set_config(config)
        trial = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir)
        with open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(trial.absolute())
        trial.mkdir(parents=True, exist_ok=True)
        (trial / ERROR).write_text(f"{error}\n")
        lost = JobReturn(overrides=list(overrides), status=JobStatus.FAILED, _return_value=error)
        self.context.callbacks.on_job_end(config=config, job_return=lost)
        HydraConfig.instance().set_config(self.config)
        return lost


def job_config(context: HydraContext, config: DictConfig, number: int, overrides: Sequence[str]) -> DictConfig:
    """Composes the config of a sweep's job."""
    job = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(job):
        job.hydra.job.id = f"{job.hydra.job.name}_{number}"
        job.hydra.job.num = number
    return job


def main(arguments: Sequence[str]) -> int:
    """Runs a job in this process, and returns the exit status.

    Args:
        arguments: the folder of the jobs' pickled data, and this job's number.
    """
    folder, number = Path(arguments[0]), int(arguments[1])
    try:
        with stop_on_signals():
            context, config, task, singletons = pickle.loads((folder / "shared").read_bytes())
            overrides = pickle.loads((folder / f"job_{number}").read_bytes())
            setup_globals()
            Singleton.set_state(singletons)
            job = job_config(context, config, number, overrides)
            HydraConfig.instance().set_config(job)
            returned = run_job(
                task_function=task,
                config=job,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=context,
            )
            file = folder / f"returned_{number}"
            file.with_suffix(".part").write_bytes(cloudpickle.dumps(returned))
            file.with_suffix(".part").replace(file)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Stopped as stop:
        return 128 + stop.signal
    return 0


if __name__ == "__main__":
    exit_with_parent(int(sys.argv[3]))
    sys.exit(main(sys.argv[1:]))
