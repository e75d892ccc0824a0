"""A W&B run beside ``metrics.csv``, which never stops training, whatever the server does."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_line
from rld_lightning.distributed import rank_zero_only
from rld_lightning.module import DistillationModule
from rld_lightning.redact import redact
from rld_lightning.runs.files import WANDB_RUN, read_json, write_json
from rld_lightning.tracking import results
from rld_lightning.tracking.server import server, trouble, wandb_mode
from rld_lightning.tracking.start import (
    LONGEST_NAME,
    environment,
    hidden_arguments,
    next_step,
    tear_down,
    within_limits,
)

if TYPE_CHECKING:
    from wandb import Run

STEP = "trainer/global_step"


class WandbLogger(LightningWandbLogger):
    """Lightning's logger for W&B, with an end to all waiting.

    A server that cannot be reached, refuses, hangs or fails makes an online run an offline one before it starts; what
    it does later is wandb's own process to wait for, and the end of the run waits for ``finish_timeout`` at most.
    Whatever wandb raises ends the logging to W&B, with one line, and nothing else. An offline run is uploaded later by
    ``wandb sync <folder>``.

    Under a W&B sweep agent, or where the environment has ``WANDB_RUN_ID`` and the like, the run's id, project and
    entity are those.

    Args:
        answer_timeout: seconds that the server has to show that it is there.
        init_timeout: seconds that the start of an online run may take after that.
        finish_timeout: seconds that the end of a run waits for uploads.
        save_dir: the run folder; the id of the run is kept there, in ``wandb_run.json``.
        artifact: the collection that the run's student becomes a version of.
        log_model: whether it does.
        watch: which histograms of each layer are logged: "gradients", "parameters" or "all"; None for none.
        watch_every: steps between two of them.
        **options: see Lightning's logger and ``wandb.init``.
    """

    hands_options_to: ClassVar[str] = "wandb.init"  # whose names are known before a run begins
    _experiment: "Run | None"

    def __init__(
        self,
        *,
        answer_timeout: float = 5.0,
        init_timeout: float = 15.0,
        finish_timeout: float = 60.0,
        save_dir: str | Path,
        artifact: str = "student",
        log_model: bool = True,
        watch: str | None = None,
        watch_every: int = 200,
        **options: Any,
    ) -> None:
        if watch not in (None, "gradients", "parameters", "all"):
            raise ValueError(f"watch={watch} is unknown; choose gradients, parameters, all, or null.")
        super().__init__(save_dir=save_dir, **options)
        self.folder = Path(save_dir)
        self.answer_timeout = answer_timeout
        self.init_timeout = init_timeout
        self.finish_timeout = finish_timeout
        self.artifact = results.plain_name(artifact)
        self.log_students = log_model  # Lightning's own would upload checkpoints
        self.watched, self.watch_every = watch, watch_every
        self.broken = False
        self._before: Path | None = None
        self._first_step: int | None = None  # of a run that goes on, until something is logged
        self._open = ExitStack()

    def continue_run(self, folder: Path) -> None:
        """Goes on with the W&B run of a run folder, if it has one; to be called before anything is logged.

        The folder may be a stranger's: what is no id is none, for files are looked for by it.
        """
        self._before = folder
        with suppress(OSError, ValueError, KeyError, TypeError):
            if re.fullmatch(r"[\w.=+@ -]{1,128}", found := read_json(folder / WANDB_RUN)["id"]):
                self._wandb_init["id"] = found

    @property
    @rank_zero_experiment
    def experiment(self) -> "Run":
        """The W&B run, started when it is first asked for; one that does nothing where it could not start.

        Lightning asks for it, too, where an exception would end the training.
        """
        if self._experiment is None and not self.broken:
            try:
                self._experiment = self._begin()
            except Exception as error:  # wandb's own, pydantic's, those of a folder that cannot be written, ...
                self._lose(error)
        return cast("Run", DummyExperiment()) if self._experiment is None else self._experiment

    def _begin(self) -> "Run":
        self.folder.mkdir(parents=True, exist_ok=True)
        # What is to be uploaded waits in the run folder, not in the user's: the folder may be copied before it is.
        self._open.enter_context(environment("WANDB_DATA_DIR", str(self.folder.absolute() / "wandb")))
        run = self._start()
        if run.offline and self._before is not None:  # online, wandb asks the server
            self._first_step = next_step(self._before, run.id)
        if swept := _swept(run):  # whose trials would all be called alike
            run.name = f"{run.name}-{','.join(f'{key}={_short(run.config[key])}' for key in swept)}"[:LONGEST_NAME]
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        run.define_metric("val/top1", step_metric=STEP, step_sync=True, summary="max,last")
        if not run.disabled:
            known = {name: getattr(run, name) for name in ("id", "entity", "project")} | {
                "url": None if run.offline else run.url
            }
            known[results.ARTIFACT] = self.artifact
            write_json(self.folder / WANDB_RUN, known)
        return run

    def _lose(self, error: Exception, extra: str | None = None) -> None:
        """Says what is missed from now on; all, where nothing ``extra`` is named."""
        self.broken = extra is None
        consequence = "logs no more, metrics.csv goes on" if self.broken else f"goes without {extra}"
        print_line("wandb", f"{consequence}: {_in_short(error)}")

    @property
    def version(self) -> str:
        """Nothing: Lightning would put the run's id in the progress bar."""
        return ""

    @rank_zero_only
    def attempt(self, action: Callable[["Run"], Any], extra: str | None = None) -> None:
        """Does something with the W&B run; if it raises, this was the last time.

        Args:
            extra: what is missed if it fails, in words, where the logging of metrics can go on without.
        """
        run = self.experiment
        if self.broken:
            return
        try:
            action(run)
        except Exception as error:  # as above, and those of a lost connection to wandb's process
            self._lose(error, extra)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs values at a step of the trainer."""
        self.attempt(lambda run: self._log(run, dict(metrics) | ({} if step is None else {STEP: step})))

    def _log(self, run: "Run", values: dict[str, float]) -> None:
        first, self._first_step = self._first_step, None
        if first is None:
            run.log(values)
        else:
            run.log(values, step=first, commit=True)

    def watch_layers(self, module: DistillationModule) -> None:
        """Lets wandb log histograms of the student's layers, if that is wanted."""
        options: dict[str, Any] = {"log": self.watched, "log_freq": self.watch_every, "log_graph": False}
        if self.watched is not None:
            self.attempt(lambda run: run.watch(module.student, **options), "histograms")

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]  # never a Namespace
        """Adds to the run's configuration, without secrets; what a sweep has set stays."""
        self.attempt(lambda run: run.config.update(_without(redact(dict(params)), _swept(run)), allow_val_change=True))

    @rank_zero_only
    def finish(self, succeeded: bool) -> None:
        """Ends the W&B run, or the next one of this process would log into it, and says where it is."""
        with self._open:
            self._finish(succeeded)

    def _finish(self, succeeded: bool) -> None:
        run, self._experiment = self._experiment, None
        if run is None or run.disabled:
            return
        folder, complete = Path(run.settings.sync_dir), not self.broken
        try:
            run.finish(0 if succeeded else 1)
        except TimeoutError:
            complete = False
            print_line("wandb", f"{server()} has not taken everything within {self.finish_timeout:g} s")
        except Exception as error:  # such as a process of its own that is gone
            complete = False
            print_line("wandb", f"did not finish cleanly: {_in_short(error)}")
            tear_down()
        if run.offline or not complete:
            print_line("wandb", f"upload with: wandb sync {folder}", pasted=True)

    def _start(self) -> "Run":
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # print_line says it
        options = {name: value for name, value in self._wandb_init.items() if value is not None}
        options |= within_limits(options)
        if os.environ.get("WANDB_SWEEP_ID"):
            options = _without(options, ("id", "project", "entity"))
        given = {"WANDB_RUN_ID": "id", "WANDB_PROJECT": "project", "WANDB_ENTITY": "entity"}
        options = _without(options, tuple(name for variable, name in given.items() if os.environ.get(variable)))
        options["mode"] = options.get("mode") or wandb_mode()
        resume = options.pop("resume")
        options["settings"] = wandb.Settings(
            silent=True,
            console="off",  # the console is for people; wandb would put its progress bars in a file
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
        )
        if options["mode"] == "online":
            problem = trouble(self.answer_timeout)
            if problem is None:
                try:
                    with environment("WANDB_HTTP_TIMEOUT", str(int(self.init_timeout))), hidden_arguments():
                        known = {"resume": resume} if "id" in options else {}
                        run = wandb.init(**options, **known)
                    print_line("wandb", run.url or "online")
                    return run
                except Exception as error:  # the server has changed its mind
                    problem = f"lets no run start ({_in_short(error)})"
                    tear_down()  # its process would keep the id of the failed run
            print_line("wandb", f"offline, because {server()} {problem}")
            options["mode"] = "offline"
        with hidden_arguments():
            return wandb.init(**options)


