"""Checks before training that a checkpoint is one that this run could have written.

A file may be of another program or version, or altered by hand. A resumed run knows what it would write itself: which
entries, of which types and shapes, and finite. Also, a checkpoint contains its progress in several places: these must
agree with each other, and with the run's batches.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import ceil, isclose, isfinite, isinf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rld_lightning.errors import UserError, printable
from rld_lightning.runs.checkpoint import previous_of, read_record
from rld_lightning.runs.settings import only_monitors

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# Settings that determine learning rates, which a resumed run may change.
RATES = ("recipe.optimizer.lr", "recipe.scheduler.max_lr")
# Options of a parameter group that neither a schedule nor another learning rate changes; and those of some schedules.
_FIXED = ("weight_decay", "dampening", "nesterov", "eps", "amsgrad", "maximize", "differentiable")
_CYCLED = ("momentum", "betas")
_OURS = "rld_lightning."  # modules of callbacks whose states are counts and durations
_WITH_STATE = "parameters_with_state"
_MISSING = object()
_MOST_SHOWN = 60  # characters
_LARGEST = 1 << 63  # exclusive bound of whole numbers


class _Unlike(Exception):
    """An entry that the run would not have written; the text names it, its value, and the expected one."""


@contextmanager
def _refused(path: object) -> Iterator[None]:
    """Turns an unexpected entry into an error message with a way out."""
    try:
        yield
    except _Unlike as error:
        before = previous_of(Path(str(path)))
        way_out = f"resume from {before}, the one before it, or " if before.is_file() else ""
        raise UserError(
            f"{path} is not as this run would have written it: {error}. It, or the data, have been changed since; "
            f"{way_out}start a new run in another folder."
        ) from error


def refuse_other_contents(checkpoint: Mapping[str, Any], trainer: "Trainer", module: "LightningModule") -> None:
    """Refuses a checkpoint whose entries for networks and callbacks do not fit this run.

    Args:
        module: the run's module, before the checkpoint is loaded.

    Raises:
        UserError: an entry is missing, of another type or shape, or not finite; the message names it.
    """
    own: dict[str, Any] = {"global_step": 0, "state_dict": module.state_dict(), "callbacks": {}}
    module.on_save_checkpoint(own)
    if "current_model_state" in checkpoint:
        own["current_model_state"] = own["state_dict"]
    with _refused(trainer.ckpt_path):
        _match(checkpoint, own, "")
        for key in ("state_dict", "current_model_state"):
            for name in checkpoint.get(key, ()):
                if name not in own["state_dict"] and module.strict_loading:
                    raise _Unlike(f"{key}.{_shown(name)} is there, and this run has no such weights")
        states = checkpoint["callbacks"]
        for callback in vars(trainer)["callbacks"]:
            if callback.state_key in states or not only_monitors(type(callback)):  # one that only monitors may be new
                where, counts = f"callbacks.{callback.state_key}", type(callback).__module__.startswith(_OURS)
                _match(states.get(callback.state_key, {}), callback.state_dict(), where, positive=counts)
        if not (isinf(best := checkpoint.get("best_top1", 0.0)) or 0 <= best <= 100):
            raise _Unlike(f"best_top1 is {_shown(best)}, and has to be a percentage")
        name = type(getattr(trainer, "datamodule", None)).__qualname__
        if checkpoint.get(name):  # checked here, since data loaders use it when they are created
            _match(checkpoint[name], {"epoch": 0, "batch": 0}, name, positive=True)
        hparams = checkpoint.get("hyper_parameters")
        for name, value in module.hparams.items():  # the student's name was checked earlier, with all its spellings
            if name != "student" and isinstance(hparams, Mapping) and hparams.get(name, value) != value:
                raise _Unlike(f"hyper_parameters.{name} is {_shown(hparams[name])}, and has to be {_shown(value)}")


def refuse_other_averages(checkpoint: Mapping[str, Any], trainer: "Trainer", own: Mapping[str, Any]) -> None:
    """Like :func:`refuse_other_contents`, for averaged weights, which a checkpoint from before averaging lacks.

    Args:
        own: what the run would write in addition to the weights.
    """
    with _refused(trainer.ckpt_path):
        _match(checkpoint, own, "", positive=True)


def count_states(checkpoint: dict[str, Any]) -> None:
    """Adds to a checkpoint for how many parameters each optimizer has state: not for those without a gradient."""
    checkpoint[_WITH_STATE] = _with_state(checkpoint)


def refuse_other_progress(
    checkpoint: Mapping[str, Any], trainer: "Trainer", settings: Mapping[str, str] | None = None
) -> None:
    """Refuses a checkpoint whose optimizer, schedule or progress do not fit this run at that position.

    Args:
        trainer: the run's, with a new optimizer and schedule.
        settings: the run's, as its checkpoints record them; if they contain its learning rate, the same is expected.

    Raises:
        UserError: an entry is not what this run would have written; the message names it.
    """
    if trainer.strategy.restore_checkpoint_after_setup:  # if each process has a part of the states
        return
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    fixed = (*_FIXED, *(() if any(schedule.get("cycle_momentum") for schedule in schedules) else _CYCLED))
    with _refused(trainer.ckpt_path):
        _match(checkpoint, {"loops": {"fit_loop": trainer.fit_loop.state_dict()}}, "", positive=True)
        groups = [{"param_groups": optimizer.state_dict()["param_groups"]} for optimizer in trainer.optimizers]
        _match(checkpoint, {"optimizer_states": groups, "lr_schedulers": schedules}, "", positive=True)
        for where, value, expected in _counts(checkpoint, trainer):
            if value not in expected:
                known = f"at most {expected[-1]}" if isinstance(expected, range) else f"{expected[0]}"
                raise _Unlike(f"{where} is {_shown(value)}, and has to be {known} by its other counts")
        for n, optimizer in enumerate(trainer.optimizers):
            found = checkpoint["optimizer_states"][n]
            _check_groups(found["param_groups"], groups[n]["param_groups"], fixed, f"optimizer_states[{n}]")
            _check_state(found, optimizer, f"optimizer_states[{n}].state", begun=checkpoint["global_step"] > 0)
        there = _with_state(checkpoint)
        _match(known := checkpoint.get(_WITH_STATE, there), there, _WITH_STATE)
        if known != there:
            raise _Unlike(f"optimizer_states have {there} entries, and had {known} when they were written")
        before = {} if settings is None else read_record(checkpoint, Path(str(trainer.ckpt_path))).settings
        same = settings is not None and all(settings.get(key) == before.get(key) for key in RATES)
        _check_first_rates(checkpoint, groups, schedules, same=same)
        if not any(map(_may_set_rates, vars(trainer)["callbacks"])):
            _check_last_rates(checkpoint, groups, schedules)


def _match(found: Any, own: Any, where: str, *, positive: bool = False) -> None:
    """Compares an entry with that of a new run, as far as it is determined.

    Args:
        own: what the run would write.
        positive: whether numbers must not be negative, and lists must have the same length.

    Raises:
        _Unlike: it is missing, of another type or shape, or not finite where the run's own is.
    """
    match own:
        case Mapping():
            expected, is_like = "a dictionary", isinstance(found, Mapping)
        case Tensor():
            kind = "fractions" if own.is_floating_point() else "whole numbers"
            finite = bool(own.is_meta or own.isfinite().all())
            expected = f"{'finite ' * finite}{kind} of shape {tuple(own.shape)}"
            is_like = isinstance(found, Tensor) and found.shape == own.shape
            is_like = is_like and found.is_floating_point() == own.is_floating_point()
            is_like = is_like and bool(found.isfinite().all() if finite else not found.isnan().any())
            is_like = is_like and not (positive and not own.is_floating_point() and bool((found < 0).any()))
        case bool() | str():
            expected, is_like = "true or false" if isinstance(own, bool) else "a text", type(found) is type(own)
        case int() | float():
            expected = "a number, 0 or more" if positive else "a number"
            is_like = _is_number(found) and not isnan(found)
            is_like = is_like and (isfinite(found) or not isfinite(own)) and not (positive and found < 0 <= own)
        case list() | tuple():
            any_length = not own or (isinstance(own[0], Mapping) and not positive)  # one entry per process
            expected = "a list" if any_length else f"a list of {len(own)}"
            is_like = isinstance(found, list | tuple) and (bool(found) or not own)
            is_like = is_like and (any_length or len(found) == len(own))
        case _:
            return
    if not is_like:
        raise _Unlike(f"{where} is {_shown(found)}, and has to be {expected}")
    if isinstance(own, Mapping):
        for key, value in own.items():
            if key in found or not (value is None or isinstance(value, bool)):  # versions add flags
                _match(found.get(key, _MISSING), value, f"{where}.{key}".lstrip("."), positive=positive)
    elif isinstance(own, list | tuple) and own:
        for n, value in enumerate(found):
            _match(value, own[min(n, len(own) - 1)], f"{where}[{n}]", positive=positive)


def _is_number(found: Any) -> bool:
    """Whether it is a number, and no whole number that a float cannot hold."""
    return isinstance(found, float) or (type(found) is int and abs(found) < _LARGEST)


def _check_groups(found: Any, own: Any, fixed: tuple[str, ...], where: str) -> None:
    """Compares the options of parameter groups, of whose numbers only rates may differ."""
    for n, (group, known) in enumerate(zip(found, own, strict=True)):
        for name in ("params", *fixed):
            value, expected = group.get(name), known.get(name)
            if name in known and (list(value) if isinstance(value, tuple | list) else value) != (
                list(expected) if isinstance(expected, tuple | list) else expected
            ):
                raise _Unlike(f"{where}.param_groups[{n}].{name} is {_shown(value)}, and has to be {_shown(expected)}")


def _check_state(found: Any, optimizer: Optimizer, where: str, *, begun: bool) -> None:
    """Compares an optimizer's state of each parameter; a parameter without a gradient has none."""
    state, parameters = found.get("state"), [p for group in optimizer.param_groups for p in group["params"]]
    _match(state, {}, where)
    own = _after_a_step(optimizer, parameters)
    if begun and any(own) and not state:
        raise _Unlike(f"{where} is empty, and has to have what {type(optimizer).__name__} remembers of its steps")
    for n, values in state.items():
        if not (type(n) is int and 0 <= n < len(parameters)):
            raise _Unlike(f"{where} has an entry {_shown(n)}, and this run has {len(parameters)} parameters")
        _match(values, own[n] if own else {}, f"{where}.{n}")
        for name, value in values.items():
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                raise _Unlike(f"{where}.{n}.{_shown(name)} has to be finite, and is not")


