import gc
import shutil

import numpy as np
import pytest
import torch
from helpers.data import epoch_of, merge, ready, same
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from rld_lightning.data import Batch, ImageFolderDataModule
from rld_lightning.data.crops import MOST_ASPECT
from rld_lightning.data.decode import read_image
from rld_lightning.data.randaugment import randaugment_image
from rld_lightning.data.streaming import KeySampler

CLASSES = ("cat", "dog", "owl")


def write_image(path, seed=0, mode="RGB"):
    """Saves smooth noise of a size and aspect ratio that depend on the seed."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(256, size=(4, 5, 4), dtype=np.uint8)
    size = tuple(generator.integers(20, 60, size=2).tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(noise).resize(size)
    image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
    image.save(path)


def write_classes(folder, counts=(8, 6, 7), names=CLASSES):
    modes = [("jpg", "RGB"), ("png", "RGB"), ("png", "L"), ("png", "RGBA"), ("png", "P"), ("jpeg", "CMYK")]
    for name, count in zip(names, counts, strict=True):
        for number in range(count):
            suffix, mode = modes[number % len(modes)]
            write_image(folder / name / f"{number:02d}.{suffix}", seed=10 * ord(name[0]) + number, mode=mode)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with 21 training and 10 test images."""
    folder = tmp_path_factory.mktemp("pets")
    write_classes(folder / "train")
    write_classes(folder / "val", counts=(4, 3, 3))
    return folder


def folder_data(root, rank=0, world_size=1, **options):
    options = {"image_size": 16, "batch_size": 6, "eval_batch_size": 4, "num_workers": 0} | options
    return ready(ImageFolderDataModule(root, **options), rank, world_size)


def train_epoch(root, epoch=0, **options):
    return epoch_of(folder_data(root, **options).train_dataloader(), epoch)


