"""What a run does when it is told to stop, or to save: at the end of a step, in all processes together."""

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
from rld_lightning.watching import callbacks_of

_SAVE = 1  # what processes tell each other: to save, or a stop's number and this much
_STOP = 100


class StopSignals(Checkpoint):
    """Hears SIGINT, SIGTERM, SIGHUP and SIGUSR1 while a run trains, and obeys at the end of the step or of a batch of
    the validation.

    The first three save ``last.ckpt`` and end the run with 128 + the signal's number; a second one ends it at once.
    SIGUSR1 saves and goes on; in a job of SLURM, which sends it before the time is up, the job is put back in the queue
    and ends. Where gradients are accumulated, which no checkpoint holds, it takes until the step of the optimizer.

    Of several processes any may be signalled: they tell each other after each batch what they have heard, on the CPU
    and while the next batch is computed, and so obey together one batch later.

    It is the last of the callbacks, so that the others have counted the step.
    """

    def __init__(self) -> None:
        self.training = False
        self.heard = 0
        self._process = os.getpid()
        self._group: Any = None
        self._since_saved = 10  # batches
        self._told: tuple[torch.Tensor, Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears signals until the end of the block; what it does not hear while training ends the process at once."""
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
            yield
            return
        before = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGUSR1)}
        self._listen()
        try:
            yield
        except Exception as error:
            if not self.heard >= _STOP:
                raise
            raise Stopped(self.heard - _STOP) from error  # a worker of the data, say, that heard it, too
        finally:
            self.training = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on signals wait for the end of a step."""
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._listen()  # Lightning's own handlers tell other processes at once, which may wait for something else
        self.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Obeys."""
        self._obey(trainer, waits=trainer.fit_loop._should_accumulate())

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Obeys; the validation is made anew by the run that goes on."""
        if self.training:
            self._obey(trainer, waits=trainer.fit_loop._should_accumulate())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is no step to wait for."""
        self.training = False
        if self._told is not None:
            self._told[1].wait()
            self._told = None

    def _listen(self) -> None:
        for number in (*STOPS, signal.SIGUSR1):
            # By nohup, say; or SIGUSR1 until there is something to save.
            if signal.getsignal(number) is not signal.SIG_IGN or (number == signal.SIGUSR1 and started_by_run()):
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of the data
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if number == signal.SIGUSR1:
            self.heard = max(self.heard, _SAVE) if self.training else self.heard
        elif self.training and self.heard < _STOP:
            self.heard = _STOP + number
            if is_rank_zero() and not started_by_run():  # else whoever has started it says so
                line = b"stopping after this step, and saving; once more stops it at once\n"
                os.write(2, b"\n" + line if os.isatty(2) else line)  # behind ^C, and a bar
        else:
            signal.signal(number, lambda *_: os._exit(128 + number))
            raise Stopped(number)

    def _obey(self, trainer: Trainer, *, waits: bool) -> None:
        self._since_saved += 1
        told = self._agreed()
        if told == _SAVE and self._since_saved < 10:  # of one that has heard it a batch later
            self.heard = told = 0 if self.heard <= _SAVE else self.heard
        if not told:
            return
        if waits:
            self.heard = max(self.heard, told)
            return
        stops = told >= _STOP or slurm_job() is not None
        saved = _save(trainer)
        if told == _SAVE:
            self.heard = self.heard if self.heard > _SAVE else 0
            where = (
                f"as it is in epoch {trainer.current_epoch + 1}" if saved else "nothing: there is no checkpoint_last"
            )
            print_line("saved", where)
        if stops:
            if told == _SAVE:
                _requeue()
            self.training = False
            raise Stopped(told - _STOP if told >= _STOP else signal.SIGUSR1)

    def _agreed(self) -> int:
        """What has been heard by any process until the batch before; by this one until now, where it is alone."""
        if self._group is None:
            return self.heard
        told, self._told = self._told, None
        own = torch.tensor([self.heard])
        if self.heard == _SAVE:
            self.heard = 0
        work = torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        self._told = (own, work)
        if told is None:
            return 0
        told[1].wait()
        return int(told[0])


def _save(trainer: Trainer) -> bool:
    """Saves ``last.ckpt`` in all processes, if there is who does."""
    for callback in callbacks_of(trainer, LastCheckpoint):
        callback.save(trainer)
        return True
    return False


@rank_zero_only
def _requeue() -> None:
    """Asks SLURM to start the job again."""
    job = slurm_job()
    if job is None or shutil.which("scontrol") is None:
        return
    done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
    print_line("SLURM", f"job {job} is queued again" if done.returncode == 0 else done.stderr.strip())
