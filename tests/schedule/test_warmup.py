"""Schedules with warm-up, compared with those composed of PyTorch's."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from rld_lightning.schedule import WarmupCosine, WarmupMultiStep


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