def _with_state(checkpoint: Mapping[str, Any]) -> list[int]:
    return [len(state.get("state", ())) for state in checkpoint["optimizer_states"]]  # processes may have parts


def _check_first_rates(
    checkpoint: Mapping[str, Any], groups: Sequence[Any], schedules: Sequence[Any], *, same: bool
) -> None:
    """Compares initial learning rates: equal in an optimizer and its schedules, and equal to this run's if ``same``."""
    for n, own in enumerate(groups):
        place = f"optimizer_states[{n}].param_groups"
        before = [group.get("initial_lr") for group in checkpoint["optimizer_states"][n]["param_groups"]]
        usual = [group.get("initial_lr") for group in own["param_groups"]]
        if same and not _close(before, usual):
            raise _Unlike(f"{place} began with the learning rates {before}, and have to begin with {usual}")
        for found, schedule in zip(_each(checkpoint["lr_schedulers"]), _each(schedules), strict=True):
            if schedule.get("base_lrs") == usual and not _close(found["base_lrs"], before):
                raise _Unlike(f"base_lrs of lr_schedulers is {found['base_lrs']}, and {place} began with {before}")


def _may_set_rates(callback: object) -> bool:
    """Whether a callback may change learning rates: one of unknown code, or Lightning's that searches for one."""
    ours = type(callback).__module__.startswith((_OURS, "lightning."))
    return not ours or type(callback).__name__ == "LearningRateFinder"


