"""The arrays of an index, read from an untrusted compressed file with a limit on the unpacked size."""

import zipfile
from collections.abc import Mapping
from io import BytesIO
from typing import NamedTuple

import numpy as np

from rld_lightning.errors import first_line

# Of all arrays; fourteen million images take some 800 MB.
MOST_BYTES = 1 << 32
_MOST_HEADER = 1 << 12


class Samples(NamedTuple):
    """The images of a split, in the order of its shards: NumPy arrays, which worker processes share.

    ``offset`` and ``size`` (int64) locate an image's bytes in its shard, ``label`` (int64) is its class and ``member``
    (bytes) its name there; ``crc32`` (uint32) is the CRC-32 of its bytes, or 0 if the index is of a version that had
    none. Each is ``(N,)``.
    """

    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    member: np.ndarray
    crc32: np.ndarray

    @classmethod
    def join(cls, parts: list["Samples"]) -> "Samples":
        """Concatenates the samples of several shards."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


# Kind and bytes of each array's values.
_TYPES = Samples(*["i8", "i8", "i8", "S", "u4"])  # type: ignore[arg-type]


def pack_samples(samples: Mapping[str, Samples]) -> bytes:
    """Returns the content of a file with the samples of each split, for :func:`unpack_samples`."""
    arrays = {f"{split}.{name}": values for split, own in samples.items() for name, values in own._asdict().items()}
    np.savez_compressed(buffer := BytesIO(), **arrays)
    return buffer.getvalue()


def unpack_samples(content: bytes, counts: Mapping[str, int]) -> dict[str, Samples]:
    """Reads the samples of each split.

    Args:
        content: the result of :func:`pack_samples`.
        counts: the number of images of each split.

    Raises:
        ValueError: it is not such a file, has other numbers of images, or would unpack to more than ``MOST_BYTES``.
    """
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            # Indexes of earlier versions have no checksums.
            fields = [name for name in Samples._fields if name != "crc32" or "train.crc32.npy" in archive.namelist()]
            names = {split: [f"{split}.{name}.npy" for name in fields] for split in counts}
            claimed = sum(archive.getinfo(name).file_size for own in names.values() for name in own)
            if claimed > MOST_BYTES:
                raise ValueError(f"its samples claim {claimed:,} bytes, more than the {MOST_BYTES:,} that are read")
            return {
                split: Samples(
                    *(_read_array(archive, name, counts[split]) for name in own),
                    *[np.zeros(counts[split], np.uint32)] * (len(Samples._fields) - len(own)),
                )
                for split, own in names.items()
            }
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # zipfile and NumPy's parser raise almost anything
        raise ValueError(f"its samples are not arrays: {first_line(error)}") from error


def _read_array(archive: zipfile.ZipFile, name: str, count: int) -> np.ndarray:
    """Reads an array of ``count`` values; the shape in the file does not determine how much is read."""
    with archive.open(name) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its arrays are of another version of NumPy's format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_MOST_HEADER)
        if len(shape) != 1 or fortran or dtype.hasobject or not dtype.itemsize:
            raise ValueError(f"{name} is not a one-dimensional array")
        split, field, _ = name.rsplit(".", 2)
        if not (dtype.isnative and dtype.str[1:].startswith(getattr(_TYPES, field))):
            raise ValueError(f"{name} is of {dtype}, not the type of the {field} of images")
        if shape[0] != count:
            raise ValueError(f"its {split} shards hold {count:,} images and {shape[0]:,} are listed")
        wanted = count * dtype.itemsize
        values = bytearray(file.read(wanted))
    if len(values) != wanted:
        raise ValueError(f"{name} is truncated after {len(values):,} of {wanted:,} bytes")
    return np.frombuffer(values, dtype) if count else np.empty(0, dtype)
