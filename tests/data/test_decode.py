import numpy as np
import pytest
import torch
from helpers.data import epoch_of, merge, ready, same
from PIL import Image

from rld_lightning.bench.data import pipelines, write_jpegs
from rld_lightning.data import ImageFolderDataModule, decode
from rld_lightning.data.augment import Normalize
from rld_lightning.data.bad_images import BadImageReport
from rld_lightning.data.decode import BadImageError, decode_image, decode_jpegs, jpeg_size, read_file, read_image
from rld_lightning.data.streaming import RandomCropFlip, StreamedImages, StreamingLoader

CPU = torch.device("cpu")


def noise(width, height, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(256, size=(6, 8, 4), dtype=np.uint8)
    image = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("RGB", "jpg", {}),
        ("RGB", "jpg", {"progressive": True}),
        ("RGB", "jpg", {"subsampling": 0}),
        ("L", "jpg", {}),
        ("CMYK", "jpg", {}),
        ("RGBA", "png", {}),
        ("LA", "png", {}),
        ("P", "png", {"bits": 4}),
        ("1", "png", {}),
        ("L", "png", {"transparency": 30}),
        ("RGB", "webp", {}),
        ("RGB", "webp", {"save_all": True, "append_images": [Image.new("RGB", (53, 41))]}),
        ("P", "gif", {}),
        ("RGB", "gif", {"save_all": True, "append_images": [Image.new("RGB", (53, 41))]}),
        ("RGB", "bmp", {}),
        ("RGB", "tiff", {}),
        ("RGB", "ppm", {}),
    ],
)
def test_every_decoder_gives_the_pixels_of_pillow(tmp_path, mode, suffix, options):
    path = tmp_path / f"image.{suffix}"
    noise(53, 41, mode).save(path, **options)
    expected = np.asarray(Image.open(path).convert("RGB"))
    for decoder in ("auto", "pil"):
        image = read_image(str(path), decoder)
        assert image.dtype == torch.uint8
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_pillow_reads_everything_where_torchvision_has_no_decoders(tmp_path, monkeypatch):
    noise(53, 41).save(tmp_path / "image.jpg")
    expected = read_image(str(tmp_path / "image.jpg"))
    monkeypatch.setattr(decode, "_torchvision_decode", None)
    assert torch.equal(read_image(str(tmp_path / "image.jpg")), expected)


def spoil(content, how):
    return {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "last bytes missing": content[:-10],
        "header only": content[:3],
        "text": b"not an image",
        "zeros": bytes(1000),
    }[how]