def _check_last_rates(checkpoint: Mapping[str, Any], groups: Sequence[Any], schedules: Sequence[Any]) -> None:
    """Checks that each optimizer has the rates that its schedule last set; without a schedule, the initial ones."""
    for n, own in enumerate(groups):
        (rates, first), (new, first_of_new) = (
            [[group.get(name) for group in options["param_groups"]] for name in ("lr", "initial_lr")]
            for options in (checkpoint["optimizer_states"][n], own)
        )
        last = [found.get("_last_lr") for found in checkpoint["lr_schedulers"]] or [first]
        last_of_new = [schedule.get("_last_lr") for schedule in schedules] or [first_of_new]
        for found, schedule in zip(last, last_of_new, strict=True):
            if schedule == new and not _close(found, rates):
                place = f"optimizer_states[{n}].param_groups"
                raise _Unlike(f"{place} have the learning rates {rates}, and were last set to {found}")


def _each(schedules: Iterable[Any]) -> Iterator[Any]:
    """Yields the states of schedules, and of their parts."""
    for schedule in schedules:
        yield schedule
        yield from _each(schedule.get("_schedulers", ()))


def _close(rates: Any, others: Sequence[Any]) -> bool:
    return len(rates) == len(others) and all(
        one == other if None in (one, other) else isclose(one, other, rel_tol=1e-6)
        for one, other in zip(rates, others, strict=True)
    )


