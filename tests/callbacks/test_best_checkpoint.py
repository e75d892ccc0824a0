"""The best epoch of a run that goes on in another folder."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rld_lightning.callbacks import BestCheckpoint


@pytest.mark.parametrize("file_is_there", [True, False])
def test_the_best_epoch_moves_with_its_score(tmp_path, file_is_there):
    options = {"filename": "best", "monitor": "val/top1", "mode": "max"}
    before = BestCheckpoint(tmp_path / "before", **options)
    path = tmp_path / "before" / "best.ckpt"
    path.parent.mkdir()
    if file_is_there:
        path.write_bytes(b"weights")
    before.best_model_path = before.kth_best_model_path = str(path)
    before.best_model_score = before.kth_value = torch.tensor(97.5)
    before.best_k_models = {str(path): torch.tensor(97.5)}
    after = BestCheckpoint(tmp_path / "after", **options)
    after.load_state_dict(before.state_dict())
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert after.check_monitor_top_k(trainer, torch.tensor(97.2)) is not file_is_there
    assert after.check_monitor_top_k(trainer, torch.tensor(97.6))
    assert after.state_key == ModelCheckpoint(**options).state_key  # of runs that Lightning's own has watched
    if file_is_there:
        assert after.best_model_path == str(tmp_path / "after" / "best.ckpt")
        assert (tmp_path / "after" / "best.ckpt").read_bytes() == b"weights"
