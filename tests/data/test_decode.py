import os
import socket
import zlib
from io import BytesIO

import numpy as np
import PIL
import pytest
import torch
from helpers.data import epoch_of, merge, ready, same
from PIL import Image, ImageOps

from rld_lightning.bench.data import pipelines, write_jpegs
from rld_lightning.data import ImageFolderDataModule, decode
from rld_lightning.data.augment import Normalize
from rld_lightning.data.bad_images import BadImageReport
from rld_lightning.data.crops import RandomCropFlip
from rld_lightning.data.decode import (
    MOST_BYTES,
    MOST_PIXELS,
    BadImageError,
    decode_image,
    decode_jpegs,
    read_file,
    read_header,
    read_image,
)
from rld_lightning.data.streaming import StreamedImages, StreamingLoader

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
    # The truncated end of these files is after their pixels.
    if how == "last bytes missing" and suffix in ("png", "tiff"):
        content = content[:-100]
    path.write_bytes(content)
    for decoder in ("auto", "pil"):
        with pytest.raises(BadImageError):
            decode_image(read_file(str(path)), decoder)
        with pytest.raises(ValueError, match=rf"image.{suffix} cannot be read as an image \(\w.*\): replace or delete"):
            read_image(str(path), decoder)


def test_damaged_tags_of_a_tiff_are_errors_without_warnings(tmp_path, recwarn):
    noise(20, 24).save(tmp_path / "image.tif", compression="tiff_lzw")
    content = (tmp_path / "image.tif").read_bytes()
    for length in range(8, len(content), 50):
        (tmp_path / "image.tif").write_bytes(content[:length])
        with pytest.raises(BadImageError):
            decode_image(read_file(str(tmp_path / "image.tif")))
    assert not [warning for warning in recwarn if "PIL" in warning.filename]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp"])
def test_a_flipped_bit_gives_an_error_or_another_image_but_no_crash(tmp_path, suffix):
    noise(90, 70).save(tmp_path / f"image.{suffix}")
    content = (tmp_path / f"image.{suffix}").read_bytes()
    generator = np.random.default_rng(0)
    for at in generator.integers(len(content), size=100):
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(generator.integers(8))
        for decoder in ("auto", "pil"):
            try:
                image = decode_image(torch.frombuffer(flipped, dtype=torch.uint8), decoder)
            except BadImageError:
                continue
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3


