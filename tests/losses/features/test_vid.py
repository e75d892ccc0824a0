import pytest
import torch
from helpers.feature_tester import FeatureTester
from torch.distributions import Normal
from torch.testing import assert_close

from rld_lightning.losses.features import VIDLoss, vid_loss


class TestVID(FeatureTester):
    module = VIDLoss
    settings = ({}, {"weight": 3.0, "init_variance": 0.5})
    wrong = (
        ({"weight": -1.0}, "weight=-1.0"),
        ({"init_variance": 0.0}, "init_variance=0.0"),
        ({"init_variance": 1e-6}, "init_variance=1e-06"),
    )
    golden_method = "vid"

    def golden(self, case, tensors):
        student, teacher = tensors["student_feats"], tensors["teacher_feats"]
        loss = VIDLoss(weight=case.hyper["feat_weight"], init_variance=case.hyper["init_pred_var"])
        loss.build([one.shape for one in student], [one.shape for one in teacher])
        if "initialised" in case.what:
            assert_close(list(loss.log_scales), [one.float() for one in tensors["log_scale"]], rtol=1e-6, atol=0)
        weights = {f"regressors.{name}": weight for name, weight in tensors["connector"].items()}
        weights |= {f"log_scales.{i}": log_scale for i, log_scale in enumerate(tensors["log_scale"])}
        loss.to(student[0].dtype).load_state_dict(weights)
        mean, observed = loss.align(student, teacher)
        stages = [
            vid_loss([m], [t], [v], weight=loss.weight)["vid"]
            for m, t, v in zip(mean, observed, loss.variances(), strict=True)
        ]
        assert_close(loss.feature_terms(mean, observed, step=None)["vid"], sum(stages))
        return {f"stage{i}": stage for i, stage in enumerate(stages, start=1)}


def maps():
    generator = torch.Generator().manual_seed(0)
    mean, teacher = torch.randn(2, 3, 4, 2, 5, generator=generator, dtype=torch.float64)
    return mean, teacher, torch.tensor([0.1, 1.0, 2.0, 30.0], dtype=torch.float64)


def test_gaussian_likelihood():
    mean, teacher, variance = maps()
    density = Normal(mean, variance.sqrt().reshape(1, 4, 1, 1)).log_prob(teacher)
    constant = torch.tensor(2 * torch.pi, dtype=torch.float64).log() / 2
    assert_close(vid_loss([mean], [teacher], [variance], weight=3.0)["vid"], 3 * (-density.mean() - constant))
    two = vid_loss([mean, mean[:, :1]], [teacher, teacher[:, :1]], [variance, variance[:1]])["vid"]
    parts = vid_loss([mean], [teacher], [variance])["vid"], vid_loss([mean[:, :1]], [teacher[:, :1]], [variance[:1]])
    assert_close(two, parts[0] + parts[1]["vid"])


def test_gradcheck():
    mean, teacher, variance = maps()
    mean.requires_grad_()
    variance.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: vid_loss([m], [teacher], [v])["vid"], (mean, variance))


def test_optimal_variance_is_the_mean_squared_error():
    mean, teacher, _ = maps()
    variance = (mean - teacher).square().mean((0, 2, 3)).requires_grad_()
    vid_loss([mean], [teacher], [variance])["vid"].backward()
    assert_close(variance.grad, torch.zeros_like(variance), rtol=0, atol=1e-12)


@pytest.mark.parametrize("init_variance", [2e-5, 0.5, 5.0, 50.0])
def test_variance_starts_at_init_variance_and_is_learned(init_variance):
    loss = VIDLoss(init_variance=init_variance)
    loss.build([torch.Size((2, 3, 4, 4))], [torch.Size((2, 5, 4, 4))])
    assert_close(loss.variances()[0].detach(), torch.full((5,), init_variance), rtol=1e-5, atol=0)
    assert [name for name, _ in loss.named_parameters() if "log_scales" in name] == ["log_scales.0"]

    before = loss.log_scales[0].detach().clone()
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    aligned = loss.align([torch.ones(2, 3, 4, 4)], [torch.ones(2, 5, 4, 4)])
    loss.feature_terms(*aligned, step=None)["vid"].backward()
    optimizer.step()
    assert (loss.log_scales[0] != before).all()


def test_different_shapes_raise():
    mean, teacher, variance = maps()
    with pytest.raises(ValueError, match="same shape"):
        vid_loss([mean], [teacher[:, :3]], [variance])
