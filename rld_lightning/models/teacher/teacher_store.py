"""A folder of trained teachers, and the published ones that can be downloaded into it.

The published CIFAR-100 teachers are those that DKD, LSKD, RLD and others report with; mdistiller
(https://github.com/megvii-research/mdistiller) released them as one tar archive of pickled checkpoints. They are read
without executing anything, checked, and kept as safetensors with a note of where they came from.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath

import torch
from filelock import FileLock
from torch import Tensor, nn

from rld_lightning.atomic_files import write_whole
from rld_lightning.download import download, tar_members
from rld_lightning.models.factory import create_model
from rld_lightning.models.registry import canonical_name
from rld_lightning.models.teacher.published import (
    PUBLISHED,
    PUBLISHED_CLASSES,
    PUBLISHED_DATASET,
    PUBLISHED_SHA256,
    PUBLISHED_URL,
)
from rld_lightning.models.weights.read import (
    Weights,
    WeightsError,
    read_metadata,
    read_once,
    read_torch_weights,
    split_part,
)
from rld_lightning.models.weights.save import save_weights
from rld_lightning.models.weights.seal import is_damaged
from rld_lightning.models.weights.verify import verify_weights

# Weights of a teacher that are looked for, fetched or made when a run starts; others are a file's.
SOURCES = ("auto", "fit", "published", "pretrained")
_RECORD = ".published.json"  # the SHA-256 of the archive of each address
_MOST_MEMBER_BYTES = 1 << 30  # ten times the largest

_FILE = "give a file with model.teacher.weights=/path/to/file"
_FIT = "or train the teacher first with model.teacher.weights=fit"
_WAYS_OUT = (
    f"{_FILE}, use a published teacher with model.teacher.weights=published "
    f"({PUBLISHED_DATASET}: {', '.join(map(canonical_name, PUBLISHED))}), {_FIT}"
)


class DownloadError(WeightsError):
    """The published teachers could not be fetched, or are not what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; {_FILE}, {_FIT}")


@dataclass(frozen=True)
class TeacherStore:
    """Trained teachers, one safetensors file each: ``<root>/<dataset>/<name>.safetensors``.

    Names may be spelled in any way that :func:`~rld_lightning.models.registry.canonical_name` knows; files keep theirs.
    The metadata of a file says ``dataset``, ``name``, ``num_classes``, ``top1`` and ``source``: ``fit`` for a teacher
    trained here, ``published`` for a downloaded one, which also has the ``url`` and checksums of what was downloaded.
    """

    root: Path

    def path(self, dataset: str, name: str) -> Path:
        """Where a teacher is put."""
        return Path(self.root).expanduser() / dataset / f"{canonical_name(name)}.safetensors"

    def find(self, dataset: str, name: str) -> Path | None:
        """Where a teacher is; ``None`` if the store does not have it."""
        path = self.path(dataset, name)
        if path.is_file():
            return path
        others = sorted((Path(self.root).expanduser() / dataset).glob("*.safetensors"))
        return next((other for other in others if canonical_name(other.stem) == canonical_name(name)), None)

    def has(self, dataset: str, name: str) -> bool:
        """Whether a teacher is there and undamaged."""
        path = self.find(dataset, name)
        return path is not None and not is_damaged(read_once(path))

    def save(
        self, model: nn.Module | Mapping[str, Tensor], dataset: str, name: str, metadata: Mapping[str, object]
    ) -> Path:
        """Keeps a teacher, in place of an earlier one; its ``source`` is ``fit`` unless ``metadata`` says otherwise.

        Raises:
            WeightsError: it has values that are not finite.
        """
        state_dict = model.state_dict() if isinstance(model, nn.Module) else model
        if not all(value.isfinite().all() for value in state_dict.values()):
            raise WeightsError(f"{name} holds values that are not finite and is not stored as a teacher")
        path = self.path(dataset, name)
        save_weights(model, path, {"source": "fit", **metadata, "dataset": dataset, "name": canonical_name(name)})
        return path

    def add(self, file: Path, dataset: str, name: str) -> Path:
        """Keeps the weights that a run has left as a teacher, the file as it is, in place of an earlier one.

        Raises:
            WeightsError: it is damaged.
        """
        path, content = self.path(dataset, name), read_once(file)
        if is_damaged(content):
            raise WeightsError(f"{file} is damaged and is not stored as a teacher")
        write_whole(path, content)
        return path

    def download_published(self, url: str) -> list[Path]:
        """Fetches the published teachers that the store lacks; teachers that were trained here are not replaced.

        An interrupted download is continued by the next call where the server allows it, and of several processes
        one downloads while the others wait. ``file://`` addresses work too.

        Returns:
            the files of all published teachers in the store.

        Raises:
            DownloadError: the archive cannot be fetched, or is not what was expected.
        """
        folder = self.path(PUBLISHED_DATASET, "any").parent
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".published.lock"):
            if missing := [name for name in PUBLISHED if self.find(PUBLISHED_DATASET, name) is None]:
                # The address is in the name, so that a download is not continued with another archive.
                archive = folder / f".{_sha256(url.encode())[:16]}.partial"
                _download(url, archive)
                try:
                    self._store_members(archive, url, missing)
                finally:
                    archive.unlink()
        stored = (self.find(PUBLISHED_DATASET, name) for name in PUBLISHED)
        return [path for path in stored if path is not None and _is_published(path)]

    def _store_members(self, archive: Path, url: str, names: Iterable[str]) -> None:
        with archive.open("rb") as file:
            provenance = {"source": "published", "url": url, "archive_sha256": _sha256(file)}
        record = archive.with_name(_RECORD)
        known = _read_record(record)
        if known.get(url, provenance["archive_sha256"]) != provenance["archive_sha256"]:
            raise DownloadError(
                f"{url} is another archive than the one of the first download: its SHA-256 is "
                f"{provenance['archive_sha256'][:12]}..., and {record} has {known[url][:12]}...; if it was replaced "
                "for a good reason, remove that file"
            )
        members = {name: f"cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth" for name in names}
        for name, (member, content) in zip(members, _read_members(archive, url, members.values()), strict=True):
            weights = _parse_published(name, member, content, url)
            metadata = {
                "num_classes": PUBLISHED_CLASSES,
                "top1": PUBLISHED[name],
                **provenance,
                "member": member,
                "member_sha256": _sha256(content),
            }
            self.save(weights.state_dict, PUBLISHED_DATASET, name, metadata)
        write_whole(record, json.dumps(known | {url: provenance["archive_sha256"]}, indent=1).encode())