def test_a_missing_file_is_a_bad_image(tmp_path):
    with pytest.raises(BadImageError, match="No such file"):
        read_file(str(tmp_path / "gone.jpg"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(5000)}, {"comment": "hi"}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_size_of_a_jpeg_is_in_its_header(tmp_path, mode, options):
    noise(53, 41, mode).save(tmp_path / "image.jpg", **options)
    assert read_header(read_file(str(tmp_path / "image.jpg"))) == ("JPEG", 41, 53, 1)


def test_the_header_of_a_jpeg_is_read_like_the_jpeg_library(tmp_path):
    noise(53, 41).save(tmp_path / "image.jpg")
    content = (tmp_path / "image.jpg").read_bytes()
    another = content[content.index(b"\xff\xc0") :][:19].replace(bytes((0, 41, 0, 53)), bytes((9, 9, 9, 9)))
    # Fill bytes, skipped bytes, a marker without a length, and a header inside a comment.
    for between in (b"\xff\xff", b"text", b"\xff\xd0", b"\xff\x01", b"\xff\xfe\x00\x15" + another):
        changed = torch.frombuffer(bytearray(content[:2] + between + content[2:]), dtype=torch.uint8)
        assert read_header(changed) == ("JPEG", 41, 53, 1)


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_other_files_have_a_header_too(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    noise(53, 41).save(path)
    name = suffix.upper()
    assert read_header(read_file(str(path))) == (name, 41, 53, 1)


def upright(path):
    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).transpose(2, 0, 1)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_the_exif_orientation_is_applied_as_in_image_viewers(tmp_path, suffix, orientation):
    path = tmp_path / f"image.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(53, 41).save(path, exif=exif)
    content, expected = read_file(str(path)), upright(path)
    assert expected.shape == ((3, 53, 41) if 5 <= orientation <= 8 else (3, 41, 53))
    header = read_header(content)
    if suffix != "tiff":  # Pillow applies a TIFF's orientation itself
        assert (header.height, header.width) == expected.shape[1:]
        assert header.orientation == (orientation if 1 <= orientation <= 8 else 1)
    for decoder in ("auto", "pil"):
        image = decode_image(content, decoder)
        assert np.array_equal(image, expected)


def test_an_orientation_after_the_pixels_of_a_png_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(53, 41).save(tmp_path / "plain.png")
    noise(53, 41).save(tmp_path / "exif.png", exif=exif)
    plain, tagged = (tmp_path / "plain.png").read_bytes(), (tmp_path / "exif.png").read_bytes()
    at = tagged.index(b"eXIf") - 4
    chunk = tagged[at : at + 12 + int.from_bytes(tagged[at : at + 4])]
    (tmp_path / "image.png").write_bytes(plain[:-12] + chunk + plain[-12:])
    assert np.array_equal(read_image(str(tmp_path / "image.png")), upright(tmp_path / "image.png"))
    assert read_image(str(tmp_path / "image.png")).shape == (3, 53, 41)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\1" * 40]
)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_damaged_exif_tag_is_ignored(tmp_path, suffix, exif):
    noise(53, 41).save(tmp_path / f"image.{suffix}", exif=exif)
    assert read_image(str(tmp_path / f"image.{suffix}")).shape == (3, 41, 53)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_rotated_jpeg_is_reduced_by_the_crop_of_the_upright_image(tmp_path, orientation):
    """A photograph with an orientation tag and the same pixels saved upright give the same crops."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a", "b"):
        for split in ("train", "val"):
            (tmp_path / "tagged" / split / name).mkdir(parents=True)
            (tmp_path / "turned" / split / name).mkdir(parents=True)
            image = noise(640, 320, seed=ord(name))
            image.save(tmp_path / "tagged" / split / name / "0.jpg", quality=95, exif=exif)
            tagged = Image.open(tmp_path / "tagged" / split / name / "0.jpg")
            ImageOps.exif_transpose(tagged).save(tmp_path / "turned" / split / name / "0.jpg", quality=95, exif=b"")
    options = {"image_size": 32, "batch_size": 2, "num_workers": 0}
    seen = []
    for epoch in range(4):
        tagged, turned = (
            merge(epoch_of(ready(ImageFolderDataModule(tmp_path / name, **options)).train_dataloader(), epoch))
            for name in ("tagged", "turned")
        )
        assert (tagged.images - turned.images).abs().mean() < 3 / 255 / 0.224
        seen.append(tagged.images)
    assert not torch.equal(seen[0], seen[1])


# Earlier versions of Pillow read and write the last format with 32 bits.
PGM = pytest.param("pgm", marks=pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 11, reason="Pillow < 11"))


@pytest.mark.parametrize("suffix", ["png", "tiff", PGM])
def test_16_bit_grey_keeps_its_upper_8_bits(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(path)
    for decoder in ("auto", "pil"):
        image = read_image(str(path), decoder)
        assert np.array_equal(image, np.broadcast_to(values >> 8, (3, 256, 256)))
        assert image.dtype == torch.uint8


def test_16_bit_grey_and_colour_give_the_same_pixels(tmp_path):
    """Eight bits saved as sixteen are read as the same eight."""
    grey = np.asarray(noise(53, 41, "L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "image.png")
    assert np.array_equal(read_image(str(tmp_path / "image.png"))[0], grey)


@pytest.mark.parametrize("values", [np.zeros((4, 5), np.float32), np.zeros((4, 5), np.int32)])
def test_more_than_16_bits_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "image.tiff")
    with pytest.raises(BadImageError, match=r"mode [IF] has more than 16 bits a channel"):
        decode_image(read_file(str(tmp_path / "image.tiff")))


def claiming(width, height, suffix):
    """Returns a small file that claims to be large."""
    buffer = BytesIO()
    noise(53, 41).save(buffer, suffix)
    content = buffer.getvalue()
    if suffix == "png":
        header = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + content[24:29]
        content = content[:12] + header + zlib.crc32(header).to_bytes(4) + content[33:]
    elif suffix == "jpeg":
        content = content.replace(bytes((0, 41, 0, 53)), height.to_bytes(2) + width.to_bytes(2), 1)
    elif suffix == "bmp":
        content = content[:18] + width.to_bytes(4, "little") + height.to_bytes(4, "little") + content[26:]
    elif suffix == "ppm":
        content = content.replace(b"53 41", f"{width} {height}".encode(), 1)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def test_images_that_cost_more_than_their_pixels_are_not_decoded():
    def chunk(name, content=b""):
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    def png(width, *chunks):
        header = width.to_bytes(4) + (1).to_bytes(4) + bytes((8, 0, 0, 0, 0))
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks)
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    with pytest.raises(BadImageError, match="more than 65,536 chunks"):  # Pillow reads some ten thousand a second
        read_header(png(1, *[chunk(b"aaAa")] * 70_000))
    with pytest.raises(BadImageError, match="its 1,000,000 x 1 pixels are longer than 131,072"):
        read_header(png(1_000_000, chunk(b"IDAT")))


@pytest.mark.parametrize("suffix", ["png", "jpeg", "bmp", "ppm"])
@pytest.mark.parametrize(("width", "height"), [(16_000, 16_000), (65_000, 2_000), (12_000, 11_000)])
def test_images_with_more_pixels_than_any_camera_are_not_decoded(suffix, width, height, monkeypatch, recwarn):
    def never(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(decode, "_decode_with_torchvision", never)
    monkeypatch.setattr(decode, "_decode_with_pillow", never)
    for decoder in ("auto", "pil"):
        with pytest.raises(BadImageError, match=rf"more than (the limit of )?{MOST_PIXELS:,}"):
            decode_image(claiming(width, height, suffix), decoder)
    assert not recwarn.list
    assert read_header(claiming(11_000, 11_000, suffix))[1:3] == (11_000, 11_000)


def test_only_the_first_image_of_an_animation_is_decoded(tmp_path):
    frames = [Image.new("P", (60, 50), color) for color in range(200)]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    content = read_file(str(tmp_path / "image.gif"))
    assert read_header(content).format == "GIF"
    assert decode_image(content).shape == (3, 50, 60)


def test_formats_that_make_pillow_run_another_program_are_refused(tmp_path):
    noise(53, 41).save(tmp_path / "image.eps")
    for decoder in ("auto", "pil"):
        with pytest.raises(BadImageError, match="the format EPS is not supported"):
            decode_image(read_file(str(tmp_path / "image.eps")), decoder)


def test_only_regular_files_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path must be short
        server.bind("socket.jpg")
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    for name, reason in {
        "pipe": "not a regular file",
        "device": "not a regular file",
        "folder": "not a regular file|directory",
        "socket": "No such device",
        "sparse": r"its 1,024,000,001 bytes are more than the 1,024,000,000 of any image",
    }.items():
        with pytest.raises(BadImageError, match=reason):
            read_file(str(tmp_path / f"{name}.jpg"))


@pytest.mark.parametrize(("width", "height", "mode"), [(832, 640, "RGB"), (640, 640, "L"), (704, 512, "CMYK")])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_jpeg_is_the_image_at_reduced_size(tmp_path, width, height, mode, reduction):
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
        # The same share of the reduced image, and at least twice the target size.
        for side in ("height", "width"):
            assert abs(small[side] * reductions[-1] - large[side]) <= 2 * reductions[-1]
            assert small[side] >= 2 * 16 - 2
    assert set(reductions) == {2, 4, 8}
    assert crop.draw_reduction(40, 40) == 1


def test_a_reduced_training_image_looks_the_same(tmp_path):
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        noise(600, 450, seed=len(folder)).save(tmp_path / folder / "0.jpg", quality=90)
    whole = {"image_size": 64, "scale": (1.0, 1.0), "flip": False, "num_workers": 0}  # the crop is the whole image
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


def test_our_pipeline_and_pillow_give_the_same_crops(tmp_path):
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
def test_decoding_on_the_device_gives_the_same_batches(folder, num_workers, caplog):
    (folder / "train" / "b" / "2.jpg").write_bytes((folder / "train" / "b" / "2.jpg").read_bytes()[:500])
    (folder / "train" / "a" / "0.jpg").write_bytes(b"")
    data = ready(ImageFolderDataModule(folder, image_size=16, batch_size=3))
    # decode=cuda with the CPU in place of the GPU: the same calls, without nvJPEG.
    loader = loader_of(data, "cuda", num_workers)
    batches = epoch_of(loader, 1)
    assert same(batches, epoch_of(loader_of(data, "auto"), 1))
    assert sorted(merge(batches).index.tolist()) == [1, 1, 2, 3, 4, 5, 7, 7]
    assert {record.args[0][-7:] for record in caplog.records} == {"b/2.jpg", "a/0.jpg"}


def test_the_orientation_is_applied_after_decoding_on_the_device(folder):
    exif = Image.Exif()
    for orientation, path in zip((6, 8, 5), sorted(folder.glob("train/*/[02].jpg")), strict=False):
        exif[0x0112] = orientation
        Image.open(path).save(path, exif=exif, quality=95)
    data = ready(ImageFolderDataModule(folder, image_size=16, batch_size=3))
    turned = [read_header(read_file(path.decode())).orientation for path in data.splits["train"].paths]
    assert sorted(turned) == [1, 1, 1, 1, 1, 5, 6, 8]
    assert same(epoch_of(loader_of(data, "cuda")), epoch_of(loader_of(data, "pil")))
    assert same(epoch_of(loader_of(data, "cuda")), epoch_of(loader_of(data, "auto")))


def test_one_bad_file_does_not_fail_the_batch_on_the_device(folder):
    contents = [read_file(str(path)) for path in sorted(folder.glob("train/a/*.jpg"))]
    contents.insert(1, contents[0][:300])
    images = decode_jpegs(contents, CPU)
    assert images[1] is None
    assert all(torch.equal(images[i], decode_image(contents[i])) for i in (0, 2, 3))
    assert decode_jpegs([], CPU) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_decoding_on_a_gpu_needs_one(tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.decode=cuda is for NVIDIA GPUs and none is there; use data\.decode=auto"
    ):
        ImageFolderDataModule(tmp_path, decode="cuda")


@pytest.mark.cuda
def test_nvjpeg_gives_the_same_crops(folder):
    data = ready(ImageFolderDataModule(folder, image_size=16, batch_size=3, decode="cuda", num_workers=1))
    with pytest.raises(ValueError, match=r"data\.decode=cuda needs a run on a GPU, and this one is on cpu"):
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
