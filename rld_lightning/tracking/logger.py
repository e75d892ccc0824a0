"""A W&B run in addition to ``metrics.csv``; server problems never stop training."""

import os
import re
import shlex
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
from rld_lightning.tracking.server import server, server_problem, wandb_mode
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
    """Lightning's W&B logger with limited waiting times.

    If the server is unreachable, refuses, hangs or fails, an online run is made an offline one before it starts. Later
    problems only make wandb's own process wait, and the end of the run waits for ``finish_timeout`` at most. Any
    exception from wandb ends the logging to W&B, with one line, and nothing else. Upload an offline run later with
    ``wandb sync <folder>``.

    Under a W&B sweep agent, or if ``WANDB_RUN_ID``, ``WANDB_PROJECT`` or ``WANDB_ENTITY`` is set, the run's id, project
    and entity are taken from there.

    Args:
        answer_timeout: seconds for the server to answer at all.
        init_timeout: seconds that the start of an online run may take after that.
        finish_timeout: seconds that the end of a run waits for uploads.
        save_dir: the run directory; the run's id is stored there, in ``wandb_run.json``.
        artifact: the collection to which the run's student is added as a version.
        log_model: whether it is added.
        watch: which histograms of each layer to log: "gradients", "parameters" or "all"; None for none.
        watch_every: steps between histograms.
        **options: see Lightning's logger and ``wandb.init``.
    """

    hands_options_to: ClassVar[str] = "wandb.init"  # whose option names are checked before a run starts
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
        self.artifact = results.artifact_name(artifact)
        self.log_students = log_model  # not Lightning's own, which uploads checkpoints
        self.watched, self.watch_every = watch, watch_every
        self.broken = False
        self._resumed_folder: Path | None = None
        self._first_step: int | None = None  # of a resumed run, until something is logged
        self._open = ExitStack()

    def continue_run(self, folder: Path) -> None:
        """Continues the W&B run of a run directory, if it has one; call this before anything is logged.

        The directory may be untrusted: an invalid id is ignored, because it is used in file names.
        """
        self._resumed_folder = folder
        with suppress(OSError, ValueError, KeyError, TypeError):
            if re.fullmatch(r"[\w.=+@ -]{1,128}", found := read_json(folder / WANDB_RUN)["id"]):
                self._wandb_init["id"] = found

    @property
    @rank_zero_experiment
    def experiment(self) -> "Run":
        """The W&B run, started on first access; a dummy if it could not start.

        Lightning also accesses it where an exception would end the training.
        """
        if self._experiment is None and not self.broken:
            try:
                self._experiment = self._open_run()
            except Exception as error:  # from wandb, pydantic, an unwritable directory, ...
                self._report_failure(error)
        return cast("Run", DummyExperiment()) if self._experiment is None else self._experiment

    def _open_run(self) -> "Run":
        self.folder.mkdir(parents=True, exist_ok=True)
        # Uploads wait in the run directory, not in the user's, as it may be copied before the upload.
        self._open.enter_context(environment("WANDB_DATA_DIR", str(self.folder.absolute() / "wandb")))
        run = self._start()
        if run.offline and self._resumed_folder is not None:  # an online wandb asks the server
            self._first_step = next_step(self._resumed_folder, run.id)
        if swept := _sweep_keys(run):  # otherwise all trials would have the same name
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

    def _report_failure(self, error: Exception, extra: str | None = None) -> None:
        """Prints what is no longer logged: everything, unless an ``extra`` is named."""
        self.broken = extra is None
        consequence = "logging stopped, metrics.csv continues" if self.broken else f"continues without {extra}"
        print_line("wandb", f"{consequence}: {_in_short(error)}")

    @property
    def version(self) -> str:
        """Empty: Lightning would show the run's id in the progress bar."""
        return ""

    @rank_zero_only
    def attempt(self, action: Callable[["Run"], Any], extra: str | None = None) -> None:
        """Runs an action on the W&B run; after an exception, no further one.

        Args:
            extra: what is missing if the action fails, in words, if the logging of metrics can continue without it.
        """
        run = self.experiment
        if self.broken:
            return
        try:
            action(run)
        except Exception as error:  # as above, or from a lost connection to wandb's process
            self._report_failure(error, extra)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs values at a trainer step."""
        self.attempt(lambda run: self._log(run, dict(metrics) | ({} if step is None else {STEP: step})))

    def _log(self, run: "Run", values: dict[str, float]) -> None:
        first, self._first_step = self._first_step, None
        if first is None:
            run.log(values)
        else:
            run.log(values, step=first, commit=True)

    def watch_layers(self, module: DistillationModule) -> None:
        """Makes wandb log histograms of the student's layers, if requested."""
        options: dict[str, Any] = {"log": self.watched, "log_freq": self.watch_every, "log_graph": False}
        if self.watched is not None:
            self.attempt(lambda run: run.watch(module.student, **options), "histograms")

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]  # never a Namespace
        """Updates the run's configuration, without secrets; keeps values set by a sweep."""
        self.attempt(
            lambda run: run.config.update(_without(redact(dict(params)), _sweep_keys(run)), allow_val_change=True)
        )

    @rank_zero_only
    def finish(self, succeeded: bool) -> None:
        """Finishes the W&B run (otherwise this process's next run would log into it), and prints where it is."""
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
        except Exception as error:  # for example because wandb's process has died
            complete = False
            print_line("wandb", f"did not finish cleanly: {_in_short(error)}")
            tear_down()
        if run.offline or not complete:
            # A run that was resumed has a folder for each start; W&B uploads them in their order.
            earlier = [own for own in sorted(folder.parent.glob(f"offline-run-*-{run.id}")) if own.name < folder.name]
            print_line("wandb", f"upload with: wandb sync {shlex.join(map(str, [*earlier, folder]))}", pasted=True)

    def _start(self) -> "Run":
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # print_line reports it
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
            console="off",  # wandb would write its progress bars to a file
            init_timeout=self.init_timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
        )
        if options["mode"] == "online":
            problem = server_problem(self.answer_timeout)
            if problem is None:
                try:
                    with environment("WANDB_HTTP_TIMEOUT", str(int(self.init_timeout))), hidden_arguments():
                        known = {"resume": resume} if "id" in options else {}
                        run = wandb.init(**options, **known)
                    print_line("wandb", run.url or "online")
                    return run
                except Exception as error:  # the server answered before, but fails now
                    problem = f"lets no run start ({_in_short(error)})"
                    tear_down()  # its process would keep the failed run's id
            print_line("wandb", f"offline, because {server()} {problem}")
            options["mode"] = "offline"
        with hidden_arguments():
            return wandb.init(**options)


