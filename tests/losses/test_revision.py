import pytest
import torch
from helpers.loss_tester import LossTester, batch, zscore
from torch.testing import assert_close

from rld_lightning.losses import RevisionLoss, revision_loss
from rld_lightning.losses.revision import revise


class TestRevision(LossTester):
    function = staticmethod(revision_loss)
    module = RevisionLoss
    settings = (
        {"right_mse_weight": 4.0, "wrong_mse_weight": 1.0, "eta": 0.8},
        {"right_mse_weight": 0.5, "wrong_mse_weight": 20.0, "eta": 0.3, "logit_standardization": True},
    )
    positive = ("eta",)
    weights = ("right_mse_weight", "wrong_mse_weight")
    per_sample = False
    vanishes = "never"

    def naive_batch(
        self, student, teacher, label, *, right_mse_weight, wrong_mse_weight, eta, logit_standardization=False
    ):
        ce, logits, probabilities = [], [], []
        for s, t, y in zip(student, teacher, label.tolist(), strict=True):
            if t.tolist().index(t.max().item()) == y:
                ce.append(s.logsumexp(-1) - s[y])
            if logit_standardization:
                s, t = zscore(s), zscore(t)
            if t.tolist().index(t.max().item()) == y:
                logits.append((s - t).square().sum() / len(s))
            else:
                p = t.softmax(-1)
                b = eta / (p.max() - p[y] + 1)
                revised = b * p
                revised[y] = revised[y] + 1 - b
                probabilities.append((s.softmax(-1) - revised).square().sum() / len(s))
        nothing = 0 * student.sum()
        ce, logits, probabilities = (
            torch.stack(losses).mean() if losses else nothing for losses in (ce, logits, probabilities)
        )
        return {
            "right_ce": ce,
            "right_mse": right_mse_weight * logits,
            "wrong_mse": wrong_mse_weight * probabilities,
        }


def test_defaults_are_those_of_the_public_code():
    loss = RevisionLoss()
    assert (loss.right_mse_weight, loss.wrong_mse_weight, loss.eta) == (4.0, 1.0, 0.8)
    assert (loss.ce_weight, loss.warmup_epochs) == (0.0, 1)


@pytest.mark.parametrize("eta", [0.1, 0.8, 0.99])
@pytest.mark.parametrize("scenario", ["teacher_wrong", "all_masked", "confident", "two_classes"])
def test_revised_probabilities(scenario, eta):
    """They sum to 1, the others keep their ratios, and the true class leads by 1 - eta if the teacher is wrong."""
    _, teacher, label = batch(scenario)
    probs = teacher.softmax(-1)
    revised = revise(probs, label, eta)
    assert_close(revised.sum(-1), torch.ones(8, dtype=torch.float64))
    true = revised.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    others = revised.scatter(-1, label.unsqueeze(-1), 0.0)
    wrong = teacher.argmax(-1) != label
    assert_close((true - others.amax(-1))[wrong], torch.full((int(wrong.sum()),), 1 - eta, dtype=torch.float64))
    assert torch.equal(revised.argmax(-1)[wrong], label[wrong])
    kept = probs.scatter(-1, label.unsqueeze(-1), 0.0)
    assert_close(others / others.sum(-1, keepdim=True), kept / kept.sum(-1, keepdim=True))


def test_eta_of_one_ties_the_true_class_with_the_teachers_largest():
    _, teacher, label = batch("teacher_wrong")
    revised = revise(teacher.softmax(-1), label, 1.0)
    assert_close(revised.gather(-1, label.unsqueeze(-1)).squeeze(-1), revised.amax(-1))


@pytest.mark.parametrize("eta", [1.1, 0])
def test_eta_out_of_range(eta):
    for call in (lambda: RevisionLoss(eta=eta), lambda: revision_loss(*batch(), eta=eta)):
        with pytest.raises(ValueError, match=f"eta={eta} is not allowed; it must be > 0 and <= 1"):
            call()


@pytest.mark.parametrize(
    ("scenario", "empty"), [("teacher_right", {"wrong_mse"}), ("teacher_wrong", {"right_ce", "right_mse"})]
)
def test_an_empty_group_adds_exactly_zero(scenario, empty):
    student, teacher, label = batch(scenario)
    for name in empty:
        leaf = student.clone().requires_grad_()
        term = revision_loss(leaf, teacher, label)[name]
        (gradient,) = torch.autograd.grad(term, leaf)
        assert term == 0
        assert (gradient == 0).all()


def test_samples_have_no_gradient_from_the_other_groups_terms():
    student, teacher, label = batch()
    label[:4] = teacher[:4].argmax(-1)
    label[4:] = teacher[4:].argmin(-1)
    whole = revision_loss(student, teacher, label)
    right = revision_loss(student[:4], teacher[:4], label[:4])
    wrong = revision_loss(student[4:], teacher[4:], label[4:])
    assert_close(whole, {name: right[name] + wrong[name] for name in whole})


def test_equals_cross_entropy_if_teacher_and_student_are_right_and_equal():
    _, teacher, label = batch("teacher_right")
    terms = revision_loss(teacher, teacher, label)
    assert_close(terms["right_ce"], torch.nn.functional.cross_entropy(teacher, label))
    assert terms["right_mse"] == 0
    assert terms["wrong_mse"] == 0