def test_batches_are_what_the_loops_expect(root):
    data = folder_data(root)
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, Batch)
    assert batch.images.shape == (6, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.label.dtype == batch.index.dtype == torch.int64
    epoch = merge(data.train_dataloader())
    assert sorted(epoch.index.tolist()) == list(range(21))
    assert torch.equal(epoch.label, data.train_label[epoch.index])
    assert torch.equal(data.train_label, data.splits["train"].labels)
    assert torch.bincount(epoch.label).tolist() == [8, 6, 7]


def test_classes_are_known_before_setup(root):
    data = ImageFolderDataModule(root)
    assert data.num_classes == 3
    assert data.class_names == list(CLASSES)
    assert data.image_shape == (3, 224, 224)
    assert data.resize == 256


def test_size_and_normalisation_default_to_imagenets():
    folder, usual = (ImageFolderDataModule("photos", **given) for given in ({"mean": None, "std": [0.5] * 3}, {}))
    assert (folder.mean, folder.std) == (usual.mean, (0.5, 0.5, 0.5))


def test_evaluation_is_resize_and_centre_crop(root):
    data = folder_data(root)
    reference = transforms.Compose(
        [
            transforms.Resize(18),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    batch = merge(data.test_dataloader())
    assert torch.equal(batch.index, torch.arange(10))
    for image, path in zip(batch.images, data.splits["test"].paths, strict=True):
        expected = reference(Image.open(path.decode()).convert("RGB"))
        # Resizing rounds to uint8; tensors and Pillow may differ by one of 255 steps.
        assert (image - expected).abs().max() < 1.01 / 255 / min(data.std)


@pytest.mark.parametrize("size", [(6000, 2), (2, 6000), (100_000, 1), (1, 1), (40, 1300), (30, 900)])
def test_a_thin_image_takes_no_more_memory_than_others(tmp_path, size, monkeypatch):
    data = ImageFolderDataModule(tmp_path, image_size=16)
    generator = np.random.default_rng(0)
    values = np.asarray(Image.fromarray(generator.integers(256, size=(9, 9, 3), dtype=np.uint8)).resize(size))
    image = torch.from_numpy(values.copy()).permute(2, 0, 1)
    expected = v2.Compose([v2.Resize(data.resize, antialias=True), v2.CenterCrop(16)])(image)
    areas = []
    resize = v2.functional.resize

    def watched(image, *args, **options):
        resized = resize(image, *args, **options)
        areas.append(resized.shape[-1] * resized.shape[-2])
        return resized

    monkeypatch.setattr(v2.functional, "resize", watched)
    result = data.eval_transform()(image)
    assert result.shape == (3, 16, 16)
    assert max(areas) <= MOST_ASPECT * data.resize**2
    # Cropping first gives the same centre, up to the fraction of a pixel by which sides are rounded.
    assert (result.int() - expected.int()).abs().max() <= (0 if max(size) <= MOST_ASPECT * min(size) else 2)
    assert data.train_transform()(image).shape == (3, 16, 16)


def test_training_crops_are_random_and_seeded(root):
    assert same(train_epoch(root, 1, seed=3), train_epoch(root, 1, seed=3))
    assert not same(train_epoch(root, 1, seed=3), train_epoch(root, 2, seed=3))
    assert not same(train_epoch(root, 1, seed=3), train_epoch(root, 1, seed=4))
    plain = merge(train_epoch(root, augment=False, shuffle=False))
    evaluated = folder_data(root, eval_batch_size=21)
    evaluated.splits["test"] = evaluated.splits["train"]
    evaluated.setup()
    assert torch.equal(plain.images, next(iter(evaluated.test_dataloader())).images)


def test_flip_can_be_disabled(root):
    whole = {"scale": (1.0, 1.0), "shuffle": False}
    flipped, plain = merge(train_epoch(root, **whole)), merge(train_epoch(root, flip=False, **whole))
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(flipped.images, plain.images, strict=True)]
    same_way = [torch.equal(a, b) for a, b in zip(flipped.images, plain.images, strict=True)]
    assert all(a or b for a, b in zip(mirrored, same_way, strict=True))
    assert 0 < sum(mirrored) < 21


def test_the_strong_view_does_not_change_the_first(root):
    one, two = train_epoch(root, 2), train_epoch(root, 2, strong_view=True)
    assert same([batch[:3] for batch in two], [batch[:3] for batch in one])
    first = two[0]
    assert first.strong.shape == first.images.shape
    assert first.strong.dtype == torch.float32
    assert first.strong.is_contiguous(memory_format=torch.channels_last)
    assert next(iter(folder_data(root, strong_view=True).val_dataloader())).strong is None


def test_the_strong_view_is_randaugment_of_another_crop(root):
    loader = folder_data(root, strong_view=True).train_dataloader()
    data, batch = folder_data(root), next(iter(loader))
    index, seed = next(iter(KeySampler(loader.sampler)))[0]
    image = read_image(data.splits["train"].paths[index].decode())
    torch.manual_seed(seed)
    first, crop = data.train_transform()(image), data.train_transform()(image)
    expected = randaugment_image(crop)
    assert not torch.equal(first, crop)
    assert not torch.equal(expected, crop)
    for actual, pixels in ((batch.images, first), (batch.strong, expected)):
        assert torch.equal(actual[:1], loader.normalize(pixels.permute(1, 2, 0)[None]))


def test_batches_do_not_depend_on_the_workers(root):
    alone = folder_data(root, strong_view=True).train_dataloader()
    with_workers = folder_data(root, num_workers=2, strong_view=True).train_dataloader()
    for epoch in (0, 1):
        for loader in (alone, with_workers):
            loader.sampler.set_epoch(epoch)
        assert same(list(with_workers), list(alone))
    # An unfinished epoch does not affect the next one.
    next(iter(with_workers))
    assert same(list(with_workers), list(alone))


def test_workers_stop_at_once_when_the_loader_is_collected(root):
    loader = folder_data(root, num_workers=2).train_dataloader()
    list(loader)
    workers = loader._workers._iterator._workers
    loader.cycle = loader
    del loader
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)


def test_a_folder_with_three_splits(root, tmp_path):
    shutil.copytree(root, tmp_path / "pets")
    write_classes(tmp_path / "pets" / "test", counts=(2, 2, 1))
    data = folder_data(tmp_path / "pets")
    assert (data.train_size, data.val_size, data.test_size) == (21, 10, 5)
    assert data.describe() == (
        "pets: 3 classes, 3x16x16, 21 train and 5 test images, "
        "validated on the 10 images of the folder's own validation split"
    )
    assert len(merge(data.val_dataloader()).label) == 10


def test_validation_runs_on_the_folder_s_own_validation_split(root, tmp_path):
    shutil.copytree(root, tmp_path / "pets")
    write_classes(tmp_path / "pets" / "test", counts=(2, 2, 1))
    data = folder_data(tmp_path / "pets", val_fraction=0.2, split_file=tmp_path / "split.csv")
    assert (data.train_size, data.val_size, data.test_size) == (21, 10, 5)  # no change by val_fraction
    assert data.describe().endswith(
        "the 10 images of the folder's own validation split, so data.val_fraction=0.2 is ignored"
    )
    assert data.split_facts["val_fraction"] == 0  # written to the files of a run
    assert not (tmp_path / "split.csv").exists()  # nothing was split at random


def test_without_a_test_folder_val_is_the_test_split_and_some_of_train_is_held_out(root):
    data = folder_data(root, val_fraction=0.2)
    assert (data.train_size, data.val_size, data.test_size) == (16, 5, 10)
    assert data.describe().endswith("5 held-out training images (stratified, seed 0); val/ is the test split")


@pytest.mark.parametrize("folder", ["val", "valid", "validation", "test"])
def test_a_folder_with_two_splits(root, tmp_path, folder):
    shutil.copytree(root / "train", tmp_path / "train")
    shutil.copytree(root / "val", tmp_path / folder)
    data = folder_data(tmp_path, name="mine")
    assert (data.train_size, data.val_size, data.test_size) == (21, 10, 10)
    assert data.describe().startswith("mine: 3 classes")
    assert data.describe().endswith("validated on the test split")


def test_imagenets_test_folder_without_classes_is_ignored(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    write_image(tmp_path / "test" / "0.png")
    assert folder_data(tmp_path).test_size == 10


def test_a_flat_folder_s_test_split_does_not_depend_on_the_seed(root):
    data = folder_data(root / "train", test_fraction=0.3, seed=1)
    assert (data.train_size, data.test_size) == (14, 7)
    train, test = data.splits["train"], data.splits["test"]
    assert set(train.paths) | set(test.paths) == set(folder_data(root).splits["train"].paths)
    assert torch.bincount(test.labels).tolist() in ([3, 2, 2], [2, 2, 3])
    assert np.array_equal(folder_data(root / "train", test_fraction=0.3, seed=2).splits["test"].paths, test.paths)


def test_validation_can_be_held_out(root):
    data = folder_data(root, val_fraction=0.3, seed=2)
    assert (data.train_size, data.val_size, data.test_size) == (14, 7, 10)
    assert not set(data.splits["train"].paths) & set(data.splits["val"].paths)
    assert "7 held-out training images" in data.describe()


def test_a_subset_is_a_fraction_of_each_class_chosen_by_the_seed(root):
    def paths(**options):
        data = folder_data(root, **options)
        assert torch.equal(data.train_label, data.splits["train"].labels)
        return data.splits["train"].paths.tolist(), torch.bincount(data.train_label).tolist()

    (half, counts), (few, fewer) = paths(subset=0.5, seed=1), paths(subset=0.01, seed=1)
    assert (counts, fewer) == ([4, 3, 4], [1, 1, 1])
    assert half == sorted(half)
    assert set(few) < set(half)
    assert paths(subset=0.5, seed=1)[0] == half
    assert paths(subset=0.5, seed=2)[0] != half
    data = folder_data(root, subset=0.5, val_fraction=0.3, seed=1)
    whole = folder_data(root, val_fraction=0.3, seed=1)
    assert data.splits["val"].paths.tolist() == whole.splits["val"].paths.tolist()
    assert set(data.splits["train"].paths) < set(whole.splits["train"].paths)
    assert f" classes, 3x16x16, {data.train_size} train (subset 0.5) and 10 test images" in data.describe()
    batch = merge(epoch_of(data.train_dataloader()))
    assert sorted(batch.index.tolist()) == list(range(data.train_size))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", "png"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "bmp")]
)
def test_images_of_every_mode_are_read_as_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    write_image(path, mode=mode)
    image = read_image(str(path))
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(path).convert("RGB")))


