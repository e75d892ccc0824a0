"""RLD for one sample, the toy example and the page, compared with the losses."""

import re

import pytest
import torch
import torch.nn.functional as F

from rld_lightning.losses import RLDLoss, rld_loss, swap_loss
from rld_lightning.losses.dkd import dkd_loss
from rld_lightning.reporting.figures import toy
from rld_lightning.reporting.figures.explain import MOST_CLASSES, draw_refinement, shown_classes, write_explanation
from rld_lightning.reporting.figures.explain_page import explain_in_words, numbers_of, write_page
from rld_lightning.reporting.figures.refine import refine
from rld_lightning.reporting.style import page_svg
from rld_lightning.tasks.logit_reader import LogitReader


def kl(p, q):
    kept = p > 0
    return float((p[kept] * (p[kept] / q[kept]).log()).sum())


def sample(label, classes=6, **options):
    student, teacher = torch.randn(2, classes, dtype=torch.float64)
    return refine(student, teacher, label, RLDLoss(**options)), student, teacher


@pytest.mark.parametrize("label", range(6))
@pytest.mark.parametrize("options", [{}, {"confidence_temperature": 1.0}, {"mask": "g", "alpha": 3.0, "beta": 2.0}])
def test_the_distributions_reproduce_the_losses(label, options):
    own, student, teacher = sample(label, **options)
    loss = RLDLoss(**options)
    cold, warm = loss.confidence_temperature or loss.temperature, loss.temperature
    expected = rld_loss(
        student[None], teacher[None], torch.tensor([label]), alpha=loss.alpha, beta=loss.beta, temperature=warm,
        confidence_temperature=cold, mask=loss.mask,
    )  # fmt: skip
    b, q = own.teacher_confidence, own.student_confidence
    scd = kl(torch.tensor([b, 1 - b]), torch.tensor([q, 1 - q]))
    mcd = kl(own.teacher_correlation, own.student_correlation)
    assert loss.alpha * cold**2 * scd == pytest.approx(float(expected["scd"]), abs=1e-5)
    assert loss.beta * warm**2 * mcd == pytest.approx(float(expected["mcd"]), abs=1e-9)
    assert own.terms["scd"] == pytest.approx(float(expected["scd"]))
    assert own.terms["kd"] == pytest.approx(warm**2 * kl(own.teacher_probs, own.student_probs))
    assert own.terms["ce"] == pytest.approx(-float(student.log_softmax(-1)[label]))


def test_ranks_and_masks():
    own = refine(torch.zeros(4), torch.tensor([3.0, 1.0, 2.0, 0.0]), 2, RLDLoss())
    assert (own.rank, own.favourite, own.teacher_is_right) == (2, 0, False)
    assert own.masked.tolist() == [True, False, True, False]
    torch.testing.assert_close(own.teacher_correlation[[1, 3]], torch.tensor([0.25, 0.0]).softmax(-1))
    assert own.teacher_correlation[own.masked].tolist() == [0, 0]


def test_a_true_class_in_last_place_masks_all_classes():
    own = refine(torch.randn(4), torch.tensor([3.0, 1.0, 2.0, 0.0]), 3, RLDLoss())
    assert own.masked.all()
    assert not own.teacher_correlation.any()
    assert own.terms["mcd"] == 0
    assert "nothing left to compare" in explain_in_words(own, list("abcd"), RLDLoss())[2]


def test_toy_targets_equal_the_losses_targets():
    targets = toy.toy_targets()
    student, teacher, label = (torch.tensor([values]) for values in (toy.STUDENT, toy.TEACHER, toy.LION))
    probs = {name: torch.tensor(values) for name, values in targets.items()}
    assert probs["teacher"].argmax() == toy.FOREST  # the example is about a mistake
    swapped = swap_loss(student, teacher, label, temperature=1.0)["swap"]
    assert kl(probs["swap"], probs["student"]) == pytest.approx(float(swapped), rel=1e-5)
    terms = rld_loss(student, teacher, label, temperature=1.0, beta=1.0)
    assert kl(probs["scd"], probs["scd_student"]) == pytest.approx(float(terms["scd"]), rel=1e-4)
    left = probs["mcd"] > 0
    own = F.softmax(student[0][left], -1)
    assert kl(probs["mcd"][left], own) == pytest.approx(float(terms["mcd"]), rel=1e-4)
    assert probs["revision"].argmax() == toy.LION
    assert float(probs["revision"].max() - probs["revision"][toy.FOREST]) == pytest.approx(1 - 0.8)
    assert all(values.sum() == pytest.approx(1) for values in probs.values())


