"""Restricts which files a resumed run accepts as its own earlier checkpoints."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from rld_lightning.atomic_files import write_whole
from rld_lightning.trainer_callbacks import callbacks_of


class OwnCheckpoints(Callback):
    """Restricts each ``ModelCheckpoint`` of a resumed run to files of its own directory.

    Lightning trusts the paths in a checkpoint and deletes these files once a better epoch comes, so that an untrusted
    ``last.ckpt`` could name any path. Here, only the scores and file names in a checkpoint count: a file is accepted if
    the callback itself would give it this name and it is in the callback's directory, or next to the checkpoint from
    which the run resumes. From there the scored files are copied, so that the best epoch stays the best in a run that
    is resumed in another directory. All other paths are dropped and never touched.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rewrites the callbacks' states before Lightning restores them, the same on all ranks."""
        states, source = checkpoint["callbacks"], Path(str(trainer.ckpt_path)).parent
        for callback in callbacks_of(trainer, ModelCheckpoint):
            if callback.state_key in states:
                state = states[callback.state_key]
                plain = state if isinstance(state, Mapping) else {}
                known = _restricted_state(callback, plain, source) if trainer.is_global_zero else None
                states[callback.state_key] = trainer.strategy.broadcast(known)


def _restricted_state(callback: ModelCheckpoint, state: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Returns a ``ModelCheckpoint``'s state restricted to its own files."""
    folder = Path(str(callback.dirpath))
    scores = {
        str(folder / name): score
        for name, score in _scores(callback, state).items()
        if _copy_if_missing(source / name, folder / name) or _is_file(folder / name)
    }
    best_first = sorted(scores, key=lambda path: float(scores[path]), reverse=callback.mode == "max")
    if callback.save_top_k > 0:
        best_first = best_first[: callback.save_top_k]
    known: dict[str, Any] = {"dirpath": callback.dirpath, "best_model_score": None, "best_k_models": {}}
    if callback.monitor is None:  # the latest file, without a score
        known["best_model_path"] = _own_path(folder, state.get("best_model_path"), callback.filename)
    elif best_first:
        best, worst = best_first[0], best_first[-1]
        known |= {"best_model_path": best, "best_model_score": scores[best], "kth_value": scores[worst]}
        known |= {"kth_best_model_path": worst, "best_k_models": {path: scores[path] for path in best_first}}
    else:
        known["best_model_path"] = ""
    return known | {"last_model_path": _own_path(folder, state.get("last_model_path"), callback.CHECKPOINT_NAME_LAST)}


def _scores(callback: ModelCheckpoint, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the scores by file name, for names that the callback would give."""
    found = state.get("best_k_models")
    return {
        Path(path).name: score
        for path, score in (found if isinstance(found, Mapping) else {}).items()
        if isinstance(path, str)
        and _is_named(Path(path).name, callback.filename)
        and isinstance(score, Tensor)
        and score.numel() == 1
    }


def _own_path(folder: Path, path: object, template: str | None) -> str:
    """Returns the path of a file in a directory; empty if it is missing or its name does not match the template."""
    file = folder / Path(path if isinstance(path, str) else "").name
    return str(file) if _is_named(file.name, template) and _is_file(file) else ""


def _is_named(name: str, template: str | None) -> bool:
    """Whether Lightning would give this name: ``best.ckpt`` from ``best``, ``epoch=3-v1.ckpt`` from ``{epoch}``."""
    parts = map(re.escape, re.split(r"\{[^}]*\}", template or "{epoch}-{step}"))
    return re.fullmatch(rf"{'.+'.join(parts)}(-v\d+)?\.ckpt", name) is not None


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()  # a link may point anywhere


def _copy_if_missing(source: Path, target: Path) -> bool:
    """Copies a file, unless it is already in place; returns whether it was copied."""
    if source.parent.resolve() == target.parent.resolve() or not _is_file(source):
        return False
    write_whole(target, source.read_bytes())
    return True
