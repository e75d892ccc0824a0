"""The best epoch's weights, also of a run that has moved."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from rld_lightning.distributed import rank_zero_only


class BestCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` of one file that stays the best when a run goes on in another folder.

    Lightning's forgets the best score there, so that whatever epoch comes next is the best one.
    """

    @property
    def state_key(self) -> str:
        """As Lightning's own, whose state it takes over."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Brings the file along, and with it what is known of it; without the file the search begins anew."""
        before = Path(state_dict["best_model_path"])
        if state_dict["dirpath"] != self.dirpath and before.is_file():
            here = Path(self.dirpath) / before.name
            _copy(before, here)
            path, score = str(here), state_dict["best_model_score"]
            state_dict = state_dict | {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            state_dict["best_k_models"] = {path: score}
        super().load_state_dict(state_dict)


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
