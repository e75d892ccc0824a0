from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from helpers.data import epoch_of, merge, ready, same
from torchvision import transforms

from rld_lightning.data import Batch, InMemoryDataModule
from rld_lightning.data.augment import crop_flip, draw_crop_flip
from rld_lightning.data.base import ImageDataModule
from rld_lightning.data.randaugment import RandAugment, draw_randaugment
from rld_lightning.data.stratified import stratified_split


class Toy(InMemoryDataModule):
    """103 training and 41 test images of 6x5 pixels in three classes of different size."""

    name = "toy"
    num_classes = 3
    class_names = ("a", "b", "c")
    image_shape = (3, 6, 5)
    mean = (0.5, 0.4, 0.3)
    std = (0.2, 0.3, 0.4)

    def __init__(self, **options):
        super().__init__(**{"batch_size": 12, "eval_batch_size": 10, "padding": 2} | options)

    def read_split(self, train):
        size = 103 if train else 41
        generator = torch.Generator().manual_seed(size)
        images = torch.randint(256, (size, 6, 5, 3), dtype=torch.uint8, generator=generator)
        return images, torch.arange(size) % 6 // 3 + torch.arange(size) % 2


def toy(rank=0, world_size=1, **options):
    return ready(Toy(**options), rank, world_size)


def train_epoch(epoch=0, **options):
    return epoch_of(toy(**options).train_dataloader(), epoch)


# Epochs with and without the strong view pass the same tests.
views = pytest.mark.parametrize("strong_view", [False, True], ids=["one view", "two views"])


def test_batches_are_what_the_loops_expect():
    data = toy()
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, Batch)
    assert batch.images.shape == (12, 3, 6, 5)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.label.dtype == batch.index.dtype == torch.int64
    assert batch.strong is None
    assert torch.equal(batch.label, data.read_split(train=True)[1][batch.index])
    assert torch.equal(data.train_label, data.read_split(train=True)[1])
    loader = data.train_dataloader()
    assert len(loader) == len(list(loader)) == 9
    assert loader.batch_size == 12
    assert (data.train_size, data.val_size, data.test_size) == (103, 41, 41)


@pytest.mark.parametrize("train", [True, False])
def test_without_augmentation_images_are_torchvision_normalised(train):
    data = toy(augment=False)
    images, labels = data.read_split(train=train)
    batch = merge(data.train_dataloader() if train else data.test_dataloader())
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])
    assert torch.equal(batch.images, torch.stack([reference(images[i].numpy()) for i in batch.index]))
    assert torch.equal(batch.label, labels[batch.index])
    if not train:
        assert torch.equal(batch.index, torch.arange(41))


def test_training_images_are_shifted_and_mirrored_originals():
    data = toy()
    originals, _ = data.read_split(train=True)
    padded = torch.nn.functional.pad(originals, (0, 0, 2, 2, 2, 2))
    seen = set()
    for images, _, index, *_ in data.train_dataloader():
        pixels = (images.permute(0, 2, 3, 1) * torch.tensor(data.std) + torch.tensor(data.mean)) * 255
        for image, i in zip(pixels.round().byte(), index, strict=True):
            matches = [
                (top, left, flip)
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
                if torch.equal(image.flip(1) if flip else image, padded[i, top : top + 6, left : left + 5])
            ]
            assert len(matches) == 1
            seen.update(matches)
    assert len(seen) > 35


def test_flip_and_padding_can_be_disabled():
    plain = train_epoch(augment=False)
    assert same(train_epoch(padding=0, flip=False), plain)
    assert not same(train_epoch(padding=0), plain)
    assert not same(train_epoch(flip=False), plain)


def test_the_strong_view_does_not_change_the_first():
    one, two = train_epoch(2, seed=7), train_epoch(2, seed=7, strong_view=True)
    assert same([batch[:3] for batch in two], [batch[:3] for batch in one])
    evaluated = toy(strong_view=True, val_fraction=0.3)
    assert all(batch.strong is None for batch in [*evaluated.val_dataloader(), *evaluated.test_dataloader()])


def test_the_first_view_is_the_same_as_before_there_was_a_second():
    """Numbers recorded when batches had one view, so that published runs stay reproducible."""
    for batch, index, total in zip(
        train_epoch(1), ([77, 42, 86, 91], [74, 99, 0, 29]), (-436.251618, -333.669920), strict=False
    ):
        assert batch.index[:4].tolist() == index
        assert batch.images.double().sum().item() == pytest.approx(total, abs=1e-5)


def test_strong_view_is_a_crop_flip_and_randaugment_of_the_same_samples():
    loader = toy(strong_view=True).train_dataloader()
    loader.sampler.set_epoch(2)
    images = loader.split.images
    order, generator = loader.sampler.draw_order()
    for _ in range(2):  # the crops of the first view are drawn before
        crops = draw_crop_flip(103, padding=2, flip=True, generator=generator)
    draw = draw_randaugment(103, 6, 5, generator)
    expected = RandAugment(draw, [slice(0, 103)], 6, 5)(crop_flip(images, order, crops, 6, 5), 0)
    batches = list(loader)
    assert torch.equal(merge(batches).strong, loader.normalize(expected))
    first = batches[0]
    assert first.strong.shape == first.images.shape
    assert first.strong.dtype == torch.float32
    assert first.strong.is_contiguous(memory_format=torch.channels_last)


