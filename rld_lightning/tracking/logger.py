"""A W&B run beside ``metrics.csv``, which never stops training, whatever the server does."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment, rank_zero_experiment
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_line
from rld_lightning.distributed import rank_zero_only
from rld_lightning.redact import redact, redact_command
from rld_lightning.tracking import results
from rld_lightning.tracking.server import server, trouble, wandb_mode

if TYPE_CHECKING:
    from wandb import Run

ID_FILE = "wandb_run.json"
STEP = "trainer/global_step"
_LONGEST_TAG = 64  # characters, as below
_LONGEST = {"name": 128, "group": 128, "job_type": 64}


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
        **options: see Lightning's logger and ``wandb.init``.
    """

    _experiment: "Run | None"

    def __init__(
        self,
        *,
        answer_timeout: float = 5.0,
        init_timeout: float = 15.0,
        finish_timeout: float = 60.0,
        save_dir: str | Path,
        artifact: str = "student",
        **options: Any,
    ) -> None:
        super().__init__(save_dir=save_dir, **options)
        self.folder = Path(save_dir)
        self.answer_timeout = answer_timeout
        self.init_timeout = init_timeout
        self.finish_timeout = finish_timeout
        self.artifact = results.plain_name(artifact)
        self.broken = False

    def continue_run(self, folder: Path) -> None:
        """Goes on with the W&B run of a run folder, if it has one; to be called before anything is logged."""
        with suppress(OSError, ValueError, KeyError):
            self._wandb_init["id"] = json.loads((folder / ID_FILE).read_text())["id"]

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
        run = self._start()
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        run.define_metric("val/top1", step_metric=STEP, step_sync=True, summary="max,last")
        if not run.disabled:
            known = {name: getattr(run, name) for name in ("id", "entity", "project")}
            known[results.ARTIFACT] = self.artifact
            (self.folder / ID_FILE).write_text(json.dumps(known, indent=2) + "\n")
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
            action: called with the run.
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
        self.attempt(lambda run: run.log(dict(metrics) | ({} if step is None else {STEP: step})))

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]  # never a Namespace
        """Adds to the run's configuration, without secrets; what a sweep has set stays."""
        self.attempt(lambda run: run.config.update(_without(redact(dict(params)), _swept(run)), allow_val_change=True))

    @rank_zero_only
    def finish(self, succeeded: bool) -> None:
        """Ends the W&B run, or the next one of this process would log into it, and says where it is."""
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
            print_line("wandb", f"does not end as it should: {_in_short(error)}")
            _tear_down()
        if run.offline or not complete:
            print_line("wandb", f"upload with: wandb sync {folder}")

    def _start(self) -> "Run":
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # print_line says it
        options = {name: value for name, value in self._wandb_init.items() if value is not None}
        options |= _within_limits(options)
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
                    with _shorter_requests(self.init_timeout), _hidden_arguments():
                        known = {"resume": resume} if "id" in options else {}
                        run = wandb.init(**options, **known)
                    print_line("wandb", run.url or "online")
                    return run
                except Exception as error:  # the server has changed its mind
                    problem = f"lets no run start ({type(error).__name__})"
                    _tear_down()  # its process would keep the id of the failed run
            print_line("wandb", f"offline, because {server()} {problem}")
            options["mode"] = "offline"
        with _hidden_arguments():
            return wandb.init(**options)


@contextmanager
def wandb_run(trainer: Trainer, cfg: DictConfig) -> Iterator[None]:
    """The W&B run of a run, if it logs to W&B: its configuration at the start, its results and its end at the end.

    Results are read from the run folder: tables and the student, see :mod:`~rld_lightning.tracking.results`. The
    student of a run that holds training images out is no result and becomes an artifact of its own, ``...-tuning``.

    Args:
        trainer: has the loggers.
        cfg: the run's configuration.
    """
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
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        logger.log_hyperparams(config)
        yield
        logger.attempt(lambda wandb_run: results.log_classes(wandb_run, run), "its table of classes")
        # Last, because online wandb asks the server whether it may, and waits for the answer.
        teacher = cfg.model.teacher if trainer.lightning_module.teacher is not None else None
        logger.attempt(lambda wandb_run: results.log_models(wandb_run, run, teacher), "its artifacts")
        succeeded = True
    finally:
        logger.finish(succeeded)


def wandb_facts(folder: Path) -> dict[str, str]:
    """What a run folder's weights say about the W&B run that they are from: the artifact's name; empty without one."""
    with suppress(OSError, ValueError, KeyError):
        return {results.ARTIFACT: json.loads((folder / ID_FILE).read_text())[results.ARTIFACT]}
    return {}


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _tear_down() -> None:
    """Ends wandb's process; the next run starts another one."""
    import wandb

    with suppress(Exception):  # which is what it raises where there is no process any more
        wandb.teardown()


def _swept(run: "Run") -> tuple[str, ...]:
    """What a sweep agent has set, which wandb would refuse to change, with a warning each."""
    return tuple(run.config.keys()) if run.sweep_id else ()


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _within_limits(options: Mapping[str, Any]) -> dict[str, Any]:
    """Names and tags as long as W&B takes them; a single tag may be written as such."""
    tags = options.get("tags") or ()
    texts = (str(tag).strip() for tag in ([tags] if isinstance(tags, str) else tags) if tag is not None)
    short = {name: str(options[name])[:longest] for name, longest in _LONGEST.items() if name in options}
    return {**short, "tags": [*dict.fromkeys(text[:_LONGEST_TAG] for text in texts if text)]}


@contextmanager
def _hidden_arguments() -> Iterator[None]:
    """wandb keeps the command line; this is what it sees of it."""
    before = sys.argv
    sys.argv = redact_command(before)
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _shorter_requests(seconds: float) -> Iterator[None]:
    """wandb verifies the key before its ``init_timeout`` begins, with a time-out of its own."""
    before = os.environ.get("WANDB_HTTP_TIMEOUT")
    os.environ["WANDB_HTTP_TIMEOUT"] = before or str(int(seconds))
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_HTTP_TIMEOUT"]
