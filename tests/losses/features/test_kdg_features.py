import pytest
import torch
from helpers.feature_tester import FeatureTester
from torch.testing import assert_close

from rld_lightning.losses import KDGLogitLoss, kdg_logit_loss
from rld_lightning.losses.features import KDGLoss, kdg_feature_loss
from rld_lightning.models.stages import classifier_of

WEIGHTINGS = ("gradient", "fisher", "identity")


class TestKDG(FeatureTester):
    module = KDGLoss
    settings = (
        {},
        {"logit_weight": 0.0, "feature_weight": 0.01, "weighting": "identity"},
        {"logit_weight": 0.5, "weighting": "fisher", "temperature": 1.0},
    )
    wrong = (
        ({"logit_weight": -1.0}, "logit_weight=-1.0"),
        ({"feature_weight": -1.0}, "feature_weight=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"weighting": "hessian"}, "weighting='hessian' is unknown; choose one of gradient, fisher, identity"),
    )


def inputs():
    """Student features, teacher features, the teacher's logits and classifier, in float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    classifier = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    return student, teacher, teacher @ classifier.T + bias, classifier


def fisher(feature, classifier, logits, temperature):
    """``T^2 E over y ~ p of [ g g' ]``, g the gradient of log p_y at T with respect to the feature: (D, D)."""
    bias = logits - classifier @ feature
    gradient = torch.autograd.functional.jacobian(
        lambda leaf: ((classifier @ leaf + bias) / temperature).log_softmax(-1), feature
    )
    return temperature**2 * gradient.T @ ((logits / temperature).softmax(-1)[:, None] * gradient)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_closed_forms_are_the_fisher_information_by_autograd(weighting, temperature):
    student, teacher, logits, classifier = inputs()
    leaf = student.clone().requires_grad_()
    options = {"weighting": weighting, "temperature": temperature, "weight": 0.3}
    loss = kdg_feature_loss(leaf, teacher, logits, classifier, **options)["kdg_feature"]
    (gradient,) = torch.autograd.grad(loss, leaf)
    value, expected = 0, torch.zeros_like(student)
    for i in range(5):
        matrix = fisher(teacher[i], classifier, logits[i], temperature)
        matrix = {"fisher": matrix, "gradient": matrix.diag().diag(), "identity": torch.eye(6).double()}[weighting]
        d = student[i] - teacher[i]
        value = value + 0.3 * (d @ matrix @ d) / 2 / 5
        expected[i] = 0.3 * matrix @ d / 5
    assert_close(loss.detach(), value, rtol=1e-10, atol=0)
    assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_gradient_weights_are_the_diagonal_of_the_classifiers_fisher_matrix():
    _, teacher, logits, classifier = inputs()
    p = logits[0].softmax(-1)
    diagonal = (classifier.T @ (p.diag() - p.outer(p)) @ classifier).diag()
    for k in range(6):
        moved = teacher[:1].clone()
        moved[0, k] += 2.0
        weight = kdg_feature_loss(moved, teacher[:1], logits[:1], classifier)["kdg_feature"] / 2
        assert_close(weight, diagonal[k], rtol=1e-10, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_full_form_approximates_the_divergence_near_the_teacher(temperature):
    direction, teacher, logits, classifier = inputs()
    student = teacher + 1e-4 * direction
    p = (logits / temperature).log_softmax(-1)
    q = ((logits + (student - teacher) @ classifier.T) / temperature).log_softmax(-1)
    exact = temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    options = {"weighting": "fisher", "temperature": temperature}
    approximate = kdg_feature_loss(student, teacher, logits, classifier, **options)["kdg_feature"]
    assert_close(approximate, exact, rtol=1e-3, atol=0)


def test_the_full_form_equals_the_logit_member_of_the_classifiers_outputs():
    student, teacher, logits, classifier = inputs()
    ours = kdg_feature_loss(student, teacher, logits, classifier, weighting="fisher", temperature=2.0)
    mapped = logits + (student - teacher) @ classifier.T
    assert_close(ours["kdg_feature"], kdg_logit_loss(mapped, logits, temperature=2.0)["kdg_logit"])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_certain_teacher_gives_finite_values(weighting):
    student, teacher, logits, classifier = (tensor.float() for tensor in inputs())
    leaf = student.clone().requires_grad_()
    loss = kdg_feature_loss(leaf, teacher, 1e4 * logits, classifier, weighting=weighting)["kdg_feature"]
    loss.backward()
    assert loss >= 0
    assert leaf.grad.isfinite().all()
    # All classes but one have probability 0, so the feature has no effect.
    assert (loss < 1e-4) == (weighting != "identity")


def test_invalid_shapes_raise():
    student, teacher, logits, classifier = inputs()
    with pytest.raises(ValueError, match=r"one shape \(B, D\), got student \(5, 5\) and teacher \(5, 6\)"):
        kdg_feature_loss(student[:, :5], teacher, logits, classifier)
    for wrong in ((None, classifier), (logits, None), (logits, classifier.T)):
        with pytest.raises(ValueError, match="weighting='fisher' needs the teacher's logits"):
            kdg_feature_loss(student, teacher, *wrong, weighting="fisher")


def test_a_width_is_mapped_only_if_it_differs():
    def connected(teacher, student, **options):
        return TestKDG().connected(*TestKDG.networks(teacher, student), **options)

    assert not list(connected("resnet14", "resnet8").parameters())
    mapped = connected("wrn16_2", "wrn16_1")
    assert {name: tuple(p.shape) for name, p in mapped.named_parameters()} == {
        "mapping.weight": (128, 64),
        "mapping.bias": (128,),
    }


def test_the_teachers_classifier_is_a_constant_that_is_not_saved():
    teacher, student = TestKDG.networks()
    loss = TestKDG().connected(teacher, student)
    assert_close(loss.classifier, classifier_of(teacher).weight.detach())
    assert not loss.classifier.requires_grad
    assert not loss.state_dict()
    assert TestKDG().connected(teacher, student, weighting="identity").classifier is None


def test_the_sum_of_the_members():
    teacher, student = TestKDG.networks()
    tester = TestKDG()
    both = tester.connected(teacher, student, logit_weight=0.9, feature_weight=2.0, temperature=3.0)
    step = tester.step(both, teacher, student)
    terms = both(step)
    (ours,), (theirs,) = step.student.features.values(), step.teacher.features.values()
    weights = classifier_of(teacher).weight
    assert list(terms) == ["ce", "kdg_logit", "kdg_feature"]
    options = {"temperature": 3.0, "weight": 2.0}
    assert_close(
        terms["kdg_feature"], kdg_feature_loss(ours, theirs, step.teacher.logits, weights, **options)["kdg_feature"]
    )
    assert_close(terms["kdg_logit"], KDGLogitLoss(temperature=3.0)(step)["kdg_logit"])
    alone = tester.connected(teacher, student, logit_weight=0.0)
    assert list(alone(tester.step(alone, teacher, student))) == ["ce", "kdg_feature"]
