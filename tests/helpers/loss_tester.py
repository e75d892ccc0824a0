"""The tests that every logit loss must pass, given the loss and a naive formula for one sample."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from helpers.golden import WARMUP
from rld_lightning.losses import DistillationLoss, ModelOutput, StepContext
from rld_lightning.losses.rows import BLOCK_ELEMENTS

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SCENARIOS = [
    "random",
    "teacher_right",
    "teacher_wrong",
    "all_masked",
    "one_unmasked",
    "ties",
    "tied_maximum",
    "two_classes",
    "one_sample",
    "one_sample_two_classes",
    "many_classes",
    "confident",
]
# Half logits are computed in float32, so a few scenarios suffice.
RUNS = [(s, d) for d in DTYPES for s in SCENARIOS if d.itemsize > 2 or s in ("random", "ties", "confident")]
# The types of computation: float64, float32, and float32 from half logits.
SATURATED = [(1e3, torch.float32), (1e4, torch.float64), (1e4, torch.float32), (1e4, torch.bfloat16)]


def batch(scenario: str = "random", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits (float64) and labels of a scenario, equal in every call."""
    size = 1 if "one_sample" in scenario else 3 if scenario == "many_classes" else 8
    classes = 2 if "two_classes" in scenario else 1000 if scenario == "many_classes" else 10
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    teacher = student + 2 * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    label = torch.randint(classes, (size,), generator=generator)
    true = label.unsqueeze(-1)
    if scenario == "teacher_right":
        teacher.scatter_(-1, true, teacher.amax(-1, keepdim=True) + 1)
    elif scenario == "teacher_wrong":
        other = (true + 1) % classes
        teacher.scatter_(-1, other, teacher.amax(-1, keepdim=True) + 1)
    elif scenario == "all_masked":
        teacher.scatter_(-1, true, teacher.amin(-1, keepdim=True) - 1)
    elif scenario == "one_unmasked":
        lowest = teacher.amin(-1, keepdim=True)
        teacher.scatter_(-1, true, lowest - 1).scatter_(-1, (true + 1) % classes, lowest - 2)
    elif scenario == "ties":
        teacher = teacher.div(2).round()
    elif scenario == "tied_maximum":
        teacher.scatter_(-1, torch.cat([true, (true + 3) % classes], -1), teacher.amax(-1, keepdim=True).expand(-1, 2))
    elif scenario == "confident":
        student, teacher = 20 * student, 20 * teacher
    return student, teacher, label


# Building blocks of naive formulas, for one sample: logits (C,).


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL divergence of the softmaxes of two logit vectors; 0 for empty ones."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def one_against_rest(logits: Tensor, k: int) -> Tensor:
    """Two logits whose softmax is the probability of class k and that of all others together."""
    rest = torch.cat([logits[:k], logits[k + 1 :]])
    return torch.stack([logits[k], rest.logsumexp(-1)])


def zscore(logits: Tensor) -> Tensor:
    """Logit standardization as in its published code."""
    centred = logits - logits.sum() / len(logits)
    return centred / ((centred.square().sum() / (len(logits) - 1)).sqrt() + 1e-7)