def test_unreadable_images_are_named(tmp_path):
    broken, deep = tmp_path / "broken.jpg", tmp_path / "deep.tif"
    write_image(broken)
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken.jpg cannot be read as an image .* replace or delete it"):
        read_image(str(broken))
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(deep)
    with pytest.raises(ValueError, match=r"deep.tif .* more than 16 bits"):
        read_image(str(deep))


def test_folder_errors_are_raised_at_setup_and_name_the_cause(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder: set data\.root"):
        folder_data(tmp_path / "nowhere")

    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare has 0 class folders, at least two are needed"):
        folder_data(tmp_path / "bare")

    shutil.copytree(root, tmp_path / "empty")
    (tmp_path / "empty" / "train" / "fox").mkdir()
    (tmp_path / "empty" / "train" / "fox" / "notes.txt").touch()
    with pytest.raises(ValueError, match="train has class folders without an image, 'fox': add images"):
        folder_data(tmp_path / "empty")

    shutil.copytree(root, tmp_path / "differ")
    (tmp_path / "differ" / "val" / "owl").rename(tmp_path / "differ" / "val" / "elk")
    with pytest.raises(ValueError, match="val has other classes than train/: missing 'owl', unknown 'elk'; give both"):
        folder_data(tmp_path / "differ")

    shutil.copytree(root / "train", tmp_path / "lonely" / "train")
    with pytest.raises(
        ValueError,
        match=r"lonely has train/ but none of .*, test beside it: .* data\.root to .* hold out data\.test_fraction",
    ):
        folder_data(tmp_path / "lonely")

    shutil.copytree(root / "val", tmp_path / "untrained" / "val")
    with pytest.raises(ValueError, match=r"untrained has val/ but no train/ beside it: add the class folders"):
        folder_data(tmp_path / "untrained")

    write_classes(tmp_path / "few", counts=(1, 5, 5))
    with pytest.raises(ValueError, match=r"test_fraction=0.2 holds some .* only one of 'cat': add images of it"):
        folder_data(tmp_path / "few")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Val"),
        ("training", "validation"),
        ("training", "testing"),
        ("train_set", "val_set"),
        ("TRAIN", "TEST"),
        ("Training Data", "Test Data"),
        ("train-images", "test-images"),
        ("trainset", "testset"),
        ("train", "Valid"),
        ("TrainSplit", "dev"),
    ],
)
def test_other_common_names_of_splits_are_recognised(root, tmp_path, train, test):
    shutil.copytree(root / "train", tmp_path / train)
    shutil.copytree(root / "val", tmp_path / test)
    data, expected = folder_data(tmp_path), folder_data(root)
    assert data.class_names == list(CLASSES)
    assert (data.train_size, data.val_size, data.test_size) == (21, 10, 10)
    assert same(list(data.train_dataloader()), list(expected.train_dataloader()))
    assert same(list(data.test_dataloader()), list(expected.test_dataloader()))