@pytest.mark.parametrize("how", ["empty", "truncated", "last bytes missing", "header only", "text", "zeros"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_damaged_files_have_one_kind_of_error(tmp_path, how, suffix):
    path = tmp_path / f"image.{suffix}"
    noise(90, 70).save(path)
    content = spoil(path.read_bytes(), how)
    # What is cut off the end of these files is beyond their pixels.
    if how == "last bytes missing" and suffix in ("png", "tiff"):
        content = content[:-100]
    path.write_bytes(content)
    for decoder in ("auto", "pil"):
        with pytest.raises(BadImageError):
            decode_image(read_file(str(path)), decoder)
        with pytest.raises(ValueError, match=rf"image.{suffix} cannot be read as an image \(\w.*\): replace or delete"):
            read_image(str(path), decoder)


def test_a_missing_file_is_a_bad_image(tmp_path):
    with pytest.raises(BadImageError, match="No such file"):
        read_file(str(tmp_path / "gone.jpg"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(5000)}, {"comment": "hi"}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_size_of_a_jpeg_is_in_its_header(tmp_path, mode, options):
    noise(53, 41, mode).save(tmp_path / "image.jpg", **options)
    assert jpeg_size(read_file(str(tmp_path / "image.jpg"))) == (41, 53)


def test_other_files_have_no_jpeg_size(tmp_path):
    noise(53, 41).save(tmp_path / "image.png")
    noise(53, 41).save(tmp_path / "image.jpg")
    png, jpeg = (read_file(str(tmp_path / name)) for name in ("image.png", "image.jpg"))
    assert [jpeg_size(content) for content in (png, jpeg[:0], jpeg[:30])] == [None] * 3


@pytest.mark.parametrize(("width", "height", "mode"), [(832, 640, "RGB"), (640, 640, "L"), (704, 512, "CMYK")])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_jpeg_is_the_image_at_a_fraction_of_its_size(tmp_path, width, height, mode, reduction):
    noise(width, height, mode).save(tmp_path / "image.jpg", quality=90)
    content = read_file(str(tmp_path / "image.jpg"))
    reduced = decode_image(content, reduction=reduction)
    assert reduced.shape == (3, height // reduction, width // reduction)
    small = torch.nn.functional.interpolate(
        decode_image(content)[None].float(), reduced.shape[1:], mode="bilinear", antialias=True
    )
    assert (small[0] - reduced).abs().mean() < 2


def test_large_jpegs_are_reduced_as_far_as_the_crop_allows():
    crop = RandomCropFlip((16, 16), (0.08, 1.0), flip=True)
    reductions = []
    for seed in range(60):
        torch.manual_seed(seed)
        reductions.append(crop.draw_reduction(300, 400))
        torch.manual_seed(seed)
        small = crop.make_params([torch.empty(3, -(-300 // reductions[-1]), -(-400 // reductions[-1]))])
        torch.manual_seed(seed)
        large = crop.make_params([torch.empty(3, 300, 400)])
        assert small["flip"] == large["flip"]
        # The same share of the reduced image, and at least twice what it is resized to.
        for side in ("height", "width"):
            assert abs(small[side] * reductions[-1] - large[side]) <= 2 * reductions[-1]
            assert small[side] >= 2 * 16 - 2
    assert set(reductions) == {2, 4, 8}
    assert crop.draw_reduction(40, 40) == 1


def test_a_reduced_training_image_looks_the_same(tmp_path):
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        noise(600, 450, seed=len(folder)).save(tmp_path / folder / "0.jpg", quality=90)
    whole = {"image_size": 64, "scale": (1.0, 1.0), "flip": False, "num_workers": 0}  # a crop that cannot be missed
    auto, pil = (
        merge(epoch_of(ready(ImageFolderDataModule(tmp_path, decode=decoder, **whole)).train_dataloader()))
        for decoder in ("auto", "pil")
    )
    difference = 255 * (auto.images - pil.images).abs() * 0.225
    assert 0 < difference.mean() < 0.5
    assert difference.max() < 16
    evaluated = [
        merge(ready(ImageFolderDataModule(tmp_path, decode=decoder, **whole)).test_dataloader()).images
        for decoder in ("auto", "pil")
    ]
    assert torch.equal(*evaluated)


def test_our_pipeline_and_pillows_give_the_same_crops(tmp_path):
    contenders = pipelines(write_jpegs(tmp_path, 6, 100, 75, 90), 32)
    expected, *_, from_files, from_shard, actual = (pipeline() for pipeline in contenders.values())
    assert torch.equal(from_files, from_shard)
    assert actual.shape == (6, 3, 32, 32)
    # Pillow and torch round differently when they resize.
    assert (actual - expected).abs().max() < 2.01 / 255 / 0.224


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                image = noise(30 + number, 25, "CMYK" if number == 1 else "RGB", seed=number + ord(name))
                image.save(tmp_path / split / name / f"{number}.{'png' if number == 3 else 'jpg'}")
    return tmp_path


def loader_of(data, decode, num_workers=0):
    dataset = StreamedImages(data.splits["train"], data.train_transform(), strong=True, decode=decode, replace=True)
    normalize = Normalize(data.mean, data.std, *data.image_shape[1:])
    report = BadImageReport()
    return StreamingLoader(dataset, data.train_sampler(), normalize, device=CPU, num_workers=num_workers, report=report)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_the_workers_leave_to_the_device_comes_out_the_same(folder, num_workers, caplog):
    (folder / "train" / "b" / "2.jpg").write_bytes((folder / "train" / "b" / "2.jpg").read_bytes()[:500])
    (folder / "train" / "a" / "0.jpg").write_bytes(b"")
    data = ready(ImageFolderDataModule(folder, image_size=16, batch_size=3))
    # decode=cuda with the CPU in the place of the GPU: the same calls, without nvJPEG.
    loader = loader_of(data, "cuda", num_workers)
    batches = epoch_of(loader, 1)
    assert same(batches, epoch_of(loader_of(data, "auto"), 1))
    assert sorted(merge(batches).index.tolist()) == [1, 1, 2, 3, 4, 5, 7, 7]
    assert {record.args[0][-7:] for record in caplog.records} == {"b/2.jpg", "a/0.jpg"}


def test_one_bad_file_does_not_spoil_the_batch_on_the_device(folder):
    contents = [read_file(str(path)) for path in sorted(folder.glob("train/a/*.jpg"))]
    contents.insert(1, contents[0][:300])
    images = decode_jpegs(contents, CPU)
    assert images[1] is None
    assert all(torch.equal(images[i], decode_image(contents[i])) for i in (0, 2, 3))
    assert decode_jpegs([], CPU) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_decoding_on_a_gpu_needs_one(tmp_path):
    with pytest.raises(ValueError, match="decode=cuda is for NVIDIA GPUs and none is there; use decode=auto"):
        ImageFolderDataModule(tmp_path, decode="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nvjpeg_gives_the_same_crops(folder):
    data = ready(ImageFolderDataModule(folder, image_size=16, batch_size=3, decode="cuda", num_workers=1))
    with pytest.raises(ValueError, match="decode=cuda needs a run on a GPU, and this one is on cpu"):
        data.train_dataloader()
    expected = merge(epoch_of(loader_of(data, "auto")))
    cuda = torch.device("cuda", 0)
    dataset = StreamedImages(data.splits["train"], data.train_transform(), strong=True, decode="cuda", replace=True)
    normalize = Normalize(data.mean, data.std, *data.image_shape[1:], cuda)
    loader = StreamingLoader(dataset, data.train_sampler(), normalize, device=cuda, num_workers=1)
    actual = merge(epoch_of(loader))
    assert torch.equal(actual.index.cpu(), expected.index)
    assert (actual.images.cpu() - expected.images).abs().mean() < 3 / 255 / 0.224


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "jpeg"}, "decode='jpeg' is unknown; choose auto or pil or cuda"),
        ({"bad_images": "skip"}, "bad_images='skip' is unknown; choose replace or error"),
        ({"subset": 0}, r"subset=0 must be in \(0, 1\]"),
        ({"subset": 1.5}, r"subset=1.5 must be in \(0, 1\]"),
    ],
)
def test_unknown_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(tmp_path, **options)
