import io
import math
from copy import deepcopy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers.feature_tester import FeatureTester
from torch.testing import assert_close

from rld_lightning.losses import ModelOutput, StepContext
from rld_lightning.losses.features import CRDLoss, crd_loss
from rld_lightning.losses.features.crd import remember, similarities

LABEL = torch.tensor([2, 0, 1, 2, 2, 0, 1, 2, 4, 2, 0, 1])


class TestCRD(FeatureTester):
    module = CRDLoss
    settings = ({}, {"weight": 2.0, "negatives": 20, "dim": 16, "temperature": 0.1, "momentum": 0.9})
    wrong = (
        ({"weight": -1.0}, "weight=-1.0"),
        ({"negatives": 0}, "negatives=0"),
        ({"dim": 0}, "dim=0"),
        ({"dim": 2.5}, r"dim=2\.5 .* a whole number >= 1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
    )
    golden_method = "crd"

    def test_golden(self, case, dtype):
        """Three steps of the whole module, with the negatives of the reference."""
        tensors, hyper = case.tensors(dtype), case.hyper
        loss = CRDLoss(hyper["feat_weight"], hyper["negatives"], hyper["dim"], hyper["temperature"], hyper["momentum"])
        loss.build([tensors["student_pooled"][0].shape], [tensors["teacher_pooled"][0].shape])
        loss.make_memories(torch.arange(hyper["num_data"]))
        loss.to(dtype)
        weights = tensors["connector"] | {name: tensors[name] for name in ("memory_student", "memory_teacher")}
        names = {"embed_s.linear": "student_embedding", "embed_t.linear": "teacher_embedding"}
        names |= {"memory_student": "student_memory", "memory_teacher": "teacher_memory"}
        for golden, ours in names.items():
            weights = {key.replace(golden, ours): value for key, value in weights.items()}
        assert not loss.load_state_dict(weights, strict=False).unexpected_keys

        gradients = []
        for i, value in enumerate(case.expected["distillation_per_step"]):
            loss.draw = lambda index, i=i: tensors["contrast_index"][i]
            student = tensors["student_pooled"][i].requires_grad_()
            term = loss.feature_terms([student], [tensors["teacher_pooled"][i]], context(tensors["index"][i]))["crd"]
            assert term.dtype == dtype
            case.assert_value(term, value)
            gradients += torch.autograd.grad(term, student)
        case.assert_gradient("student_pooled", gradients)
        tolerance = {"rtol": 1e-6, "atol": 1e-6}
        assert_close(loss.student_memory, tensors["memory_student_after"], **tolerance)
        assert_close(loss.teacher_memory, tensors["memory_teacher_after"], **tolerance)
        expected = torch.tensor([case.expected["z_student_score"], case.expected["z_teacher_score"]], dtype=dtype)
        assert_close(loss.log_normaliser.exp(), expected, rtol=1e-6 if dtype == torch.float64 else 1e-5, atol=0)


def context(index):
    nothing = ModelOutput(torch.zeros(len(index), 2))
    return StepContext(nothing, nothing, torch.zeros(len(index), dtype=torch.long), index)


def built(label=LABEL, **hyper):
    """A loss for features of widths 5 and 7."""
    torch.manual_seed(1)
    loss = CRDLoss(**({"negatives": 4, "dim": 3} | hyper))
    loss.build([torch.Size((2, 5))], [torch.Size((2, 7))])
    loss.make_memories(label)
    return loss


def features(index, seed=0):
    """Features of the whole training set, so that an image has the same ones in every batch of a seed."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(len(LABEL), width, generator=generator) for width in (5, 7))
    return [student[index]], [teacher[index]], context(index)


# The formula


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_naive_formula(dtype):
    """With the reference's probabilities and its 1e-7, for one image and one negative at a time."""
    torch.manual_seed(0)
    student, teacher, ours, theirs = (F.normalize(torch.randn(n, 4)).to(dtype) for n in (3, 3, 9, 9))
    contrast = torch.randint(9, (3, 6))
    z = torch.tensor([50.0, 400.0]).double()
    noise = 5 / 9
    expected = 0.0
    for b in range(3):
        for embedding, memory, constant in ((student[b], theirs, z[0]), (teacher[b], ours, z[1])):
            for k in range(6):
                p = (embedding.double() @ memory[contrast[b, k]].double() / 0.2).exp() / constant
                expected = expected - ((p if k == 0 else noise) / (p + noise + 1e-7)).log()
    terms = crd_loss(student, teacher, ours, theirs, contrast, z.log().to(dtype), weight=1.5, temperature=0.2)
    assert terms["crd"].dtype == dtype
    assert_close(terms["crd"].double(), 1.5 * expected / 3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [6, 60], ids=["few_rows", "many_rows"])
def test_gradient_with_both_computations_of_the_similarities(rows):
    torch.manual_seed(0)
    student, teacher, ours, theirs = (F.normalize(torch.randn(n, 3, dtype=torch.float64)) for n in (2, 2, rows, rows))
    contrast = torch.randint(rows, (2, 4))
    assert (rows <= contrast.shape[1] * 3) == (rows == 6)
    assert_close(similarities(student, ours, contrast), torch.stack([ours[contrast[b]] @ student[b] for b in range(2)]))
    log_z = torch.zeros(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s, t: crd_loss(s, t, ours, theirs, contrast, log_z, temperature=0.5)["crd"],
        (student.requires_grad_(), teacher.requires_grad_()),
    )


@pytest.mark.parametrize("rows", [6, 60], ids=["few_rows", "many_rows"])
def test_memories_may_be_updated_before_the_backward_pass(rows):
    torch.manual_seed(0)
    embedding, memory = torch.randn(2, 3, requires_grad=True), torch.randn(rows, 3)
    contrast = torch.randint(rows, (2, 4))
    (expected,) = torch.autograd.grad(similarities(embedding, memory, contrast).sum(), embedding)
    scores = similarities(embedding, memory, contrast)
    memory.zero_()
    assert_close(torch.autograd.grad(scores.sum(), embedding)[0], expected)


def test_similar_memories_of_an_image_reduce_the_loss():
    torch.manual_seed(0)
    memory = F.normalize(torch.randn(10, 8))
    contrast = torch.arange(10).roll(-3).unsqueeze(0)
    own, other = memory[3:4], memory[4:5]
    log_z = torch.full((2,), 3.0)
    right = crd_loss(own, own, memory, memory, contrast, log_z)["crd"]
    wrong = crd_loss(other, other, memory, memory, contrast, log_z)["crd"]
    assert right < wrong


def test_extreme_scores_are_finite():
    student = torch.tensor([[1.0, 0.0]], requires_grad=True)
    memory = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    loss = crd_loss(student, student, memory, memory, torch.tensor([[0, 1]]), torch.zeros(2), temperature=1e-3)["crd"]
    loss.backward()
    assert_close(loss, torch.tensor(0.8 * 2 * 2000.0), rtol=1e-2, atol=0)
    assert student.grad.isfinite().all()


# Negatives


def test_negatives_are_all_images_of_other_classes_equally_often():
    loss = built(negatives=4)
    index = torch.arange(len(LABEL))
    counts = torch.zeros(len(LABEL), len(LABEL))
    for _ in range(500):
        contrast = loss.draw(index)
        assert torch.equal(contrast[:, 0], index)
        counts.scatter_add_(1, contrast[:, 1:], torch.ones(len(LABEL), 4))
        loss._steps += 1
    assert (counts[LABEL.unsqueeze(1) == LABEL] == 0).all()
    for row, label in zip(counts, LABEL, strict=True):
        others = row[label != LABEL]
        expected = 2000 / len(others)
        assert (others - expected).abs().max() < 5 * math.sqrt(expected)


def test_negatives_differ_from_step_to_step_and_are_the_same_in_every_run():
    first, second = built(), built()
    index = torch.arange(6)
    torch.manual_seed(5)
    draws = []
    for _ in range(3):
        draws.append(first.draw(index))
        assert torch.equal(second.draw(index), draws[-1])
        first._steps += 1
        second._steps += 1
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_small_data_has_fewer_negatives():
    assert built(negatives=100).negatives == 7  # of 12 images, 5 are of class 2
    assert built(negatives=5).negatives == 5
    with pytest.raises(ValueError, match="one class"):
        built(torch.zeros(4, dtype=torch.long))


# Memories


def test_memory_update():
    torch.manual_seed(0)
    memory = torch.randn(6, 3)
    before = memory.clone()
    new = F.normalize(torch.randn(3, 3))
    remember(memory, new, torch.tensor([4, 1, 4]), momentum=0.25)
    for row, embedding in ((1, new[1]), (4, new[2])):  # the last occurrence
        mixed = 0.25 * before[row] + 0.75 * embedding
        assert_close(memory[row], mixed / mixed.square().sum().sqrt())
    assert torch.equal(memory[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_normaliser_is_fixed_in_the_first_step():
    loss = built()
    before = deepcopy(loss)
    index = torch.tensor([3, 8, 0])
    student, teacher, step = features(index)
    loss.feature_terms(student, teacher, step)
    contrast = before.draw(index)
    for i, (embedding, feature, memory) in enumerate(
        (
            (loss.student_embedding, student, before.teacher_memory),
            (loss.teacher_embedding, teacher, before.student_memory),
        )
    ):
        unit = F.normalize(embedding(feature[0])).detach()
        scores = [(unit[b] @ memory[k] / 0.07).exp() for b in range(3) for k in contrast[b]]
        assert_close(loss.log_normaliser[i], (torch.stack(scores).mean() * len(LABEL)).log())
    fixed = loss.log_normaliser.clone()
    loss.feature_terms(*features(index + 1))
    assert torch.equal(loss.log_normaliser, fixed)


def test_a_resumed_run_continues_the_draws():
    loss = built()
    loss.feature_terms(*features(torch.tensor([3, 8, 0])))
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    # Readers of a checkpoint expect only tensors.
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    resumed = built()
    resumed.load_state_dict(state)
    for seed in (1, 2):
        batch = features(torch.tensor([1, 2, 8]), seed)
        assert_close(resumed.feature_terms(*batch), loss.feature_terms(*batch), rtol=0, atol=0)
    assert_close(resumed.state_dict(), loss.state_dict(), rtol=0, atol=0)


def test_memories_do_not_depend_on_the_seed_of_the_run():
    torch.manual_seed(7)
    first = built()
    torch.manual_seed(8)
    second = built()
    assert torch.equal(first.student_memory, second.student_memory)
    assert not torch.equal(first.student_memory, first.teacher_memory)


def test_all_buffers_are_own_buffers():
    assert {name for name, _ in built().named_buffers()} == set(CRDLoss.own_buffers)


def test_sample_positions_are_required():
    student, teacher, step = features(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="position of each image"):
        built().feature_terms(student, teacher, StepContext(step.student, step.teacher, step.label))


# Several processes

# Positions of three steps; the second process's batch is smaller in the last, and one image occurs twice.
WHOLE = ([3, 8, 0, 1], [5, 3, 7, 2], [9, 11, 9])


def train(rank, folder):
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(minutes=1), rank=rank, world_size=2)
    try:
        loss = built(negatives=7)
        draws = []
        for seed, whole in enumerate(WHOLE):
            index = torch.tensor(whole[2 * rank : 2 * rank + 2])
            draws.append(loss.draw(index)[:, 1:])
            loss.feature_terms(*features(index, seed))["crd"].backward()
        torch.save({"state": loss.state_dict(), "draws": draws}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_memories_of_one(tmp_path):
    other = mp.get_context("spawn").Process(target=train, args=(1, tmp_path))
    other.start()
    train(0, tmp_path)
    other.join()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_close(second["state"], first["state"], rtol=0, atol=0)
    assert not torch.equal(first["draws"][0], second["draws"][0])

    alone = built(negatives=7)
    # The constants depend on the first step's negatives, which each process draws itself.
    own = iter([torch.cat([first["draws"][0], second["draws"][0]])])
    draw = alone.draw
    alone.draw = lambda index: torch.cat([index.unsqueeze(1), next(own, draw(index)[:, 1:])], 1)
    for seed, whole in enumerate(WHOLE):
        alone.feature_terms(*features(torch.tensor(whole), seed))
    for name in ("student_memory", "teacher_memory", "log_normaliser"):
        assert_close(first["state"][name], getattr(alone, name), rtol=1e-6, atol=1e-6)