class LossTester:
    """Base of the tests of a loss: a subclass named ``Test...`` sets the loss, and runs every test here.

    Attributes:
        function: the pure function, as a ``staticmethod``.
        module: the class that holds its hyper-parameters, under the same names.
        settings: hyper-parameters to test with; the first is used if one suffices.
        positive: hyper-parameters that must be finite and > 0.
        weights: hyper-parameters that must be finite and >= 0.
        choices: hyper-parameters with a fixed set of words.
        per_sample: whether the loss is a mean over samples, with ``reduction`` and ``ignore_index``.
        vanishes: when the loss of a student with the teacher's logits is 0: ``"always"``, only if the teacher is
            ``"right"``, or ``"never"``.
        detaches_student: whether a target is computed from the student's detached logits, so that the numerical
            derivative differs.
        saturates: whether logits of 1e3 and 1e4 have a finite loss and gradient.
    """

    function: staticmethod
    module: type[DistillationLoss]
    settings: tuple[dict, ...]
    positive: tuple[str, ...] = ("temperature",)
    weights: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    per_sample = True
    vanishes = "always"
    detaches_student = False
    saturates = True

    @staticmethod
    def naive(student: Tensor, teacher: Tensor, label: int, **hyper) -> dict[str, Tensor]:
        """Returns the terms of ONE sample: logits ``(C,)`` in float64, hyper-parameters as in ``settings``."""
        raise NotImplementedError

    def naive_batch(self, student: Tensor, teacher: Tensor, label: Tensor, **hyper) -> dict[str, Tensor]:
        """Returns the terms of a batch; override it if the terms are not means over samples."""
        if hyper.pop("logit_standardization", False):
            student, teacher = (torch.stack([zscore(row) for row in logits]) for logits in (student, teacher))
        rows = [self.naive(s, t, y, **hyper) for s, t, y in zip(student, teacher, label.tolist(), strict=True)]
        return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}

    # Helpers

    def pytest_generate_tests(self, metafunc):
        if "hyper" in metafunc.fixturenames:
            names = ["-".join(f"{k}={v}" for k, v in hyper.items()) for hyper in self.settings]
            metafunc.parametrize("hyper", self.settings, ids=names)

    def call(self, student, teacher, label, **options):
        """Calls the pure function."""
        return type(self).function(student, teacher, label, **options)

    @staticmethod
    def value_and_gradient(loss, student, *others, **options):
        """Returns the detached terms, and the gradient of their sum with respect to the student."""
        leaf = student.detach().clone().requires_grad_()
        terms = loss(leaf, *others, **options)
        (gradient,) = torch.autograd.grad(sum(terms.values()).sum(), leaf)
        return {name: term.detach() for name, term in terms.items()}, gradient

    @staticmethod
    def assert_same(actual, expected, *, rtol=1e-9, atol=1e-12):
        """Compares two results of :meth:`value_and_gradient`; by default to float64's precision."""
        assert_close(actual[0], expected[0], rtol=rtol, atol=atol, check_dtype=False)
        assert_close(
            actual[1], expected[1], rtol=rtol, atol=rtol * expected[1].abs().max().item() + atol, check_dtype=False
        )

    def assert_naive(self, student, teacher, label, hyper, dtype, float32_rtol=5e-5):
        """Compares value and gradient in ``dtype`` with the naive formula in float64 of the same, rounded, logits."""
        student, teacher = student.to(dtype), teacher.to(dtype)
        terms, gradient = self.value_and_gradient(self.call, student, teacher, label, **hyper)
        expected, expected_gradient = self.value_and_gradient(
            self.naive_batch, student.double(), teacher.double(), label, **hyper
        )
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()
        largest = expected_gradient.abs().max().item()
        for name, term in terms.items():
            assert term.dtype == torch.promote_types(dtype, torch.float32)
            assert term.shape == ()
            assert term.isfinite()
            tolerance = (1e-9, 1e-11) if dtype == torch.float64 else (float32_rtol, 1e-5)
            assert_close(term.double(), expected[name], rtol=tolerance[0], atol=tolerance[1])
        assert set(terms) == set(expected)
        if dtype == torch.float64:
            rounding, absolute = 0.0, 1e-9 * largest + 1e-11
        else:
            # Half logits are computed in float32; only the returned gradient is rounded again.
            rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
            absolute = 1e-3 * largest + 1e-5
        assert_close(gradient.double(), expected_gradient, rtol=rounding, atol=absolute)

    # Values

    @pytest.mark.thinned(4)
    @pytest.mark.parametrize(("scenario", "dtype"), RUNS, ids=str)
    def test_naive_formula(self, scenario, dtype, hyper):
        student, teacher, label = batch(scenario)
        self.assert_naive(student, teacher, label, hyper, dtype)

    @pytest.mark.thinned(3)
    @pytest.mark.parametrize(("scale", "dtype"), SATURATED, ids=str)
    def test_saturated_logits(self, scale, dtype, hyper):
        if not self.saturates:
            pytest.skip("the loss itself is not finite there")
        for scenario in ("random", "teacher_wrong", "all_masked", "ties", "two_classes"):
            student, teacher, label = batch(scenario)
            student, teacher = scale * student.clamp(-3, 3), scale * teacher.clamp(-3, 3)
            # Rounding a logit of 1e4 to float32 changes an exponent by 1e-3.
            self.assert_naive(student, teacher, label, hyper, dtype, float32_rtol=1e-3)

    def test_gradcheck(self, hyper):
        if self.detaches_student:
            pytest.skip("the numerical derivative moves the target as well")
        student, teacher, label = (tensor[:3] for tensor in batch("random", seed=1))
        student, teacher = student[:, :5].clone().requires_grad_(), teacher[:, :5]

        def terms(student):
            return tuple(self.call(student, teacher, label % 5, **hyper).values())

        assert torch.autograd.gradcheck(terms, student)

    @pytest.mark.thinned(3)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_student_with_the_teachers_logits(self, dtype, hyper):
        for scenario in ("teacher_right", "teacher_wrong"):
            _, teacher, label = batch(scenario)
            teacher = teacher.to(dtype)
            terms, gradient = self.value_and_gradient(self.call, teacher, teacher, label, **hyper)
            if self.vanishes == "always" or (self.vanishes == "right" and scenario == "teacher_right"):
                atol = 1e-12 if dtype == torch.float64 else 1e-5
                assert_close(sum(terms.values()), torch.zeros((), dtype=dtype), rtol=0, atol=atol)
                assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=atol)
            elif scenario == "teacher_wrong":
                assert gradient.abs().max() > 1e-3

    # Invariants

    def test_no_gradient_into_the_teacher_and_inputs_untouched(self, hyper):
        student, teacher, label = batch()
        before = [tensor.clone() for tensor in (student, teacher, label)]
        student.requires_grad_()
        teacher.requires_grad_()
        sum(self.call(student, teacher, label, **hyper).values()).backward()
        assert teacher.grad is None
        assert student.grad is not None
        assert all(torch.equal(a, b) for a, b in zip((student, teacher, label), before, strict=True))

    def test_permuted_classes(self, hyper):
        student, teacher, label = batch()
        order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
        terms, gradient = self.value_and_gradient(self.call, student, teacher, label, **hyper)
        permuted = self.value_and_gradient(
            self.call, student[:, order], teacher[:, order], order.argsort()[label], **hyper
        )
        self.assert_same(permuted, (terms, gradient[:, order]))

    def test_batch_split(self, hyper):
        if not self.per_sample:
            pytest.skip("looks at the whole batch")
        whole = batch()
        terms, gradient = self.value_and_gradient(self.call, *whole, **hyper)
        parts = [
            self.value_and_gradient(self.call, *(tensor[rows] for tensor in whole), **hyper)
            for rows in (slice(0, 3), slice(3, 8))
        ]
        means = {name: 3 / 8 * parts[0][0][name] + 5 / 8 * parts[1][0][name] for name in terms}
        self.assert_same((means, torch.cat([3 / 8 * parts[0][1], 5 / 8 * parts[1][1]])), (terms, gradient))

    def test_reductions(self, hyper):
        if not self.per_sample:
            pytest.skip("looks at the whole batch")
        student, teacher, label = batch()
        label[2] = -100
        mean, mean_gradient = self.value_and_gradient(self.call, student, teacher, label, **hyper)
        none, none_gradient = self.value_and_gradient(self.call, student, teacher, label, **hyper, reduction="none")
        total, total_gradient = self.value_and_gradient(self.call, student, teacher, label, **hyper, reduction="sum")
        assert all(term.shape == (8,) for term in none.values())
        assert all(term[2] == 0 for term in none.values())
        summed = {name: term.sum() for name, term in none.items()}
        self.assert_same((summed, none_gradient), (total, total_gradient))
        self.assert_same(({k: 7 * v for k, v in mean.items()}, 7 * mean_gradient), (total, total_gradient))

        first, second = (
            self.call(student[rows], teacher[rows], label[rows], **hyper, reduction="sum")
            for rows in (slice(0, 3), slice(3, 8))
        )
        assert_close({name: first[name] + second[name] for name in total}, total)

    @pytest.mark.thinned(3)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_maps_are_batches_of_pixels(self, reduction, hyper):
        if not self.per_sample:
            pytest.skip("looks at the whole batch")
        generator = torch.Generator().manual_seed(5)
        student, teacher = torch.randn(2, 3, 7, 2, 4, generator=generator, dtype=torch.float64)
        label = torch.randint(7, (3, 2, 4), generator=generator)

        def flat(logits):
            return torch.stack([logits[b, :, h, w] for b in range(3) for h in range(2) for w in range(4)])

        options = hyper | {"reduction": reduction}
        terms, gradient = self.value_and_gradient(self.call, student, teacher, label, **options)
        expected, expected_gradient = self.value_and_gradient(
            self.call, flat(student), flat(teacher), label.flatten(), **options
        )
        shape = (3, 2, 4) if reduction == "none" else ()
        self.assert_same(
            (terms, flat(gradient)), ({k: v.reshape(shape) for k, v in expected.items()}, expected_gradient)
        )

    @pytest.mark.thinned(3)
    @pytest.mark.parametrize("ignore_index", [-100, 255, 3])
    def test_ignored_samples_have_no_effect(self, ignore_index, hyper):
        if not self.per_sample:
            pytest.skip("looks at the whole batch")
        student, teacher, label = batch()
        ignored = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1]).bool()
        label = torch.where(label == ignore_index, label + 1, label).masked_fill(ignored, ignore_index)
        student[0] = torch.nan if ignore_index == 255 else 1e30
        options = hyper | {"ignore_index": ignore_index}
        terms, gradient = self.value_and_gradient(self.call, student, teacher, label, **options)
        expected = self.value_and_gradient(self.call, student[~ignored], teacher[~ignored], label[~ignored], **options)
        self.assert_same((terms, gradient[~ignored]), expected)
        assert (gradient[ignored][1:] == 0).all()

        module = self.module(**options)
        with_ce = self.value_and_gradient(module, student[1:], teacher[1:], label[1:])
        kept = ~ignored[1:]
        expected = self.value_and_gradient(module, student[1:][kept], teacher[1:][kept], label[1:][kept])
        self.assert_same((with_ce[0], with_ce[1][kept]), expected)

    def test_everything_ignored(self, hyper):
        if not self.per_sample:
            pytest.skip("looks at the whole batch")
        student, teacher, label = batch()
        for loss in (lambda *tensors: self.call(*tensors, **hyper), self.module(**hyper)):
            terms, gradient = self.value_and_gradient(loss, student, teacher, label.fill_(-100))
            assert all(term == 0 for term in terms.values())
            assert (gradient == 0).all()

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
    def test_labels_of_any_integer_type(self, dtype):
        student, teacher, label = batch()
        hyper = self.settings[0]
        expected = self.call(student, teacher, label, **hyper)
        assert_close(self.call(student, teacher, label.to(dtype), **hyper), expected, rtol=0, atol=0)
        module = self.module(**hyper)
        assert_close(module(student, teacher, label.to(dtype)), module(student, teacher, label), rtol=0, atol=0)

    def test_an_optional_label_changes_nothing(self, hyper):
        if inspect.signature(type(self).function).parameters["label"].default is inspect.Parameter.empty:
            pytest.skip("needs labels")
        student, teacher, label = batch()
        for options in ({}, {"reduction": "sum"}, {"reduction": "none"}) if self.per_sample else ({},):
            found = self.value_and_gradient(self.call, student, teacher, None, **hyper, **options)
            expected = self.value_and_gradient(self.call, student, teacher, label, **hyper, **options)
            assert_close(found, expected, rtol=0, atol=0)

    # Blocks, autocast, compilation

    @pytest.mark.thinned(2)
    @pytest.mark.parametrize("rows", [1, 3])
    def test_row_blocks(self, rows, hyper, monkeypatch):
        whole = [torch.cat(pair) for pair in zip(batch(), batch(seed=1), strict=True)]
        expected = self.value_and_gradient(self.call, *whole, **hyper)
        monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 10 * rows)
        self.assert_same(self.value_and_gradient(self.call, *whole, **hyper), expected)

    @pytest.mark.thinned(2)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast(self, dtype, hyper):
        student, teacher, label = batch()
        student, teacher = student.to(dtype), teacher.to(dtype)
        module = self.module(**hyper)

        def under_autocast(*tensors):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return module(*tensors)

        expected = self.value_and_gradient(module, student, teacher, label)
        assert_close(self.value_and_gradient(under_autocast, student, teacher, label), expected, rtol=0, atol=0)

    def assert_compiles(self, hyper, **options):
        torch.compiler.reset()
        student, teacher, label = batch()
        student, teacher = student.float(), teacher.float()
        module = self.module(**hyper)
        compiled = torch.compile(module, fullgraph=True, **options)
        for rows in (8, 5):
            tensors = student[:rows], teacher[:rows], label[:rows]
            self.assert_same(
                self.value_and_gradient(compiled, *tensors),
                self.value_and_gradient(module, *tensors),
                rtol=1e-4,
                atol=1e-5,
            )

    @pytest.mark.thinned(5)
    def test_traces_as_one_graph(self):
        self.assert_compiles(self.settings[0], backend="eager")

    @pytest.mark.slow
    def test_compiled(self):
        self.assert_compiles(self.settings[0])

    # Invalid arguments

    @pytest.mark.thinned(4)
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s, t: (s[0], t), r"student_logits must be floating point of shape \(B, C\).*float64 \(10,\)"),
            (lambda s, t: (s, t[0]), r"teacher_logits must be floating point of shape \(B, C\)"),
            (lambda s, t: (s.long(), t), r"student_logits must be floating point.*int64 \(8, 10\)"),
            (
                lambda s, t: (s[:7], t),
                r"student_logits \(7, 10\) and teacher_logits \(8, 10\) must have the same shape",
            ),
            (lambda s, t: (s, t[:, :9]), "the student has 10 classes and the teacher 9"),
            (lambda s, t: (s[:, :1], t[:, :1]), "at least 2 classes"),
        ],
        ids=["one_dimension", "teacher_one_dimension", "integers", "batch", "class_count", "one_class"],
    )
    def test_wrong_logits(self, change, message):
        student, teacher, label = batch()
        student, teacher = change(student, teacher)
        hyper = self.settings[0]
        for loss in (lambda *tensors: self.call(*tensors, **hyper), self.module(**hyper)):
            with pytest.raises(ValueError, match=message):
                loss(student, teacher, label)

    @pytest.mark.thinned(4)
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda label: label.index_fill(0, torch.tensor(3), 10), r"label 10 is outside \[0, 10\)"),
            (lambda label: label.index_fill(0, torch.tensor(3), -1), r"label -1 is outside \[0, 10\)"),
            (lambda label: label.double(), r"label must hold class indices.*float64 \(8,\)"),
            (lambda label: label > 3, r"label must hold class indices.*bool \(8,\)"),
            (lambda label: label[:7], r"label must hold class indices.*shape \(8,\).*int64 \(7,\)"),
            (
                lambda label: torch.eye(10)[label].long(),
                r"label must hold class indices.*\(8, 10\); .*label.argmax\(1\)",
            ),
        ],
        ids=["too_large", "negative", "float", "bool", "batch", "one_hot"],
    )
    def test_wrong_labels(self, change, message):
        student, teacher, label = batch()
        hyper = self.settings[0]
        for loss in (lambda *tensors: self.call(*tensors, **hyper), self.module(**hyper)):
            with pytest.raises(ValueError, match=message):
                loss(student, teacher, change(label))

    def test_wrong_hyperparameters(self):
        wrong = [(name, value) for name in self.positive for value in (0, -1.0, float("nan"), float("inf"))]
        wrong += [(name, value) for name in self.weights for value in (-1.0, float("nan"), float("inf"))]
        wrong += [(name, "nonsense") for name in self.choices]
        for name, value in wrong:
            hyper = self.settings[0] | {name: value}
            for call in (lambda hyper=hyper: self.call(*batch(), **hyper), lambda hyper=hyper: self.module(**hyper)):
                with pytest.raises(ValueError, match=f"{name}={value!r}"):
                    call()

    def test_unknown_reduction(self):
        if not self.per_sample:
            pytest.skip("has no reduction")
        with pytest.raises(ValueError, match="reduction='average' is unknown; choose one of mean, sum, none"):
            self.call(*batch(), **self.settings[0], reduction="average")

    # The module

    def test_module_is_the_function_and_cross_entropy(self, hyper):
        student, teacher, label = batch()
        expected = self.call(student, teacher, label, **hyper)
        ce = torch.nn.functional.cross_entropy(student, label)
        assert_close(self.module(**hyper, ce_weight=0.3)(student, teacher, label), {"ce": 0.3 * ce} | expected)
        assert_close(self.module(**hyper, ce_weight=0)(student, teacher, label), expected, rtol=0, atol=0)
        assert list(self.module(**hyper, ce_weight=1)(student, teacher, label)) == ["ce", *expected]

    def test_half_logits_have_float32_cross_entropy(self):
        student, teacher, label = batch()
        module = self.module(**self.settings[0], ce_weight=1)
        half = module(student.bfloat16(), teacher.bfloat16(), label)
        assert_close(half, module(student.bfloat16().float(), teacher.bfloat16().float(), label), rtol=0, atol=0)

    def test_called_with_tensors_or_context(self, hyper):
        student, teacher, label = batch()
        module = self.module(**hyper)
        step = StepContext(ModelOutput(student), ModelOutput(teacher), label)
        assert_close(module(step), module(student, teacher, label), rtol=0, atol=0)

    @pytest.mark.parametrize("case", WARMUP, ids=lambda case: f"{case['warmup_epochs']}_epochs")
    def test_warmup(self, case):
        student, teacher, label = batch()
        module = self.module(**self.settings[0], ce_weight=0.5, warmup_epochs=case["warmup_epochs"])
        full = module(student, teacher, label)
        for epoch, factor in zip(case["epoch"], case["factor"], strict=True):
            terms = module(StepContext(ModelOutput(student), ModelOutput(teacher), label, epoch=epoch))
            assert_close(terms, {k: v if k == "ce" else factor * v for k, v in full.items()}, rtol=1e-12, atol=0)

    def test_statistics_are_plain_scalars(self):
        student, teacher, label = batch()
        step = StepContext(ModelOutput(student.requires_grad_()), ModelOutput(teacher), label)
        for value in self.module(**self.settings[0]).statistics(step).values():
            assert value.shape == ()
            assert value.isfinite()
            assert not value.requires_grad

    def test_prints_its_hyperparameters(self, hyper):
        text = repr(self.module(**hyper, ce_weight=0.25, warmup_epochs=7, ignore_index=255))
        expected = hyper | {"ce_weight": 0.25, "warmup_epochs": 7, "ignore_index": 255}
        assert all(f"{name}={value}" in text for name, value in expected.items())

    def test_every_hyperparameter_is_tested(self):
        names = set(inspect.signature(type(self).function).parameters) & set(inspect.signature(self.module).parameters)
        names -= {"label", "reduction", "ignore_index"}
        assert names <= {name for hyper in self.settings for name in hyper}
        assert {*self.positive, *self.weights, *self.choices} <= names

    def test_missing_teacher_or_label(self):
        student, teacher, label = batch()
        module = self.module(**self.settings[0])
        with pytest.raises(ValueError, match=f"{self.module.__name__} needs the teacher's logits"):
            module(student, None, label)
        with pytest.raises(ValueError, match=f"{self.module.__name__} needs the teacher's logits"):
            module(StepContext(ModelOutput(student), None, label))
        with pytest.raises(ValueError, match="call the loss with"):
            module(student, teacher)

    def test_wrong_base_hyperparameters(self):
        for name, value in [("ce_weight", -0.1), ("ce_weight", float("nan")), ("warmup_epochs", 0)]:
            with pytest.raises(ValueError, match=f"{name}={value!r}"):
                self.module(**self.settings[0], **{name: value})