def test_strong_view_of_images_that_are_not_cropped():
    batch = merge(train_epoch(strong_view=True, augment=False, shuffle=False))
    kept = (batch.strong == batch.images).all(1).flatten(1).float().mean(1)
    assert (kept < 1).all()  # because of the hole
    assert kept.max() > 0.5  # if the other operation changes little


@views
def test_an_epoch_is_a_function_of_seed_and_epoch(strong_view):
    def views(epoch, seed):
        return [batch[3 * strong_view :] for batch in train_epoch(epoch, seed=seed, strong_view=strong_view)]

    assert same(views(2, seed=7), views(2, seed=7))
    assert not same(views(2, seed=7), views(3, seed=7))
    assert not same(views(2, seed=7), views(2, seed=8))
    assert not same(views(1, seed=0), views(0, seed=1))


def test_jumping_to_an_epoch_equals_running_all_before_it():
    loader = toy().train_dataloader()
    through = [epoch_of(loader, epoch) for epoch in range(4)]
    assert same(epoch_of(toy().train_dataloader(), 3), through[3])


def test_a_custom_loop_gets_the_next_epoch_each_time():
    loader = toy().train_dataloader()
    assert loader.state_dict() == {"epoch": 0, "batch": 0}
    passes = [list(loader) for _ in range(3)]
    assert all(same(batches, train_epoch(epoch)) for epoch, batches in enumerate(passes))
    next(iter(loader))  # an unfinished epoch starts over
    assert same(list(loader), train_epoch(3))


@pytest.mark.parametrize("batches", [1, 5, 9, 10], ids=["begin", "middle", "end", "next"])
def test_a_custom_loop_resumes_at_its_saved_state(batches):
    def endless(loader):
        while True:
            yield from loader

    loader = toy().train_dataloader()
    loader.sampler.set_epoch(1)
    whole = [batch for epoch in (1, 2, 3) for batch in train_epoch(epoch)]
    assert same(list(islice(endless(loader), batches)), whole[:batches])

    resumed = toy().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert same(list(islice(endless(resumed), 27 - batches)), whole[batches:])


def test_evaluation_is_the_same_each_time():
    loader = toy().test_dataloader()
    assert same(list(loader), list(loader))
    resumed = toy().test_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert same(list(resumed), list(loader))


def test_validation_split_is_stratified_disjoint_and_seeded():
    data = toy(val_fraction=0.3, augment=False)
    _, labels = data.read_split(train=True)
    kept, held_out = stratified_split(labels, 0.3, 0)

    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(103))
    assert (data.train_size, data.val_size, data.test_size) == (len(kept), len(held_out), 41)
    train, val = merge(data.train_dataloader()), merge(data.val_dataloader())
    assert torch.equal(torch.bincount(train.label), torch.bincount(labels[kept]))
    assert torch.equal(data.train_label, labels[kept])
    assert torch.equal(train.label, data.train_label[train.index])
    assert torch.equal(val.label, labels[held_out])
    assert torch.equal(val.index, torch.arange(len(held_out)))
    share = torch.bincount(val.label) / torch.bincount(labels)
    assert torch.allclose(share, torch.full((3,), 0.3), atol=0.03)

    assert torch.equal(stratified_split(labels, 0.3, 0)[1], held_out)
    assert not torch.equal(stratified_split(labels, 0.3, 1)[1], held_out)


def test_a_subset_is_a_fraction_of_the_training_split():
    whole, few, fewer = (toy(val_fraction=0.3, seed=4, subset=subset) for subset in (1, 0.25, 0.01))
    count, fewer_count = (torch.bincount(data.train_label) for data in (whole, few))
    assert torch.equal(fewer_count, (0.25 * count).round().long())
    assert torch.bincount(fewer.train_label).tolist() == [1, 1, 1]
    images = {tuple(image.flatten().tolist()) for image in whole.splits["train"].images}
    assert all(tuple(image.flatten().tolist()) in images for image in few.splits["train"].images)
    assert same(list(few.val_dataloader()), list(whole.val_dataloader()))
    assert sorted(merge(few.train_dataloader()).index.tolist()) == list(range(few.train_size))


def test_validation_is_the_test_split_unless_some_is_held_out():
    data = toy()
    assert same(list(data.val_dataloader()), list(data.test_dataloader()))
    assert data.describe() == ("toy: 3 classes, 3x6x5, 103 train and 41 test images, validated on the test split")
    held_out = toy(val_fraction=0.3, seed=4).describe()
    assert held_out.endswith(
        "72 train and 41 test images, validated on 31 held-out training images (stratified, seed 4)"
    )
    assert "\n" not in held_out


@pytest.mark.parametrize(
    ("device", "options", "batches"), [("cpu", {}, 4), ("meta", {}, 1), ("meta", {"eval_batch_size": 10}, 103)]
)
def test_evaluation_batches_are_larger_on_a_gpu(device, options, batches):
    data = Toy(**{"eval_batch_size": None} | options)
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)), world_size=1, global_rank=0
    )
    assert len(data.eval_sampler(1024)) == batches