@contextmanager
def tracked(trainer: Trainer, module: DistillationModule, cfg: DictConfig) -> Iterator[None]:
    """Passes the configuration to all loggers at the start, and the results to W&B, if used, at the end.

    Results are read from the run directory: tables and students, see :mod:`~rld_lightning.tracking.results`. Students
    of runs with held-out training images are not results and become a separate artifact, ``...-tuning``.
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
        logger.artifact = results.artifact_name(f"{logger.artifact}-tuning")
    run = Path(cfg.paths.run)
    logger.continue_run(Path(cfg.resume).parent if cfg.resume else run)
    succeeded = False
    try:
        logger.log_hyperparams(config)
        logger.watch_layers(module)
        yield
        logger.attempt(lambda wandb_run: results.log_classes(wandb_run, run), "its table of classes")
        logger.attempt(lambda wandb_run: results.log_confusion(wandb_run, run), "its confusion matrix")
        # Last, because online wandb asks the server for permission and waits for the answer.
        if logger.log_students:
            teacher = None if module.teacher is None else cfg.model.teacher
            logger.attempt(lambda wandb_run: results.log_models(wandb_run, run, teacher), "its artifacts")
        succeeded = True
    finally:
        logger.finish(succeeded)


def wandb_facts(folder: Path) -> dict[str, str]:
    """Returns what a run directory's weights record of their W&B run: the artifact's name; empty without one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return {results.ARTIFACT: read_json(folder / WANDB_RUN)[results.ARTIFACT]}
    return {}


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _sweep_keys(run: "Run") -> tuple[str, ...]:
    """Keys set by a sweep agent; wandb would refuse to change them, with a warning each."""
    return tuple(run.config.keys()) if run.sweep_id else ()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
