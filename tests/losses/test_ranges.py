"""Hyper-parameters: common keywords, and ranges that function and module both check."""

import inspect
from dataclasses import fields
from typing import Annotated, Literal

import pytest
import torch
from helpers.loss_tester import batch
from torch.testing import assert_close

import rld_lightning.losses
from rld_lightning.losses import LogitLoss, list_losses, loss_class
from rld_lightning.losses.base import Epochs
from rld_lightning.losses.ranges import Count, Positive, Share, Weight, check_ranges, checked, choose, ranges_of
from rld_lightning.losses.rows import Reduction, row_loss

LOGIT_FUNCTIONS = {
    name: value
    for name, value in vars(rld_lightning.losses).items()
    if name.endswith("_loss") and name != "register_loss"
}
LOSSES = {name: loss_class(name) for name in list_losses()}
WRONG = {
    Positive: (0, -1.0, float("nan"), float("inf"), "many"),
    Weight: (-1.0, float("nan"), float("inf"), "many"),
    Share: (0.0, 1.5, float("nan"), None),
    Count: (0, 2.5, float("nan")),
    Epochs: (0, float("nan"), None),
}


# Common keywords


@pytest.mark.parametrize("name", LOGIT_FUNCTIONS)
def test_common_keywords(name):
    parameters = inspect.signature(LOGIT_FUNCTIONS[name]).parameters
    assert list(parameters)[:2] == ["student_logits", "teacher_logits"]
    assert "label" in parameters
    common = {p: parameters[p] for p in ("logit_standardization", "ignore_index", "reduction")}
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in common.values())
    assert {p: parameter.default for p, parameter in common.items()} == {
        "logit_standardization": name == "atkd_loss",  # standardizes by default
        "ignore_index": -100,
        "reduction": "mean",
    }
    whole_batch = LOSSES[name.removesuffix("_loss")]().of_whole_batch
    assert common["reduction"].annotation == (Literal["mean"] if whole_batch else Reduction)


@pytest.mark.parametrize("name", LOSSES)
def test_modules_accept_the_options_of_their_function(name):
    parameters = inspect.signature(LOSSES[name]).parameters
    every = {"ce_weight", "warmup_epochs", "label_smoothing"}
    assert every <= set(parameters)
    if not issubclass(LOSSES[name], LogitLoss):
        return
    theirs = inspect.signature(LOSSES[name].function).parameters
    own = {p for p, parameter in theirs.items() if parameter.kind is parameter.KEYWORD_ONLY} - {"reduction"}
    assert set(parameters) == own | every
    for p in own:
        assert parameters[p].annotation == theirs[p].annotation, "the module and the function state one range"
        # Functions have weight 1 by default; other defaults are the same for both.
        assert (
            theirs[p].default in (parameters[p].default, inspect.Parameter.empty) or "weight" in p or p == "temperature"
        )


@pytest.mark.parametrize("name", ["dist_loss", "revision_loss", "mlkd_noaug_loss"])
def test_losses_of_the_whole_batch_only_have_the_mean(name):
    function = LOGIT_FUNCTIONS[name]
    assert_close(function(*batch(), reduction="mean"), function(*batch()))
    with pytest.raises(ValueError, match="reduction='none' is unknown; choose one of mean"):
        function(*batch(), reduction="none")


# Ranges


@pytest.mark.parametrize("name", LOSSES)
def test_a_value_outside_its_range_raises_one_sentence(name):
    cls = LOSSES[name]
    function = getattr(cls, "function", None)
    theirs = inspect.signature(function).parameters if function else {}
    required = {
        p: getattr(cls(), p)
        for p, parameter in theirs.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    }
    refused = 0
    for field in fields(cls):
        for value in WRONG.get(field.type, ("nonsense",) if ranges_of({"": field.type}) else ()):
            calls = [lambda options: cls(**options)]
            calls += [lambda options: function(*batch(), **required | options)] if field.name in theirs else []
            for call in calls:
                with pytest.raises(
                    ValueError, match=rf"^{field.name}={value!r} is (not allowed; it must|unknown; choose)"
                ) as error:
                    call({field.name: value})
                assert str(error.value).count("\n") == 0
                refused += 1
    assert refused >= len(WRONG[Weight]) + len(WRONG[Epochs])


def test_ranges_of_annotations():
    annotations = {
        "plain": float,
        "number": Positive,
        "perhaps": Positive | None,
        "word": Literal["a", "b"],
        "explained": Annotated[Literal["a", "b"], choose("'a' (theirs) or 'b' (ours)", "a", "b")],
        "documented": Annotated[int, "nothing of ours"],
    }
    ranges = ranges_of(annotations)
    assert set(ranges) == {"number", "perhaps", "word", "explained"}
    check_ranges(ranges, {"plain": -1, "number": 1e-3, "perhaps": None, "word": "a", "explained": "b", "other": None})
    for name, value, message in [
        ("number", None, "number=None is not allowed; it must be a finite number > 0."),
        ("perhaps", 0, "perhaps=0 is not allowed; it must be a finite number > 0."),
        ("word", "c", "word='c' is unknown; choose one of a, b."),
        ("explained", "c", "explained='c' is unknown; choose 'a' (theirs) or 'b' (ours)."),
    ]:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            check_ranges(ranges, {name: value})
        assert str(error.value) == message


def test_a_checked_function_keeps_its_metadata():
    @checked
    def scaled(tensor, *, weight: Weight = 1.0):
        """Scaled."""
        return weight * tensor

    assert (scaled.__name__, scaled.__doc__, str(inspect.signature(scaled))[:8]) == ("scaled", "Scaled.", "(tensor,")
    assert scaled(2.0, weight=0) == 0
    with pytest.raises(ValueError, match="weight=-1 is not allowed"):
        scaled(2.0, weight=-1)


# row_loss


def test_row_loss():
    seen = []

    @row_loss
    def distance_loss(
        student_logits,
        teacher_logits,
        label,
        *,
        weight: Weight,
        logit_standardization=False,
        ignore_index=-100,
        reduction: Reduction = "mean",
    ):
        """Squared distance."""
        seen.append((student_logits.dtype, student_logits.shape, label.tolist(), teacher_logits.requires_grad))
        return {"distance": (weight, (student_logits - teacher_logits).square().sum(-1))}

    student, teacher = torch.randn(2, 2, 5, 3, dtype=torch.float16, requires_grad=True)
    label = torch.tensor([[1, 4, 9], [0, 9, 9]])
    terms = distance_loss(student, teacher, label, weight=2.0, ignore_index=9)
    assert seen == [(torch.float32, (6, 5), [1, 4, 0, 0, 0, 0], False)]
    rows = (student.float() - teacher.float()).square().sum(1)
    assert_close(terms, {"distance": 2 * rows[label != 9].mean()})
    assert distance_loss.__doc__ == "Squared distance."
    with pytest.raises(ValueError, match="distance_loss needs the labels"):
        distance_loss(student, teacher, weight=2.0)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'weight'"):
        distance_loss(student, teacher, label, ignore_index=9)