def _after_a_step(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Returns an optimizer's state of each parameter after one step, without memory; empty if it needs values."""
    if optimizer.state:  # created with the optimizer
        return [dict(optimizer.state.get(p, {})) for p in parameters]
    shadows = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters}
    try:
        other = deepcopy(optimizer, dict(shadows))
        for group in other.param_groups:
            group |= {way: None for way in ("foreach", "fused") if way in group}
        for shadow in shadows.values():
            shadow.grad = torch.empty_like(shadow)
        other.step()
    except Exception:  # each optimizer has its own exceptions for missing values
        return []
    return [dict(other.state.get(shadows[id(p)], {})) for p in parameters]


def _counts(checkpoint: Mapping[str, Any], trainer: "Trainer") -> Iterator[tuple[str, Any, Sequence[int]]]:
    """Yields a checkpoint's progress: where, the value, and its allowed values by the epochs and batches."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    data = getattr(trainer, "datamodule", None)
    if not hasattr(data, "train_sampler") or any(
        isinstance(callback, GradientAccumulationScheduler) for callback in vars(trainer)["callbacks"]
    ):
        return
    trainer.fit_loop.setup_data()
    batches, every = trainer.num_training_batches, trainer.accumulate_grad_batches
    if not isinstance(batches, int):  # the number of batches is unknown
        return
    loops = checkpoint["loops"]["fit_loop"]
    epoch, batch = (
        loops[part]["current"][count]
        for part, count in (("epoch_progress", "completed"), ("epoch_loop.batch_progress", "processed"))
    )
    yield "loops.fit_loop.epoch_loop.batch_progress.current.processed", batch, range(batches + 1)
    for part, total, begun, ended in (
        ("epoch_progress", epoch, epoch + (batch > 0), epoch),
        ("epoch_loop.batch_progress", epoch * batches + batch, batch, batch),
    ):
        for name, count in (("ready", begun), ("started", begun), ("processed", ended), ("completed", ended)):
            yield f"loops.fit_loop.{part}.current.{name}", loops[part]["current"][name], (count,)
            yield f"loops.fit_loop.{part}.total.{name}", loops[part]["total"][name], (count - ended + total,)
    per_epoch = ceil(batches / every)
    step = epoch * per_epoch + (per_epoch if batch == batches else batch // every)
    yield "global_step", checkpoint["global_step"], (step,)
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    yield "loops.fit_loop.epoch_loop.automatic_optimization", optimizer["total"]["completed"], (step,)
    # One less if a validation is due.
    yield "loops.fit_loop.epoch_loop", loops["epoch_loop.state_dict"]["_batches_that_stepped"], (step, step - 1)
    rows, rising = checkpoint.get("metrics", []), -1
    _match(rows, [], "metrics")
    for n, row in enumerate(rows):
        _match(row, {"epoch": 0}, f"metrics[{n}]", positive=True)
        if not (rising < row["epoch"] < epoch + (batch > 0)):
            raise _Unlike(f"metrics[{n}].epoch is {_shown(row['epoch'])}, and the run has begun {epoch + (batch > 0)}")
        rising = row["epoch"]
        for name, value in row.items():
            if not _is_number(value):
                raise _Unlike(f"metrics[{n}].{_shown(name)} is {_shown(value)}, and has to be a number")
    name = type(data).__qualname__
    place = checkpoint.get(name)
    if place:
        seen = place["epoch"] * batches + place["batch"]
        yield f"{name}'s number of batches", seen, (epoch * batches + batch,)
    for n, config in enumerate(trainer.lr_scheduler_configs):
        if not config.reduce_on_plateau and config.frequency == 1 and hasattr(config.scheduler, "last_epoch"):
            taken = step if config.interval == "step" else epoch + (batch == batches)
            yield f"lr_schedulers[{n}].last_epoch", checkpoint["lr_schedulers"][n]["last_epoch"], (taken,)


def _shown(value: Any) -> str:
    """Formats a value, possibly from an untrusted file, for a message."""
    if value is _MISSING:
        return "missing"
    if isinstance(value, Tensor):
        kind = "" if value.isfinite().all() else ", not all finite"
        return f"{'fractions' if value.is_floating_point() else 'whole numbers'} of shape {tuple(value.shape)}{kind}"
    if value is None or isinstance(value, bool | int | float | str):
        return printable(repr(value)[:_MOST_SHOWN])
    return f"a {type(value).__name__}"