def test_setup_reads_once():
    data = toy()
    data.read_split = None
    data.setup("test")
    assert len(list(data.test_dataloader())) == 5


def test_options_of_the_training_loader():
    assert len(train_epoch(drop_last=True)) == 8
    assert torch.equal(merge(train_epoch(shuffle=False)).index, torch.arange(103))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction=1.0 must be in \[0, 1\)"),
        ({"val_fraction": -0.1}, r"val_fraction=-0.1 must be in \[0, 1\)"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be in"),
        ({"padding": -1}, "padding=-1 must not be negative"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Toy(**options)


def test_a_split_that_cannot_be_stratified_is_refused():
    with pytest.raises(ValueError, match=r"val_fraction=0.01 of 103 images in 3 classes .* choose another fraction"):
        toy(val_fraction=0.01)


def test_batch_size_must_be_divisible_by_the_number_of_processes():
    with pytest.raises(
        ValueError, match=r"data\.batch_size=12 is the global batch and cannot be shared by 5 processes"
    ):
        toy(world_size=5).train_dataloader()


def test_sizes_before_setup_raise_and_name_the_calls_needed():
    with pytest.raises(RuntimeError, match=r"toy is not loaded yet: call prepare_data\(\) and setup\(\)"):
        Toy().describe()
    with pytest.raises(RuntimeError, match=r"toy is not loaded yet"):
        _ = Toy().train_label
    assert issubclass(Toy, ImageDataModule)


@views
def test_preparing_several_batches_at_once_gives_the_same_images(strong_view, monkeypatch):
    expected = train_epoch(strong_view=strong_view)
    monkeypatch.setattr(
        "rld_lightning.data.in_memory.InMemoryLoader._step_groups",
        lambda _, steps: [steps[first : first + 3] for first in range(0, len(steps), 3)],
    )
    together = train_epoch(strong_view=strong_view)
    assert same(together, expected)
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in together)


@pytest.mark.cuda
@views
def test_on_a_gpu_batches_are_bit_identical_and_steps_do_not_wait(strong_view):
    data = toy(strong_view=strong_view)
    expected = epoch_of(data.train_dataloader(), 1)
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cuda", 0))
    )
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    batches = iter(loader)
    first = next(batches)  # this moves the draws of the epoch to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    on_cpu = [Batch(*(None if values is None else values.cpu() for values in batch)) for batch in [first, *rest]]
    assert same(on_cpu, expected)


@pytest.mark.parametrize(
    ("options", "count"), [({}, 50), ({"flip": False}, 25), ({"padding": 0}, 2), ({"augment": False}, 1)]
)
def test_a_view_has_the_same_number_in_every_run(options, count):
    seen = {}
    for other in ({}, {"seed": 3}, {"val_fraction": 0.3}, {"subset": 0.5, "val_fraction": 0.3}):
        data = toy(**options, **other)
        assert data.train_views == 103 * count
        for epoch in range(3):
            batch = merge(epoch_of(data.train_dataloader(), epoch))
            for view, image in zip(batch.view.tolist(), batch.images, strict=True):
                assert 0 <= view < 103 * count
                assert torch.equal(seen.setdefault(view, image), image)
    assert len({tuple(image.flatten().tolist()) for image in seen.values()}) == len(seen)
    assert all(batch.view is None for batch in data.test_dataloader())


@pytest.mark.parametrize("options", [{}, {"flip": False}, {"padding": 0}, {"subset": 0.4, "val_fraction": 0.3}])
def test_a_view_created_by_its_number_equals_that_of_an_epoch(options):
    data = toy(**options)
    batch = merge(epoch_of(data.train_dataloader(), 3))
    assert all(torch.equal(*pair) for pair in zip(data.look_at(batch.view)[:3], batch[:3], strict=True))
    views = data.views_of(slice(0, data.train_size))
    assert set(batch.view.tolist()) <= set(views.tolist())
    assert len(views) * 103 == data.train_size * data.train_views
    assert torch.equal(data.look_at(data.views_of(slice(5, 7))).index.unique(), torch.tensor([5, 6]))


def test_views_facts_change_with_the_content_of_the_views():
    facts = toy().views_facts()
    assert toy(seed=1, val_fraction=0.3, batch_size=6, subset=0.5).views_facts() == facts
    for options in ({"padding": 1}, {"flip": False}, {"augment": False}):
        assert toy(**options).views_facts() != facts
    other = Toy()
    images, labels = other.read_split(train=True)
    other.read_split = lambda train: (images ^ 1, labels)
    assert ready(other).views_facts() != facts


def test_views_facts_need_no_second_reading():
    data, shared = toy(val_fraction=0.3), Toy(val_fraction=0.3)
    shared.take_over(data)
    facts = data.views_facts()
    for one in (data, shared):
        one.read_split = None
        one.setup()
        assert one.views_facts() == facts
    with pytest.raises(RuntimeError, match="not loaded yet"):
        Toy().views_facts()
