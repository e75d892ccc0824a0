"""Every loss against numbers of the reference implementations, see tests/golden/README.md.

To add a method with golden numbers, add a line to ``LOGIT_METHODS``.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.golden import golden_cases

from rld_lightning.losses import (
    DistillationLoss,
    DKDLoss,
    KDLoss,
    MLKDNoAugLoss,
    RCLoss,
    RevisionLoss,
    RLDLoss,
    SwapLoss,
    list_losses,
    loss_class,
)


@dataclass(frozen=True)
class LogitMethod:
    """How to call the loss of a golden logit method.

    Attributes:
        module: our class.
        terms: the golden name of each term, and ours.
        hyper: golden names of hyper-parameters, and ours if they differ; ``None`` for an option that ours lacks.
    """

    module: type[DistillationLoss]
    terms: dict[str, str]
    hyper: dict[str, str | None] = field(default_factory=dict)

    def build(self, hyper):
        assert not any(value for name, value in hyper.items() if self.hyper.get(name, name) is None)
        return self.module(**{self.hyper.get(k, k): v for k, v in hyper.items() if self.hyper.get(k, k) is not None})


LOGIT_METHODS = {
    "kd": LogitMethod(KDLoss, {"kd": "kd"}, {"kd_weight": "weight"}),
    "dkd": LogitMethod(DKDLoss, {"target_class": "tckd", "non_target_class": "nckd"}),
    "rld": LogitMethod(RLDLoss, {"sample_confidence": "scd", "masked_correlation": "mcd"}),
    "swap": LogitMethod(SwapLoss, {"kd_swapped": "swap"}),
    "rc": LogitMethod(RCLoss, {"kd": "kd", "rc": "rc"}),
    "revision": LogitMethod(
        RevisionLoss,
        {"right_cross_entropy": "right_ce", "right_mse": "right_mse", "wrong_mse": "wrong_mse"},
        {"lambda1": "right_mse_weight", "lambda2": "wrong_mse_weight", "logit_standardization": None},
    ),
    "mlkd_noaug": LogitMethod(
        MLKDNoAugLoss,
        {name: name for name in ("kd", "class_correlation", "batch_correlation")},
        {"kd_weight": "weight"},
    ),
}
# Run by the tests of each method, tests/losses/features/test_<method>.py.
FEATURE_METHODS = ("at", "nst", "sp", "rkd", "pkt", "fitnet", "vid", "ofd", "reviewkd", "crd", "kdsvd")

NUMBER_OF_CASES = {
    "kd": 28, "dkd": 28, "rld": 70, "swap": 28, "rc": 28, "mlkd_noaug": 28, "revision": 14, "at": 4, "nst": 3, "sp": 2,
    "rkd": 4, "pkt": 2, "fitnet": 4, "vid": 2, "ofd": 2, "reviewkd": 2, "crd": 1, "kdsvd": 1,
}  # fmt: skip

CASES = [case for method in LOGIT_METHODS for case in golden_cases(method)]
STRESS = golden_cases(name="rld_stress")


def check(case, dtype):
    method = LOGIT_METHODS[case.method]
    tensors = case.tensors(dtype)
    student = tensors["student_logits"].requires_grad_()
    terms = method.build(case.hyper)(student, tensors["teacher_logits"], tensors["target"])
    ce = terms.pop("ce", None)
    (gradient,) = torch.autograd.grad(sum(terms.values()), student)
    assert all(term.isfinite() for term in terms.values())
    case.assert_terms({name: terms.pop(ours) for name, ours in method.terms.items()} | terms)
    if "ce_weight" in case.hyper and "ce" in case.expected:
        case.assert_value(ce, case.hyper["ce_weight"] * case.expected["ce"])
    assert gradient.dtype == dtype
    case.assert_gradient("student_logits", gradient)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logit_method(case, dtype):
    assert dtype in case.dtypes
    check(case, dtype)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("case", STRESS, ids=str)
def test_rld_is_finite_if_the_reference_is_not(case):
    (dtype,) = case.dtypes
    check(case, dtype)


def test_every_case_of_an_implemented_method_is_run():
    assert {*LOGIT_METHODS, *FEATURE_METHODS} == set(NUMBER_OF_CASES) <= set(list_losses())
    assert all(loss_class(name) is method.module for name, method in LOGIT_METHODS.items())
    for method in FEATURE_METHODS:
        text = (Path(__file__).parent / "features" / f"test_{method}.py").read_text()
        assert f'golden_method = "{method}"' in text

    everything = golden_cases()
    assert {name: len(golden_cases(name)) for name in {case.method for case in everything}} == NUMBER_OF_CASES
    assert len({case.id for case in everything}) == len(everything) == sum(NUMBER_OF_CASES.values())
    assert {case.id for case in CASES} == {case.id for case in everything if case.method not in FEATURE_METHODS}
    assert all(case.dtypes == (torch.float64, torch.float32) for case in CASES)
    assert len(STRESS) == len({case.id for case in STRESS}) == 92
    assert {case.dtypes[0] for case in STRESS} == {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def test_every_golden_array_can_be_read():
    for case in golden_cases() + STRESS:
        assert set(case.tensors(torch.float64)) == set(case.arrays)