def teacher_file(spec: str | os.PathLike[str]) -> Path:
    """The path of a teacher's weights, which may ask for a part of the file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(spec).expanduser()
    if not split_part(path)[0].is_file():
        raise FileNotFoundError(f"there is no teacher's weights file at {path}; {_WAYS_OUT}")
    return path


def resolve_teacher_weights(
    spec: str | os.PathLike[str], *, name: str, dataset: str, store: TeacherStore, url: str = PUBLISHED_URL
) -> Path | None:
    """Finds the weights file that ``spec`` asks for.

    Args:
        spec: a file; or ``published``, the published teacher, downloaded unless the store has it; or ``fit``, the
            store's teacher, ``None`` if it has to be trained first, or again because its file is damaged; or ``auto``,
            the store's teacher, else the published.

    Returns:
        the file, or ``None`` if the caller is to train the teacher and put it in the store.

    Raises:
        FileNotFoundError: ``spec`` is a path, and there is no such file.
        ValueError: there is no such teacher, or it cannot be downloaded (``DownloadError``).
    """
    if spec not in ("auto", "published", "fit"):
        return teacher_file(spec)
    stored = store.find(dataset, name)
    if spec == "fit" and not store.has(dataset, name):
        return None
    if spec == "fit" or (stored and (spec == "auto" or _is_published(stored))):
        return stored
    if canonical_name(name) not in map(canonical_name, PUBLISHED) or dataset != PUBLISHED_DATASET:
        raise ValueError(
            f"there are no published weights of {name} for {dataset}, nor any in {store.root}; {_WAYS_OUT}"
        )
    if stored:
        raise ValueError(
            f"{stored} was trained here and is not replaced by the published teacher: move it away, or use it with "
            "model.teacher.weights=fit"
        )
    store.download_published(url)
    return store.find(dataset, name)


def _is_published(path: Path) -> bool:
    return read_metadata(path).get("source") == "published"


def _parse_published(name: str, member: str, content: bytes, url: str) -> Weights:
    """Reads one member of the archive, and makes sure that it is the model that it should be."""
    try:
        if PUBLISHED_SHA256.get(name, found := _sha256(content)) != found:
            raise WeightsError(f"{member} has the SHA-256 {found}, not that of the published {name}")
        weights = read_torch_weights(io.BytesIO(content), source=member)
        with torch.device("meta"):
            verify_weights(create_model(name, num_classes=PUBLISHED_CLASSES), weights, name=name)
    except WeightsError as error:
        raise DownloadError(f"{url} has an unusable member: {error}") from error
    if not all(value.isfinite().all() for value in weights.state_dict.values()):
        raise DownloadError(f"{url} has an unusable member: {member} holds values that are not finite")
    return weights


def _read_members(archive: Path, url: str, paths: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Reads members of a tar file by name; nothing is extracted, so it does not matter where the others point."""
    try:
        with tarfile.open(archive, "r:") as tar:
            members = {str(PurePosixPath(member.name)): member for member in tar_members(tar) if member.isreg()}
            if missing := [path for path in paths if path not in members]:
                raise DownloadError(f"{url} lacks {', '.join(missing)}")
            paths = list(paths)
            _check_sizes([members[path] for path in paths], archive, url)
            for path in paths:
                content = tar.extractfile(members[path])
                assert content is not None  # of a regular file
                yield path, content.read()
    except tarfile.TarError as error:
        raise DownloadError(f"{url} is not the expected tar archive of teachers ({error})") from error


def _check_sizes(members: Sequence[tarfile.TarInfo], archive: Path, url: str) -> None:
    """Refuses what would fill the memory, or the disk: a tar file may claim more than it holds."""
    for member in members:
        if member.issparse() or member.size > _MOST_MEMBER_BYTES:
            raise DownloadError(f"{url} has an unusable member: {member.name} claims {member.size:,} bytes")
    needed, free = sum(member.size for member in members), shutil.disk_usage(archive.parent).free
    if needed > free:
        raise DownloadError(
            f"the disk of {archive.parent} has {free:,} bytes free, and the teachers in {url} take {needed:,}"
        )


def _read_record(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _download(url: str, path: Path) -> None:
    try:
        download(url, path)
    except (OSError, HTTPException, ValueError) as error:
        raise DownloadError(f"{url} cannot be downloaded ({getattr(error, 'reason', error)})") from error


def _sha256(data: bytes | io.BufferedReader) -> str:
    digest = hashlib.sha256(data) if isinstance(data, bytes) else hashlib.file_digest(data, "sha256")
    return digest.hexdigest()
