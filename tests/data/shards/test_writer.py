"""Packing folders into shards, and indexing existing shards."""

import gzip
import io
import os
import shutil
import tarfile
import zlib

import fsspec
import pytest
from helpers.data import epoch_of, merge, same
from helpers.shards import folder_data, pack_folder, serve, shards_data, write_images

from rld_lightning.data.shards.index import ShardIndex
from rld_lightning.data.shards.writer import index_shards, list_shard

webdataset = pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


def test_webdataset_reads_packed_shards(folder, tmp_path):
    pack_folder(folder, tmp_path)
    data = folder_data(folder)
    originals = sorted((path.read_bytes(), number) for number, name in enumerate("abc")
                       for path in (folder / "train" / name).iterdir())  # fmt: skip
    addresses = sorted(map(str, tmp_path.glob("train-*.tar")))
    read = list(webdataset.WebDataset(addresses, shardshuffle=False))
    assert sorted((sample["jpeg"], int(sample["cls"])) for sample in read) == originals
    assert [int(sample["cls"]) for sample in read] == shards_data(tmp_path).train_label.tolist()
    assert len(read) == data.train_size


def test_packing_twice_gives_the_same_bytes_and_never_overwrites(folder, tmp_path):
    for name in "ab":
        pack_folder(folder, tmp_path / name)
    for path in (tmp_path / "a").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    with pytest.raises(ValueError, match=r"a holds shards already; choose another place"):
        pack_folder(folder, tmp_path / "a")
    with pytest.raises(ValueError, match=r"shard_mb=0 must be positive"):
        pack_folder(folder, tmp_path / "c", shard_mb=0)


