import torch
from helpers.feature_tester import FeatureTester
from torch.testing import assert_close

from rld_lightning.losses.features import ATLoss, at_loss


class TestAT(FeatureTester):
    module = ATLoss
    settings = ({}, {"weight": 10.0, "power": 1.0})
    wrong = (({"weight": -1.0}, "weight=-1.0"), ({"power": 0.0}, "power=0.0"))
    golden_method = "at"

    def golden(self, case, tensors):
        weight, power = case.hyper["feat_weight"], case.hyper["p"]
        terms = at_loss(tensors["student_feats"], tensors["teacher_feats"], weight=weight, power=power)
        return {"feature": terms["at"]}


def test_only_where_a_network_looks_counts_not_how_strongly():
    student, teacher = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    expected = at_loss([student], [teacher])
    assert_close(at_loss([7 * student], [0.1 * teacher]), expected)
    assert_close(at_loss([student.roll(1, 1)], [-teacher]), expected)
