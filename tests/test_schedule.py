"""Schedules with warm-up, compared with those composed of PyTorch's, and runs resumed with another rate."""

from functools import partial

import pytest
import torch
from helpers.training import job, quiet_trainer
from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from rld_lightning.data import DigitsDataModule
from rld_lightning.schedule import WarmupCosine, WarmupMultiStep, remember_first_rates, rescale


def rates(make, steps=40):
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.3}], lr=0.1)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return torch.tensor(found), scheduler


def test_warmup_cosine_equals_pytorchs_linear_and_cosine_in_sequence():
    def parts(optimizer):
        rise = LinearLR(optimizer, start_factor=1 / 8, total_iters=7)
        return SequentialLR(optimizer, [rise, CosineAnnealingLR(optimizer, T_max=32)], milestones=[8])

    ours, _ = rates(lambda optimizer: WarmupCosine(optimizer, 40, warmup=0.2))
    torch.testing.assert_close(ours, rates(parts)[0])


def test_it_ends_at_the_final_rate_and_resumes_from_its_state():
    whole, _ = rates(lambda optimizer: WarmupCosine(optimizer, 20, warmup=0, final=0.1), steps=22)
    torch.testing.assert_close(whole[-1], torch.tensor([0.01, 0.03]))
    torch.testing.assert_close(whole[0], torch.tensor([0.1, 0.3]))
    _, half = rates(lambda optimizer: WarmupCosine(optimizer, 20, warmup=0, final=0.1), steps=10)

    def resumed(optimizer):
        scheduler = WarmupCosine(optimizer, 20, warmup=0, final=0.1)
        scheduler.load_state_dict(half.state_dict())
        for group, rate in zip(optimizer.param_groups, half.get_last_lr(), strict=True):
            group["lr"] = rate
        return scheduler

    torch.testing.assert_close(rates(resumed, steps=10)[0], whole[10:20])
    assert half.state_dict()["total_steps"] == 20  # read when a run resumes with another length


def test_warmup_multistep_equals_pytorchs():
    plain, _ = rates(lambda optimizer: MultiStepLR(optimizer, [15, 18, 21], 0.1), steps=24)
    ours, _ = rates(lambda optimizer: WarmupMultiStep(optimizer, [15, 18, 21], 0.1, warmup=8), steps=24)
    rise = (torch.arange(1, 25) / 8).clamp(max=1)[:, None]
    torch.testing.assert_close(ours, plain * rise)
    for wrong in ({"warmup": 0}, {"milestones": [3, 2]}):
        with pytest.raises(ValueError, match="of the schedule must"):
            WarmupMultiStep(torch.optim.SGD([torch.zeros(1)], lr=1), **{"milestones": [2]} | wrong)


@pytest.mark.parametrize("options", [{"total_steps": None}, {"total_steps": 0}, {"warmup": 1.0}, {"final": 2.0}])
def test_values_out_of_range(options):
    with pytest.raises(ValueError, match="of the schedule"):
        WarmupCosine(torch.optim.SGD([torch.zeros(1)], lr=1), **{"total_steps": 4} | options)


def warm_up_then_cosine(optimizer):
    return SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=4), CosineAnnealingLR(optimizer, 10)], milestones=[4]
    )


def plateau(optimizer):
    scheduler = ReduceLROnPlateau(optimizer, patience=1)
    scheduler.step = partial(scheduler.step, 1.0)
    return scheduler


SCHEDULES = {
    "steps": partial(MultiStepLR, milestones=[3, 9]),
    "cosine": partial(CosineAnnealingLR, T_max=14),
    "restarts": partial(CosineAnnealingWarmRestarts, T_0=5),
    "sequence": warm_up_then_cosine,
    "plateau": plateau,
}


def begin(rate, schedule):
    optimizer = SGD(
        [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 3 * rate}],
        lr=rate,
        momentum=0.9,
    )
    scheduler = (
        OneCycleLR(optimizer, [rate, 3 * rate], total_steps=15)
        if schedule == "cycle"
        else SCHEDULES[schedule](optimizer)
    )
    return optimizer, scheduler, remember_first_rates(optimizer)


def go_on(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        rates += [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["cycle", *SCHEDULES])
@pytest.mark.parametrize("steps", [0, 2, 6])
def test_rates_equal_those_of_a_run_started_with_the_new_one(schedule, steps):
    optimizer, scheduler, _ = begin(0.1, schedule)
    go_on(optimizer, scheduler, steps)
    again, restored, rates = begin(0.02, schedule)
    again.load_state_dict(optimizer.state_dict())
    step = restored.step
    restored.load_state_dict({k: v for k, v in scheduler.state_dict().items() if k != "step"})
    restored.step = step
    rescale(again, [restored], rates)

    other, schedule_of_other, _ = begin(0.02, schedule)
    go_on(other, schedule_of_other, steps)
    assert go_on(again, restored, 14 - steps) == pytest.approx(go_on(other, schedule_of_other, 14 - steps), rel=1e-12)


def test_the_same_rate_changes_nothing():
    optimizer, scheduler, rates = begin(0.1, "cosine")
    go_on(optimizer, scheduler, 3)
    before = [dict(group) for group in optimizer.param_groups]
    rescale(optimizer, [scheduler], rates)
    assert [dict(group) for group in optimizer.param_groups] == before


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("scheduler", [None, partial(MultiStepLR, milestones=[1])])
def test_a_run_resumes_with_the_given_rate(tmp_path, scheduler):
    def begin_or_go_on(*callbacks, rate, **options):
        trainer = quiet_trainer(*callbacks, max_epochs=2 if callbacks else 1)
        trainer.fit(job(lr=rate, momentum=0.9, scheduler=scheduler), DigitsDataModule(batch_size=128), **options)
        return trainer

    begin_or_go_on(rate=0.1).save_checkpoint(tmp_path / "last.ckpt")
    begin_or_go_on(rates := Rates(), rate=0.01, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert rates.seen == [pytest.approx(0.01 if scheduler is None else 0.001)] * 12
