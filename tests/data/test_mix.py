"""Mixup and CutMix, compared with torchvision's."""

import numpy as np
import pytest
import torch
from helpers.data import epoch_of, ready, same
from torchvision.transforms import v2

from rld_lightning.data import Batch, DigitsDataModule
from rld_lightning.data.loader import mixed
from rld_lightning.data.mix import Mix, mix_images


def batch(size=6, height=8, width=6, channels_last=True):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.rand(size, 3, height, width).contiguous(memory_format=layout)
    return Batch(images, torch.arange(size), torch.arange(size), images.flip(3), torch.arange(size))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0)])
def test_images_and_labels_equal_torchvisions_for_the_same_draw(monkeypatch, mixup, cutmix):
    one = batch()
    mix = Mix(mixup, cutmix, seed=3)
    for step in range(8):
        draw = mix.draw(0, step, 8, 6)
        theirs = (v2.CutMix if cutmix else v2.MixUp)(num_classes=6)
        params = {"lam": draw.share, "lam_adjusted": draw.share}
        if cutmix:
            top, bottom, left, right = draw.box
            params["box"] = (left, top, right, bottom)
        images, labels = (
            theirs.transform(x, params | {"labels": one.label, "batch_size": 6}) for x in (one.images, one.label)
        )
        ours = mixed(one, draw)
        torch.testing.assert_close(ours.images, images)
        torch.testing.assert_close(ours.strong, mix_images(one.strong, draw))
        first, second = (torch.nn.functional.one_hot(x, 6) for x in (ours.label, ours.other.label))
        torch.testing.assert_close(
            ours.other.share * first + (1 - ours.other.share) * second, labels, check_dtype=False
        )
        assert ours.images.is_contiguous(memory_format=torch.channels_last)
        assert ours.view is None


def test_shares_follow_beta_and_boxes_have_the_stated_area():
    shares = np.array([Mix(0.4, 0, 0).draw(1, step, 32, 32).share for step in range(2000)])
    assert abs(shares.mean() - 0.5) < 0.03
    assert abs(shares.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01  # of Beta(a, a)
    draws = [Mix(0, 1, 0).draw(1, step, 32, 48) for step in range(300)]
    for draw in draws:
        top, bottom, left, right = draw.box
        assert 0 <= top <= bottom <= 32
        assert 0 <= left <= right <= 48
        assert draw.share == 1 - (bottom - top) * (right - left) / (32 * 48)
    boxes = [Mix(1, 1, 0).draw(0, step, 8, 8).box is not None for step in range(400)]
    assert 160 < sum(boxes) < 240


def test_mixing_is_a_function_of_seed_epoch_and_step():
    data = ready(DigitsDataModule(batch_size=500, mixup=1.0, cutmix=1.0))
    first, again = (epoch_of(data.train_dataloader(), epoch=2) for _ in range(2))
    assert all(
        a.other.share == b.other.share and torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True)
    )
    resumed = data.train_dataloader()
    resumed.load_state_dict({"epoch": 2, "batch": 1})
    assert [b.other.share for b in resumed] == [b.other.share for b in first[1:]]
    assert len({b.other.share for b in first + epoch_of(data.train_dataloader(), epoch=3)}) == 6
    plain = ready(DigitsDataModule(batch_size=500))
    assert same([b[:3] for b in epoch_of(data.val_dataloader())], [b[:3] for b in epoch_of(plain.val_dataloader())])
    assert data.train_views is None


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_values_out_of_range(option):
    with pytest.raises(ValueError, match=f"{option}=-1 must be 0"):
        DigitsDataModule(**{option: -1})
