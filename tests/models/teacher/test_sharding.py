"""A teacher sharded over two processes computes the same as the whole one, and is not part of the student."""

import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from rld_lightning.models.factory import create_model
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.teacher.sharding import blocks
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.tasks.run.plan import Teacher
from rld_lightning.tasks.teacher.weights import find_teacher

TAPS = ["layer1", "layer3.0.relu:in", "fc:in"]


def paths(model):
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in blocks(model)]


def test_residual_blocks_are_gathered_one_at_a_time():
    found = paths(create_model("resnet14"))
    assert found == ["conv1", "bn1", *(f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)), "fc"]


@pytest.mark.parametrize(
    ("name", "some", "attention", "largest"),
    [
        ("torchvision/vit_b_16", {"conv_proj", "encoder.layers.encoder_layer_0", "heads.head"}, 12, 0.1),
        ("torchvision/swin_t", {"features.0.0", "features.5.5", "head"}, 12, 0.3),
        ("torchvision/densenet121", {"features.denseblock3.denselayer24", "classifier"}, 0, 0.2),
        ("torchvision/vgg13", {"features.0", "classifier.6"}, 0, 0.8),
        ("torchvision/convnext_tiny", {"features.5.8", "classifier.2"}, 0, 0.2),
    ],
)
def test_other_families_have_blocks_too(name, some, attention, largest):
    with torch.device("meta"):
        model = create_model(name)
    found = paths(model)
    assert some <= set(found)
    parameters = [p for path in found for p in model.get_submodule(path).parameters()]
    total = sum(p.numel() for p in model.parameters())
    assert len(parameters) == len(set(parameters))
    assert sum(p.numel() for p in parameters) > 0.98 * total  # the rest are class tokens and position embeddings
    assert max(sum(p.numel() for p in model.get_submodule(path).parameters()) for path in found) < largest * total
    # Attention uses its projections' weights without calling them: they must be gathered with it.
    attentions = [path for path, module in model.named_modules() if "Attention" in type(module).__name__]
    assert len(attentions) == attention
    assert not any(path.startswith(f"{inside}.") for inside in attentions for path in found)


def test_a_fused_teacher_is_not_sharded():
    with pytest.raises(ValueError, match=r"model\.teacher\.fuse=false or model\.teacher\.shard=false"):
        FrozenTeacher(create_model("resnet8"), fuse=True, shard=True)


def test_one_process_cannot_shard(tmp_path):
    with pytest.raises(ValueError, match=r"there is one; take more devices \(trainer=ddp trainer\.devices=2\)"):
        find_teacher(Teacher("resnet8", "fit", "", None, {"shard": True}), "digits", TeacherStore(tmp_path))
    with pytest.raises(ValueError, match="at least two processes, not 1"):
        FrozenTeacher(create_model("resnet8"), shard=True).place(torch.device("cpu"))


class Direct(nn.Module):
    """Has weights outside of its blocks, and an odd number of rows, which two processes cannot divide equally."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    def forward(self, images):
        return self.scale * self.body(images)


def teachers():
    """Yields networks with their taps and images."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    yield create_model("resnet14", 10), {}, TAPS, images
    yield create_model("resnet8", 10), {"channels_last": True, "dtype": "bfloat16"}, TAPS, images
    yield Direct(), {}, ["body.1", "body"], images[:, :, :4, :4]


def compare(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(minutes=2), rank=rank, world_size=2)
    for model, options, taps, images in teachers():
        whole, device = FrozenTeacher(model, **options), torch.device("cpu")
        images = images + rank  # as in training, the processes see different images
        expected, features = whole(images, taps)
        keys, size = list(model.state_dict()), sum(p.numel() for p in model.parameters())
        teacher = FrozenTeacher(model, **options, shard=True)
        for _ in range(2):  # setup runs once for fitting and once for validation
            teacher.place(device, processes=2)
        for _ in range(2):
            logits, seen = teacher(images, taps)
            torch.testing.assert_close(logits, expected)
            assert not any(isinstance(tensor, DTensor) or tensor.requires_grad for tensor in (logits, *seen.values()))
            for path, feature in features.items():
                torch.testing.assert_close(seen[path], feature)
            # Resharded after each forward.
            assert all(isinstance(p, DTensor) and not p.requires_grad for p in teacher.parameters())
            held = sum(p.to_local().numel() for p in teacher.parameters())
            assert held == pytest.approx(size / 2, rel=0.25)  # rows are not divided
        assert not teacher.model.train(False).training
        assert list(teacher.model.state_dict()) == keys
    dist.barrier()
    dist.destroy_process_group()


def compare_and_leave(rank, folder):
    """Exits with the result of the comparison; gloo's threads sometimes abort an interpreter that shuts down."""
    try:
        compare(rank, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
def test_a_teacher_sharded_over_two_processes_computes_the_same(tmp_path):
    other = mp.get_context("spawn").Process(target=compare_and_leave, args=(1, tmp_path))
    other.start()
    compare(0, tmp_path)
    other.join(60)
    assert other.exitcode == 0