def test_three_splits_with_other_names(root, tmp_path):
    for name, source in (("Training", "train"), ("Validation_Set", "val"), ("TEST", "val")):
        shutil.copytree(root / source, tmp_path / name)
    data = folder_data(tmp_path)
    assert data.has_own_validation
    assert set(data.splits) == {"train", "val", "test"}
    (tmp_path / "Training").rename(tmp_path / "train")
    shutil.copytree(root / "val", tmp_path / "VAL")
    with pytest.raises(ValueError, match=r"has 'VAL', 'Validation_Set', which may all be the val split: rename one to"):
        folder_data(tmp_path)
    # The documented name has precedence.
    (tmp_path / "VAL").rename(tmp_path / "val")
    assert folder_data(tmp_path).splits["val"].path(0).startswith(f"{tmp_path}/val/")


@pytest.mark.parametrize("names", [("fold1", "fold2"), ("trainval", "test"), ("a", "b", "c"), ("Zug", "Test")])
def test_folders_with_equal_subfolders_are_not_classes(root, tmp_path, names):
    for name in names:
        shutil.copytree(root / "train", tmp_path / name)
        (tmp_path / name / "._.jpg").touch()  # written by macOS; not an image
    with pytest.raises(
        ValueError, match=r"has no images in '.*' but the same folders in each, 'cat', 'dog', 'owl': if"
    ):
        folder_data(tmp_path)
    # Likewise inside a split.
    for split in ("train", "val"):
        for name in names:
            shutil.copytree(root / "train", tmp_path / "in" / split / name)
    with pytest.raises(ValueError, match="but the same folders in each"):
        folder_data(tmp_path / "in")


