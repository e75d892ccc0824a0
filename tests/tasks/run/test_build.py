"""Data are normalised as the student's weights want it."""

import torch

from rld_lightning.models.normalisation import Normalisation
from rld_lightning.tasks.run.build import adopt_normalisation
from rld_lightning.tasks.run.plan import Student

HALVES = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_data_get_the_normalisation_of_the_initial_weights(data, file, capsys):
    usual = Normalisation(data.mean, data.std)
    assert (
        adopt_normalisation(Student("resnet8", None, True), data, {"mean": None})
        == usual
        == Normalisation(data.mean, data.std)
    )
    student = Student("resnet8", str(file(mean=[0.5] * 3, std=[0.5] * 3)), True)
    assert adopt_normalisation(student, data, {"mean": list(data.mean)}) == usual == Normalisation(data.mean, data.std)
    assert "caution" in capsys.readouterr().out
    before = next(iter(data.val_dataloader())).images
    assert adopt_normalisation(student, data, {}) == usual
    assert Normalisation(data.mean, data.std) == HALVES
    pixels = before * usual.std[0] + usual.mean[0]
    torch.testing.assert_close(next(iter(data.train_dataloader())).images.min(), torch.tensor(-1.0))
    torch.testing.assert_close(next(iter(data.val_dataloader())).images, (pixels - 0.5) / 0.5)
