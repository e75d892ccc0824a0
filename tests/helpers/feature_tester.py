"""The tests that every loss on features must pass, given the loss and how its golden cases call its function."""

from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from helpers.golden import golden_cases
from rld_lightning.losses import ModelOutput, StepContext
from rld_lightning.losses.features import FeatureLoss
from rld_lightning.models import create_model, forward_with_taps

PAIRS = (("resnet14", "resnet8"), ("wrn16_2", "wrn16_1"), ("vgg8", "mobilenetv2"), ("resnet8x4", "shufflev1"))
IMAGE_SHAPE = (3, 32, 32)
CLASSES = 10
TRAIN_LABEL = torch.arange(100) % CLASSES


class FeatureTester:
    """Base of the tests of a loss: a subclass named ``Test...`` sets the loss, and runs every test here.

    Attributes:
        module: the class.
        settings: hyper-parameters to test with; the first is used if one suffices.
        wrong: invalid hyper-parameters, each with a part of the message.
        golden_method: the name of the method in ``losses.json``, if it has one.
        pairs: teacher and student networks to connect.
        unconnectable: unsupported teachers and students, with a part of the message.
        vanishes: whether the method's terms are 0 if the student is the teacher (apart from connectors).
    """

    module: type[FeatureLoss]
    settings: tuple[dict, ...] = ({},)
    wrong: tuple[tuple[dict, str], ...] = (({"weight": -1.0}, "weight=-1.0"),)
    golden_method: str | None = None
    pairs: tuple[tuple[str, str], ...] = PAIRS
    unconnectable: tuple[tuple[str, str, str], ...] = ()
    vanishes = True

    def golden(self, case, tensors):
        """Calls the pure function for a golden case; returns terms by golden name (``tensors`` carry gradients)."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc):
        if "hyper" in metafunc.fixturenames:
            metafunc.parametrize("hyper", self.settings, ids=str)
        if "pair" in metafunc.fixturenames:
            metafunc.parametrize("pair", self.pairs, ids="_to_".join)
        if "case" in metafunc.fixturenames:
            runs = [(c, d) for c in golden_cases(self.golden_method) for d in c.dtypes] if self.golden_method else []
            metafunc.parametrize(("case", "dtype"), runs, ids=lambda value: str(value).removeprefix("torch."))
        if "wrong_hyper" in metafunc.fixturenames:
            metafunc.parametrize(("wrong_hyper", "message"), self.wrong)
        if "foreign" in metafunc.fixturenames:
            metafunc.parametrize("foreign", self.unconnectable, ids=lambda names: "_to_".join(names[:2]))

    @staticmethod
    def networks(teacher="resnet14", student="resnet8"):
        torch.manual_seed(0)
        return create_model(teacher, CLASSES).eval().requires_grad_(False), create_model(student, CLASSES).train()

    def connected(self, teacher, student, **hyper):
        loss = self.module(**(self.settings[0] | hyper))
        torch.manual_seed(1)
        loss.connect(student, teacher, IMAGE_SHAPE, TRAIN_LABEL)
        return loss

    @staticmethod
    def step(loss, teacher, student, size=6, epoch=None, seed=0, **options):
        """Returns a step's context for random images."""
        generator = torch.Generator().manual_seed(seed)
        like = next(student.parameters())
        images = torch.randn(size, *IMAGE_SHAPE, generator=generator).to(like)
        index = torch.randperm(len(TRAIN_LABEL), generator=generator)[:size]
        with torch.no_grad():
            teacher_output = ModelOutput(*forward_with_taps(teacher, images, loss.teacher_taps))
        student_output = ModelOutput(*forward_with_taps(student, images, loss.student_taps))
        return StepContext(student_output, teacher_output, TRAIN_LABEL[index], index, epoch, **options)

    # Tests

    def test_golden(self, case, dtype):
        tensors = case.tensors(dtype)
        fields = [field.removeprefix("grad_") for field in case.arrays if field.startswith("grad_")]
        leaves = []
        for field in fields:
            for tensor in tensors[field] if isinstance(tensors[field], list) else [tensors[field]]:
                leaves.append(tensor.requires_grad_())
        terms = self.golden(case, tensors)
        assert all(term.dtype == dtype for term in terms.values())
        case.assert_terms(terms)
        if not leaves:
            return
        gradients = list(torch.autograd.grad(sum(terms.values()), leaves))
        for field in fields:
            several = isinstance(tensors[field], list)
            case.assert_gradient(field, [gradients.pop(0) for _ in tensors[field]] if several else gradients.pop(0))

    @pytest.mark.thinned(3)
    def test_every_parameter_of_student_and_loss_learns(self, pair):
        teacher, student = self.networks(*pair)
        loss = self.connected(teacher, student)
        terms = loss(self.step(loss, teacher, student))
        assert all(term.shape == () and term.isfinite() for term in terms.values())
        sum(terms.values()).backward()
        # DDP hangs on parameters without gradient.
        for name, parameter in [*student.named_parameters(), *loss.named_parameters()]:
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_the_methods_terms_have_a_student_gradient(self, hyper):
        teacher, student = self.networks()
        loss = self.connected(teacher, student, **hyper)
        own = {name: term for name, term in loss(self.step(loss, teacher, student)).items() if name != "ce"}
        assert own
        for name, term in own.items():
            student.zero_grad()
            term.backward(retain_graph=True)
            assert next(student.parameters()).grad.abs().sum() > 0, name

    def test_the_state_dict_restores_the_loss(self):
        teacher, student = self.networks()
        loss = self.connected(teacher, student)
        loss(self.step(loss, teacher, student, seed=1))  # changes statistics and memories
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.add_(0.01)
        other = self.module(**self.settings[0])
        other.connect(student, teacher, IMAGE_SHAPE, TRAIN_LABEL)
        other.load_state_dict(deepcopy(loss.state_dict()), strict=True)
        torch.manual_seed(2)
        expected = loss(self.step(loss, teacher, student, seed=2))
        torch.manual_seed(2)
        assert_close(other(self.step(other, teacher, student, seed=2)), expected, rtol=1e-6, atol=1e-7)

    def test_bfloat16_features_give_float32_terms(self):
        teacher, student = self.networks()
        loss = self.connected(teacher, student)
        torch.manual_seed(3)
        expected = deepcopy(loss)(self.step(loss, teacher, student))
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            terms = loss(self.step(loss, teacher, student))
        for name, term in terms.items():
            assert term.dtype == torch.float32
            assert_close(term, expected[name], rtol=0.15, atol=0.02)

    def test_a_student_that_is_the_teacher_has_no_loss(self):
        if not self.vanishes:
            pytest.skip("not a property of this loss")
        teacher, _ = self.networks()
        loss = self.connected(teacher, teacher)
        if any(True for _ in loss.parameters()):
            pytest.skip("its connectors do not start as identities")
        own = loss(self.step(loss, teacher, teacher))
        own.pop("ce")
        assert_close(own, {name: torch.zeros(()) for name in own}, rtol=0, atol=1e-5)

    def test_connect_does_not_change_the_networks(self):
        teacher, student = self.networks()
        before = deepcopy(student.state_dict()), deepcopy(teacher.state_dict())
        self.connected(teacher, student)
        assert_close((student.state_dict(), teacher.state_dict()), before, rtol=0, atol=0)
        assert student.training
        assert not teacher.training

    def test_a_last_batch_of_one_image(self):
        teacher, student = self.networks()
        loss = self.connected(teacher, student)
        loss(self.step(loss, teacher, student))
        with torch.no_grad():
            student.eval()  # its batch norms see maps
        terms = loss(self.step(loss, teacher, student, size=1))
        sum(terms.values()).backward()
        assert all(term.isfinite() for term in terms.values())
        assert all(p.grad is None or p.grad.isfinite().all() for p in [*student.parameters(), *loss.parameters()])

    def test_incomparable_taps_raise(self):
        if not getattr(self.module, "single", False):
            pytest.skip("compares any number of features")
        taps = ["layer1", "layer2"]
        loss = self.module(**self.settings[0], student_taps=taps, teacher_taps=taps)
        teacher, student = self.networks()
        with pytest.raises(ValueError, match="compares one feature of each network"):
            loss.connect(student, teacher, IMAGE_SHAPE, TRAIN_LABEL)

    def test_warmup_scales_the_methods_terms_only(self):
        teacher, student = self.networks()
        loss = self.connected(teacher, student, warmup_epochs=4)
        # Two instances, because some losses have a memory.
        twin = deepcopy(loss)
        torch.manual_seed(4)
        full = twin(self.step(loss, teacher, student))
        torch.manual_seed(4)
        half = loss(self.step(loss, teacher, student, epoch=2))
        for name, term in half.items():
            assert_close(term, full[name] * (1 if name == "ce" else 0.5), rtol=1e-5, atol=1e-7)

    def test_invalid_hyper_parameters_raise(self, wrong_hyper, message):
        with pytest.raises(ValueError, match=message):
            self.module(**wrong_hyper)

    def test_networks_without_the_features_raise(self, foreign):
        teacher, student, message = foreign
        with pytest.raises(ValueError, match=message):
            self.connected(*self.networks(teacher, student))

    def test_an_unconnected_loss_raises(self):
        teacher, student = self.networks()
        loss = self.module(**self.settings[0])
        with pytest.raises(RuntimeError, match=r"call its connect\(\.\.\.\) first"):
            loss(self.step(loss, teacher, student))

    def test_logits_without_features_raise(self):
        teacher, student = self.networks()
        loss = self.connected(teacher, student)
        missing = [f"{path} of the student" for path in loss.student_taps]
        missing += [f"{path} of the teacher" for path in loss.teacher_taps]
        logits, label = torch.randn(4, CLASSES), torch.arange(4)
        for arguments in [(logits, logits, label), (StepContext(ModelOutput(logits), ModelOutput(logits), label),)]:
            with pytest.raises(ValueError, match="needs features that the step lacks") as error:
                loss(*arguments)
            said = str(error.value)
            assert all(one in said for one in missing)
            assert "StepContext" in said
            assert "forward_with_taps(student, images, loss.student_taps)" in said
