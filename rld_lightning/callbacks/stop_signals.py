"""Handles signals to stop or to save: at the end of a step, in all processes together."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from rld_lightning.callbacks.last_checkpoint import LastCheckpoint
from rld_lightning.console import print_line
from rld_lightning.distributed import STOPS, Stopped, is_rank_zero, rank_zero_only, slurm_job, started_by_run
from rld_lightning.trainer_callbacks import callbacks_of

_SAVE = 1  # value that processes exchange: to save; to stop: _STOP plus the signal's number
_STOP = 100


class StopSignals(Checkpoint):
    """Handles SIGINT, SIGTERM, SIGHUP and SIGUSR1 during training, at the end of a step or of a validation batch.

    The first three save ``last.ckpt`` and end the run with 128 + the signal's number; a second one ends it at once.
    SIGUSR1 saves and training continues; in a SLURM job, to which SLURM sends it before the time limit, the job is
    requeued and ends. While gradients are accumulated, which no checkpoint contains, it waits for the optimizer step.

    Any of several processes may receive the signal: they exchange after each batch what they received, on the CPU and
    while the next batch is computed, and so act together one batch later.

    Must be the last of the callbacks, so that the others have counted the step.
    """

    def __init__(self) -> None:
        self.training = False
        self.received = 0
        self._process = os.getpid()
        self._group: Any = None
        self._since_saved = 10  # batches
        self._pending: tuple[torch.Tensor, Any] | None = None

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handles signals within the block; those that do not wait for a step end the process at once."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
            yield
            return
        before = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGUSR1)}
        self._install_handlers()
        try:
            yield
        except Exception as error:
            if not self.received >= _STOP:
                raise
            raise Stopped(
                self.received - _STOP
            ) from error  # for example from a data worker that received the signal, too
        finally:
            self.training = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on, signals wait for the end of a step."""
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            # Lightning's own handlers notify other ranks at once, which may be in another collective.
            self._install_handlers()
        self.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Acts on a received signal."""
        self._act(trainer, waits=trainer.fit_loop._should_accumulate())

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Acts on a received signal; the resumed run repeats the validation."""
        if self.training:
            self._act(trainer, waits=trainer.fit_loop._should_accumulate())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on, signals no longer wait for a step."""
        self.training = False
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None

    def _install_handlers(self) -> None:
        for number in (*STOPS, signal.SIGUSR1):
            # Ignored by nohup, for example; SIGUSR1 also until there is something to save.
            if signal.getsignal(number) is not signal.SIG_IGN or (number == signal.SIGUSR1 and started_by_run()):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if number == signal.SIGUSR1:
            self.received = max(self.received, _SAVE) if self.training else self.received
        elif self.training and self.received < _STOP:
            self.received = _STOP + number
            if is_rank_zero() and not started_by_run():  # otherwise the process that started it prints this
                line = b"stopping after this step, and saving; once more stops it at once\n"
                os.write(2, b"\n" + line if os.isatty(2) else line)  # after the echoed ^C and the progress bar
        else:
            signal.signal(number, lambda *_: os._exit(128 + number))
            raise Stopped(number)

    def _act(self, trainer: Trainer, *, waits: bool) -> None:
        self._since_saved += 1
        agreed = self._agree()
        if agreed == _SAVE and self._since_saved < 10:  # from a process that received it a batch later
            self.received = agreed = 0 if self.received <= _SAVE else self.received
        if not agreed:
            return
        if waits:
            self.received = max(self.received, agreed)
            return
        stops = agreed >= _STOP or slurm_job() is not None
        saved = _save(trainer)
        if agreed == _SAVE:
            self.received = self.received if self.received > _SAVE else 0
            where = (
                f"as it is in epoch {trainer.current_epoch + 1}" if saved else "nothing: there is no checkpoint_last"
            )
            print_line("saved", where)
        if stops:
            if agreed == _SAVE:
                _requeue()
            self.training = False
            raise Stopped(agreed - _STOP if agreed >= _STOP else signal.SIGUSR1)

    def _agree(self) -> int:
        """Returns the signal any process received up to the previous batch; a single process's up to now."""
        if self._group is None:
            return self.received
        pending, self._pending = self._pending, None
        own = torch.tensor([self.received])
        if self.received == _SAVE:
            self.received = 0
        work = torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        self._pending = (own, work)
        if pending is None:
            return 0
        pending[1].wait()
        return int(pending[0])


def _save(trainer: Trainer) -> bool:
    """Saves ``last.ckpt`` in all processes, if a callback does so; returns whether it does."""
    for callback in callbacks_of(trainer, LastCheckpoint):
        callback.save(trainer)
        return True
    return False


@rank_zero_only
def _requeue() -> None:
    """Asks SLURM to requeue the job."""
    job = slurm_job()
    if job is None or shutil.which("scontrol") is None:
        return
    done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
    print_line("SLURM", f"job {job} is queued again" if done.returncode == 0 else done.stderr.strip())