def test_rld_equals_dkd_if_the_teacher_is_right():
    _, student, teacher = sample(0)
    label = torch.tensor([int(teacher.argmax())])
    right = refine(student, teacher, int(label), RLDLoss(beta=1.0))
    dkd = dkd_loss(student[None], teacher[None], label, alpha=1.0, beta=1.0, temperature=4.0)
    assert [right.terms["scd"], right.terms["mcd"]] == pytest.approx([float(term) for term in dkd.values()])
    assert "is right" in explain_in_words(right, list("abcdef"), RLDLoss())[0]


def heights(axes):
    return [[bar.get_height() for bar in container] for container in axes.containers]


def test_toy_bars_equal_the_targets():
    figure, targets = toy.draw_toy(), toy.toy_targets()
    panels = dict(zip(("teacher", "swap", "revision", "rc", "scd", "mcd"), figure.axes, strict=True))
    for name in ("teacher", "swap", "revision", "rc"):
        assert heights(panels[name])[0] == targets[name]
    assert heights(panels["swap"])[1] == targets["teacher"]  # the outline
    assert heights(panels["scd"]) == [targets["scd"], targets["scd_student"]]
    assert heights(panels["mcd"])[0] == targets["mcd"]


def widths(axes):
    return [[bar.get_width() for bar in container] for container in axes.containers]


@pytest.mark.parametrize("classes", [6, 100])
def test_bars_equal_the_samples_values(classes):
    own, student, teacher = sample(3, classes)
    figure = draw_refinement(own, [f"class_{i}" for i in range(classes)], RLDLoss(), "title")
    logits, probs, confidence, correlation = figure.axes
    said = {probs.get_xlabel(), confidence.get_ylabel(), correlation.get_xlabel()}
    assert said == {"probability at temperature 4"}  # and not the networks' own
    rows = shown_classes(own)
    assert len(rows) == min(classes, MOST_CLASSES)
    assert {own.label, own.favourite, int(student.argmax())} <= set(rows)
    assert teacher[rows].diff().le(0).all()
    assert widths(logits) == [teacher[rows].tolist(), student[rows].tolist()]
    assert widths(probs) == [own.teacher_probs[rows].tolist(), own.student_probs[rows].tolist()]
    assert widths(correlation)[:2] == [own.teacher_correlation[rows].tolist(), own.student_correlation[rows].tolist()]
    b, q = own.teacher_confidence, own.student_confidence
    assert [height for container in heights(confidence) for height in container] == [b, 1 - b, q, 1 - q]
    others = [text.get_text() for text in probs.texts if text.get_text().startswith("others")]
    assert others == ([] if classes == 6 else [f"others: teacher {1 - own.teacher_probs[rows].sum():.2f}, student "
                                               f"{1 - own.student_probs[rows].sum():.2f}"])  # fmt: skip


def test_a_separate_confidence_temperature_is_stated():
    _, student, teacher = sample(3)
    loss = RLDLoss(confidence_temperature=1.0)
    own = refine(student, teacher, 3, loss)
    assert own.teacher_confidence == pytest.approx(float(teacher.softmax(-1).max()))
    said = f"{100 * own.teacher_confidence:.1f}\u00a0% (at temperature 1), whichever"
    assert said in explain_in_words(own, list("abcdef"), loss)[1]
    labels = [axes.get_xlabel() or axes.get_ylabel() for axes in draw_refinement(own, list("abcdef"), loss).axes[1:]]
    assert labels == ["probability at temperature 4", "probability", "probability at temperature 4"]