@pytest.mark.parametrize("place", ["{}", "memory://bucket"])
def test_packing_restarts_after_an_interruption_and_keeps_complete_shards(folder, tmp_path, place, monkeypatch):
    target = place.format(tmp_path / "pe[t]s")
    store, path = fsspec.url_to_fs(target)
    names = [f"train-{number:06d}.tar" for number in (0, 90)]

    def interrupt(*_):
        raise KeyboardInterrupt

    try:
        for name in names:
            store.makedirs(path, exist_ok=True)
            store.pipe_file(f"{path}/{name}", b"others'")
        with pytest.raises(ValueError, match="holds shards already"):
            pack_folder(folder, target)
        for name in names:
            assert store.cat_file(f"{path}/{name}") == b"others'"
            store.rm_file(f"{path}/{name}")
        with monkeypatch.context() as patch:
            patch.setattr(ShardIndex, "write", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pack_folder(folder, target, shard_mb=0.001)  # many shards
        pack_folder(folder, target)
        pack_folder(folder, tmp_path / "alone")
        found = {file.rpartition("/")[2]: store.cat_file(file) for file in store.ls(path, detail=False)}
        assert found == {file.name: file.read_bytes() for file in (tmp_path / "alone").iterdir()}
    finally:
        store.rm(path, recursive=True)


def test_a_second_packing_into_the_same_folder_is_refused_while_the_first_goes_on(folder, tmp_path, monkeypatch):
    write = ShardIndex.write

    def meanwhile(index, target, options):
        with pytest.raises(ValueError, match=rf"another process is packing shards into {tmp_path}/pets: wait for it"):
            pack_folder(folder, target)
        write(index, target, options)

    pack_folder(folder, tmp_path / "alone")
    monkeypatch.setattr(ShardIndex, "write", meanwhile)
    pack_folder(folder, tmp_path / "pets")
    for path in (tmp_path / "pets").iterdir():
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()


def test_packing_into_object_storage(folder, tmp_path):
    store = fsspec.filesystem("memory")
    try:
        pack_folder(folder, "memory://bucket/pets")
        with pytest.raises(ValueError, match=r"memory://bucket/pets holds shards already"):
            pack_folder(folder, "memory://bucket/pets")
        pack_folder(folder, tmp_path / "here")
        data = shards_data("memory://bucket/pets", cache=tmp_path / "cache")
        assert same(epoch_of(data.train_dataloader()), epoch_of(shards_data(tmp_path / "here").train_dataloader()))
    finally:
        store.rm("/bucket", recursive=True)


@pytest.mark.parametrize("place", ["folder", "http"])
def test_an_index_of_existing_shards(folder, tmp_path, place):
    pack_folder(folder, tmp_path / "shards")
    expected = merge(shards_data(tmp_path / "shards").train_dataloader())
    for name in ("index.json", "index.npz"):
        (tmp_path / "shards" / name).unlink()
    with serve(tmp_path / "shards") as (address, _):
        counts = {split: len(list((tmp_path / "shards").glob(f"{split}-*.tar"))) for split in ("train", "test")}
        if place == "http":
            root = address
            patterns = {split: f"{root}/{split}-{{000000..{count - 1:06d}}}.tar" for split, count in counts.items()}
        else:
            root = tmp_path / "shards"
            patterns = {"train": f"{root}/train-*.tar", "test": f"{root}/test-*.tar"}
        index = index_shards(patterns, str(tmp_path / "index"), name="found", class_names=["a", "b", "c"])
        assert {split: len(shards) for split, shards in index.shards.items()} == counts
        look = {"image_size": 16, "resize": 18, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
        data = shards_data(tmp_path / "index", cache=tmp_path / "cache", **look)
        assert (data.name, data.class_names) == ("found", ["a", "b", "c"])
        assert same([merge(data.train_dataloader())], [expected])
        assert data.splits["train"].path(0).startswith(f"{root}/train-000000.tar/00000000_")


def test_class_names_default_to_numbers_and_must_suffice(folder, tmp_path):
    pack_folder(folder, tmp_path / "shards")
    patterns = {split: f"{tmp_path}/shards/{split}-*.tar" for split in ("train", "test")}
    index = index_shards(patterns, str(tmp_path / "index"), name="found")
    assert index.class_names == ["0", "1", "2"]
    assert index.shards["train"][0].path == f"{tmp_path}/shards/train-000000.tar"
    # An index beside its shards can be moved with them.
    index_shards(patterns, f"{tmp_path}/shards", name="found")
    (tmp_path / "shards").rename(tmp_path / "moved")
    assert shards_data(tmp_path / "moved", image_size=16).train_size == 45
    patterns = {split: f"{tmp_path}/moved/{split}-*.tar" for split in ("train", "test")}
    with pytest.raises(ValueError, match=r"the shards have a class 2 and there are 2 class names"):
        index_shards(patterns, str(tmp_path / "few"), name="found", class_names=["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"there are no shards at .*/nowhere-"):
        index_shards({"train": f"{tmp_path}/nowhere-*.tar"}, str(tmp_path / "few"), name="found")
    with pytest.raises(FileNotFoundError, match=r"nowhere-2.tar is missing"):
        index_shards({"train": f"{tmp_path}/nowhere-{{2..3}}.tar"}, str(tmp_path / "few"), name="found")


def tar_of(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def listed(content):
    return list_shard(io.BytesIO(content), "x.tar")


def test_samples_are_found_among_other_files():
    long = "ü" * 120
    content = tar_of(**{
        "__meta__": b"?", "n1/a.cls": b"3\n", "n1/a.JPG": b"image of a", "n1/a.json": b"{}", "n1/a.mask.png": b"mask",
        f"{long}.png": b"", f"{long}.cls": b"0", "README": b"",
    })  # fmt: skip
    samples = listed(content)
    assert samples.label.tolist() == [3, 0]
    assert [member.decode() for member in samples.member] == ["n1/a.JPG", f"{long}.png"]
    offset, size = int(samples.offset[0]), int(samples.size[0])
    assert content[offset : offset + size] == b"image of a"
    assert samples.size.tolist() == [10, 0]
    assert samples.crc32.tolist() == [zlib.crc32(b"image of a"), 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_of(**{"a.jpg": b"x"}), r"x.tar/a has no class \(.cls\)"),
        (tar_of(**{"a.cls": b"1"}), r"x.tar/a has no image \(.jpg"),
        (tar_of(**{"a.cls": b"1", "a.jpg": b"x", "a.png": b"x"}), "x.tar/a has more than one image"),
        (tar_of(**{"a.cls": b"-1", "a.jpg": b"x"}), "x.tar/a has the class -1"),
        (tar_of(**{"a.cls": b"9" * 15, "a.jpg": b"x"}), "x.tar/a.cls holds '9+' instead of a class number"),
        (tar_of(**{"a.cls": b"cat", "a.jpg": b"x"}), "x.tar/a.cls holds 'cat' instead of a class number"),
        (tar_of(), "x.tar has no images"),
        (b"", r"x.tar is not a whole tar file \(empty file\)"),
        (b"text" * 400, "x.tar is not a whole tar file"),
        (gzip.compress(tar_of(**{"a.cls": b"1", "a.jpg": b"x"})), "compressed shards have to be unpacked"),
    ],
)
def test_other_tar_files_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        listed(content)


def with_size(content, name, size):
    """Returns the tar file with another size in a member's header."""
    at = content.index(name.encode())
    header = bytearray(content[at : at + 512])
    header[124:136] = size.to_bytes(12, signed=True) if size < 0 else b"\x80" + size.to_bytes(11)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return content[:at] + bytes(header) + content[at + 512 :]


def sparse(content, name, size):
    """Returns the tar file with a sparse member that is one hole of this size."""
    at = content.index(name.encode())
    header = bytearray(content[at : at + 512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[257:265] = b"ustar  \0"
    header[345:512] = bytes(167)
    header[386:398] = b"%011o\0" % 0
    header[398:410] = b"%011o\0" % 0
    header[483:495] = b"\x80" + size.to_bytes(11)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return content[:at] + bytes(header) + content[at + 512 :]


@pytest.mark.parametrize("name", ["a.cls", "a.jpg"])
def test_members_that_claim_a_terabyte_are_refused_without_reading(name):
    content = tar_of(**{"a.cls": b"1", "a.jpg": b"x"})
    assert listed(with_size(content, name, 1)).label.tolist() == [1]
    message = r"too many for a class number" if name == "a.cls" else "x.tar is not a whole tar file"
    with pytest.raises(ValueError, match=message):
        listed(with_size(content, name, 10**12))
    with pytest.raises(ValueError, match=rf"x.tar/{name} is a sparse file, which shards do not hold"):
        listed(sparse(content, name, 10**12))


def test_a_member_of_negative_size_is_not_read_forever():
    content = tar_of(**{"a.cls": b"1", "a.jpg": b"x", "README": b"x"})
    with pytest.raises(ValueError, match=r"x.tar is not a whole tar file \(README has -512 bytes\)"):
        listed(with_size(content, "README", -512))


def test_a_damaged_map_of_a_sparse_member_is_part_of_a_damaged_tar():
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    info.size = 600
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"pixels" * 100))
    with pytest.raises(ValueError, match=r"x.tar is not a whole tar file \(a header that cannot be read, "):
        listed(buffer.getvalue())


def test_names_of_members_may_be_any_bytes():
    name = "\udcff\udcfe"  # not UTF-8
    samples = listed(tar_of(**{f"{name}.jpg": b"x", f"{name}.cls": b"1"}))
    assert samples.member.tolist() == [b"\xff\xfe.jpg"]


def test_a_shard_to_index_that_is_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(OSError, match=r"a.tar cannot be reached \(it is not a regular file\)"):
        index_shards({"train": f"{tmp_path}/a.tar"}, str(tmp_path), name="found")


def test_a_file_that_cannot_be_packed_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    path = next((tmp_path / "images" / "train" / "b").iterdir())
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(
        ValueError, match=rf"{path} cannot be packed \(it is not a regular file\): replace or delete it"
    ):
        pack_folder(tmp_path / "images", tmp_path / "shards")


@pytest.mark.parametrize("length", [100, 512, 700, 1024, 1500, 2048, 2100, 2500])
def test_a_shard_truncated_anywhere_is_refused(length):
    content = tar_of(**{"a.cls": b"1", "a.jpg": bytes(range(1, 256)) * 3})
    assert listed(content).label.tolist() == [1]
    with pytest.raises(ValueError, match=r"x.tar is not a whole tar file"):
        listed(content[:length])


def test_the_classes_of_a_packed_folder_are_balanced_over_shards(folder, tmp_path):
    pack_folder(folder, tmp_path)
    images = shards_data(tmp_path).splits["train"]
    classes = [len(images.labels[images.shard == shard].unique()) for shard in range(int(images.shard[-1]) + 1)]
    assert sum(count > 1 for count in classes) > 0.7 * len(classes)
