"""The arrays of an index are unpacked within their limits."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from rld_lightning.data.shards import samples as module
from rld_lightning.data.shards.samples import Samples, pack_samples, unpack_samples

COUNTS = {"train": 5, "test": 0}


def listed(count):
    whole = np.arange(count, dtype=np.int64)
    member = np.array([f"{i}.JPEG" for i in range(count)], dtype="S")
    return Samples(whole, whole + 1, whole % 2, member, whole.astype(np.uint32) + 7)


def content(**changes):
    """Returns a valid file, with other bytes for some of its arrays."""
    packed = pack_samples({split: listed(count) for split, count in COUNTS.items()})
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        arrays = {name: archive.read(name) for name in archive.namelist()}
    arrays |= {f"train.{name}.npy": value for name, value in changes.items()}
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            if value is not None:
                archive.writestr(name, value)
    return buffer.getvalue()


def npy(values, shape=None):
    np.save(buffer := io.BytesIO(), values, allow_pickle=True)
    return buffer.getvalue() if shape is None else buffer.getvalue().replace(b"(5,)", shape)


def test_packed_samples_are_unpacked_unchanged():
    found = unpack_samples(content(), COUNTS)
    for split, count in COUNTS.items():
        for values, expected in zip(found[split], listed(count), strict=True):
            assert np.array_equal(values, expected)
            assert values.flags.writeable


def test_an_index_without_checksums_is_read_with_zeros():
    found = unpack_samples(content(crc32=None), {"train": 5})["train"]
    assert found.crc32.dtype == np.uint32
    assert found.crc32.tolist() == [0] * 5
    assert np.array_equal(found.member, listed(5).member)


@pytest.mark.parametrize(
    ("changes", "counts", "words"),
    [
        ({"offset": npy(np.zeros(10**6, np.int64))}, COUNTS, "hold 5 images and 1,000,000 are listed"),
        ({"offset": npy(np.zeros(10**6, np.int64))}, {"train": 10**12, "test": 0}, "1,000,000 are listed"),
        ({"size": npy(np.zeros(5, np.int64), b"(10**12,)")}, COUNTS, "rld|malformed|header|shape"),
        ({"size": npy(np.zeros(5, np.int64))[:-8]}, COUNTS, "is truncated after 32 of 40 bytes"),
        ({"size": npy(np.zeros((5, 10**6), np.int8))}, COUNTS, "is not a one-dimensional array"),
        ({"label": npy(np.array([{}] * 5, object))}, COUNTS, "is not a one-dimensional array"),
        ({"label": b"\x93NUMPY\x02\x00"}, COUNTS, "another version"),
        ({"label": b"\x93NUMPY\x01\x00\xff\xff" + b"[" * 65535}, COUNTS, "larger than|malformed|header"),
        ({"member": None}, COUNTS, "its samples are not arrays"),
        ({"member": npy(np.zeros(5))}, COUNTS, "train.member.npy is of float64, not the type of the member of images"),
        ({"member": npy(np.array(["a"] * 5))}, COUNTS, "train.member.npy is of <U1"),
        ({"offset": npy(np.zeros(5, ">i8"))}, COUNTS, "train.offset.npy is of >i8"),
        ({"label": b"\x93NUMPY\x01\x00\xd0\x07" + b"[" * 2000}, COUNTS, "its samples are not arrays"),
    ],
)
def test_invalid_arrays_are_refused_before_unpacking(changes, counts, words):
    packed = content(**changes)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words):
            unpack_samples(packed, counts)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_oversized_arrays_are_not_unpacked(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 500)
    with pytest.raises(ValueError, match=r"its samples claim [\d,]+ bytes, more than the 500 that are read"):
        unpack_samples(content(), COUNTS)


@pytest.mark.parametrize("damaged", [b"", b"PK", content()[:-30], content().replace(b"train.size", b"train.sise")])
def test_damaged_archives_are_refused(damaged):
    with pytest.raises(ValueError, match="its samples are not arrays"):
        unpack_samples(damaged, COUNTS)