def test_the_page_is_self_contained_and_escapes_names(tmp_path):
    own, *_ = sample(3)
    names = ["<b>", "a&b", "c", 'd"', "e", "f"]
    image = torch.rand(4, 4, 3)
    svg = page_svg(lambda: draw_refinement(own, names, RLDLoss(), image=image))
    page = write_page(tmp_path / "x" / "page.html", own, names, RLDLoss(), svg, title="<t>", origin="o").read_text()
    assert "<b>" not in page
    assert "<t>" not in page
    assert not re.search(r"(src|href)=.(?!#|data:)", page)
    assert page.count("<li>") == 3
    assert f"{own.terms['mcd']:.4f}" in page


def test_the_figures_colours_follow_the_page(tmp_path):
    own = refine(torch.zeros(4), torch.tensor([3.0, 1.0, 2.0, 0.0]), 2, RLDLoss())
    svg = page_svg(lambda: draw_refinement(own, list("abcd"), RLDLoss()))
    page = write_page(tmp_path / "page.html", own, list("abcd"), RLDLoss(), svg, title="t", origin="o").read_text()
    assert "prefers-color-scheme: dark" in page
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert not re.search(r"#(1a1b1c|e8e8e8|5a5a5a|ffffff|000000)", svg)
    assert "fill: currentColor" in svg
    assert svg.count("fill: var(--masked)") == 6  # two classes on three panels


def words(teacher, label, **options):
    loss = RLDLoss(**options)
    return explain_in_words(refine(torch.zeros(4), torch.tensor(teacher), label, loss), list("abcd"), loss)


WRONG = [3.0, 1.0, 2.0, 0.0]
COPY = "the student is to copy the teacher's proportions among"


@pytest.mark.parametrize(
    ("teacher", "label", "options", "sentence"),
    [
        (WRONG, 2, {}, f"the true class and \u201ca\u201d, which the teacher put above it: {COPY} the other 2 alone."),
        (WRONG, 2, {"mask": "g"}, f"masks \u201ca\u201d, which the teacher put above the true class: {COPY} the other"),
        (WRONG, 1, {}, "the true class as well as \u201ca\u201d and \u201cc\u201d, which the teacher put above it: "),
        (WRONG, 0, {}, f"masks the true class: {COPY} the other 3 alone."),
        (WRONG, 0, {"mask": "g"}, f"masks nothing: {COPY} all 4 classes."),
        ([2.0, 1.0, 2.0, 0.0], 2, {}, "which the teacher put above it or level with it: "),
        (WRONG, 2, {"beta": 0.0}, "is switched off (beta = 0)"),
    ],
)
def test_the_page_describes_mcds_mask(teacher, label, options, sentence):
    assert words(teacher, label, **options)[2].startswith("MCD ")
    assert sentence in words(teacher, label, **options)[2]


def test_the_page_mentions_disabled_parts():
    _, scd, mcd = words([3.0, 1.0, 2.0, 0.0], 2, alpha=0.0)
    assert scd.startswith("SCD is switched off (alpha = 0)")
    assert mcd.startswith("MCD masks")
    own, *_ = sample(3)
    titles = [axes.get_title() for axes in draw_refinement(own, list("abcdef"), RLDLoss(alpha=0.0)).axes]
    assert titles[2:] == ["SCD: switched off", "RLD, MCD: what is left"]


def test_numbers_state_their_factors():
    loss = RLDLoss(alpha=2.0, beta=3.0, temperature=4.0, confidence_temperature=1.5)
    own = refine(torch.zeros(4), torch.tensor([3.0, 1.0, 2.0, 0.0]), 2, loss)
    numbers = numbers_of(own, loss)
    assert numbers["SCD, nats \u00d7 T\u00b2 (2.25) \u00d7 alpha (2)"] == f"{own.terms['scd']:.4f}"
    assert numbers["MCD, nats \u00d7 T\u00b2 (16) \u00d7 beta (3)"] == f"{own.terms['mcd']:.4f}"


def test_without_runs_the_page_explains_the_toy_example(tmp_path):
    assert [path.name for path in write_explanation(tmp_path, reader=LogitReader())] == [
        "explain.png",
        "explain.pdf",
        "explain.html",
    ]
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())
