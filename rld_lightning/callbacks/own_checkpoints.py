"""Which files a run that goes on takes for its own earlier checkpoints."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from rld_lightning.atomic_files import write_whole
from rld_lightning.watching import callbacks_of


class OwnCheckpoints(Callback):
    """Keeps each ``ModelCheckpoint`` of a run that goes on to files of its own folder.

    Lightning takes the paths in a checkpoint as they are and deletes what lies there once a better epoch comes, so that
    somebody else's ``last.ckpt`` could name any folder. Of what a checkpoint says about files, only scores and names
    count here: a file is known if the callback itself would call it so and it lies in the callback's folder, or beside
    the checkpoint that the run goes on from. From there the scored ones are brought along, so that the best epoch stays
    the best in a run that goes on in another folder. Whatever else is named is forgotten, and never touched.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rewrites the states before Lightning hands them out, the same in all processes."""
        states, source = checkpoint["callbacks"], Path(str(trainer.ckpt_path)).parent
        for callback in callbacks_of(trainer, ModelCheckpoint):
            if callback.state_key in states:
                state = states[callback.state_key]
                plain = state if isinstance(state, Mapping) else {}
                known = _known(callback, plain, source) if trainer.is_global_zero else None
                states[callback.state_key] = trainer.strategy.broadcast(known)


def _known(callback: ModelCheckpoint, state: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The state of a ``ModelCheckpoint``, with its own files alone."""
    folder = Path(str(callback.dirpath))
    scores = {
        str(folder / name): score
        for name, score in _scores(callback, state).items()
        if _bring(source / name, folder / name) or _is_file(folder / name)
    }
    best_first = sorted(scores, key=lambda path: float(scores[path]), reverse=callback.mode == "max")
    if callback.save_top_k > 0:
        best_first = best_first[: callback.save_top_k]
    known: dict[str, Any] = {"dirpath": callback.dirpath, "best_model_score": None, "best_k_models": {}}
    if callback.monitor is None:  # the latest file, with no score
        known["best_model_path"] = _own(folder, state.get("best_model_path"), callback.filename)
    elif best_first:
        best, worst = best_first[0], best_first[-1]
        known |= {"best_model_path": best, "best_model_score": scores[best], "kth_value": scores[worst]}
        known |= {"kth_best_model_path": worst, "best_k_models": {path: scores[path] for path in best_first}}
    else:
        known["best_model_path"] = ""
    return known | {"last_model_path": _own(folder, state.get("last_model_path"), callback.CHECKPOINT_NAME_LAST)}


def _scores(callback: ModelCheckpoint, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The scores of files, by those of their names that the callback would give."""
    found = state.get("best_k_models")
    return {
        Path(path).name: score
        for path, score in (found if isinstance(found, Mapping) else {}).items()
        if isinstance(path, str)
        and _is_named(Path(path).name, callback.filename)
        and isinstance(score, Tensor)
        and score.numel() == 1
    }


def _own(folder: Path, path: object, template: str | None) -> str:
    """Where a file lies in a folder; empty if it does not, or if it is not one of a callback with this template."""
    file = folder / Path(path if isinstance(path, str) else "").name
    return str(file) if _is_named(file.name, template) and _is_file(file) else ""


def _is_named(name: str, template: str | None) -> bool:
    """Whether Lightning would call a file so: ``best.ckpt`` after ``best``, ``epoch=3-v1.ckpt`` after ``{epoch}``."""
    parts = map(re.escape, re.split(r"\{[^}]*\}", template or "{epoch}-{step}"))
    return re.fullmatch(rf"{'.+'.join(parts)}(-v\d+)?\.ckpt", name) is not None


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()  # a link may lead anywhere


def _bring(source: Path, target: Path) -> bool:
    """Copies a file, unless it is in its place already; returns whether it has."""
    if source.parent.resolve() == target.parent.resolve() or not _is_file(source):
        return False
    write_whole(target, source.read_bytes())
    return True