def test_classes_may_contain_folders(root, tmp_path):
    """Like Tiny ImageNet's, and with different subfolders in each."""
    for name in CLASSES:
        shutil.copytree(root / "train" / name, tmp_path / "tiny" / name / "images")
        shutil.copytree(root / "train" / name, tmp_path / "own" / name / f"{name}1")
        shutil.copytree(root / "train" / name, tmp_path / "own" / name / f"{name}2")
        shutil.copytree(root / "train" / name, tmp_path / "mixed" / name / "1")
        shutil.copytree(root / "train" / name, tmp_path / "mixed" / name / "2")
    shutil.copy(root / "train" / "owl" / "00.jpg", tmp_path / "mixed" / "owl")
    for folder, count in (("tiny", 21), ("own", 42), ("mixed", 43)):
        data = folder_data(tmp_path / folder)
        assert data.class_names == list(CLASSES)
        assert data.train_size + data.test_size == count


def test_classes_may_have_the_names_of_splits(tmp_path):
    write_classes(tmp_path, names=("Testing", "training", "truck"))
    assert folder_data(tmp_path).class_names == ["Testing", "training", "truck"]


def test_numbers_in_text_order_give_a_caution(tmp_path):
    write_classes(tmp_path / "text", counts=(5,) * 10, names=[str(number) for number in range(1, 11)])
    write_classes(tmp_path / "number", counts=(5,) * 10, names=[f"{number:02d}" for number in range(1, 11)])
    caution = (
        "; caution: classes in text order (1, 10, 2, ...), a network trained elsewhere may have them in numeric order"
    )
    assert folder_data(tmp_path / "text").describe().endswith(caution)
    assert "caution" not in folder_data(tmp_path / "number").describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 32, "resize": 16}, "data.image_size=32 and data.resize=16 do not fit"),
        ({"test_fraction": 0}, r"test_fraction=0 must be in \(0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule("somewhere", **options)


def test_pictures_in_unsupported_formats_are_counted(tmp_path):
    write_classes(tmp_path)
    hidden = ("cat/._00.jpg", "dog/.ipynb_checkpoints/00-checkpoint.jpg", "dog/.a/.b/c.gif", "owl/.hidden")
    for name in ("cat/a.gif", "dog/b.HEIC", "dog/c.heic", "owl/notes.txt", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    data = folder_data(tmp_path)
    assert data.describe().endswith("; caution: pictures in unsupported formats are skipped (2 .heic, 1 .gif)")
    assert data.train_size + data.test_size == 21