@contextmanager
def tracked(trainer: Trainer, module: DistillationModule, cfg: DictConfig) -> Iterator[None]:
    """Gives all loggers the configuration at the start, and W&B, if there, the results and its end at the end.

    Results are read from the run folder: tables and students, see :mod:`~rld_lightning.tracking.results`. The
    students of a run that holds training images out are no result and become an artifact of its own, ``...-tuning``.
    """
    config: Any = dict(module.hparams) | redact(OmegaConf.to_container(cfg, resolve=True))
    for other in trainer.loggers:
        if not isinstance(other, WandbLogger):
            other.log_hyperparams(config)
    logger = next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
    if logger is None or not trainer.is_global_zero:
        yield
        return
    if cfg.data.val_fraction:
        logger.artifact = results.plain_name(f"{logger.artifact}-tuning")
    run = Path(cfg.paths.run)
    logger.continue_run(Path(cfg.resume).parent if cfg.resume else run)
    succeeded = False
    try:
        logger.log_hyperparams(config)
        logger.watch_layers(module)
        yield
        logger.attempt(lambda wandb_run: results.log_classes(wandb_run, run), "its table of classes")
        logger.attempt(lambda wandb_run: results.log_confusion(wandb_run, run), "its confusion matrix")
        # Last, because online wandb asks the server whether it may, and waits for the answer.
        if logger.log_students:
            teacher = None if module.teacher is None else cfg.model.teacher
            logger.attempt(lambda wandb_run: results.log_models(wandb_run, run, teacher), "its artifacts")
        succeeded = True
    finally:
        logger.finish(succeeded)


def wandb_facts(folder: Path) -> dict[str, str]:
    """What a run folder's weights say about the W&B run that they are from: the artifact's name; empty without one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return {results.ARTIFACT: read_json(folder / WANDB_RUN)[results.ARTIFACT]}
    return {}


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _swept(run: "Run") -> tuple[str, ...]:
    """What a sweep agent has set, which wandb would refuse to change, with a warning each."""
    return tuple(run.config.keys()) if run.sweep_id else ()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
