"""Downloads, verifies and reads the archive of published CIFAR-100 teachers, without executing anything in it.

These are the teachers of the results of DKD, LSKD, RLD and others. mdistiller
(https://github.com/megvii-research/mdistiller) released them as one tar archive of pickled checkpoints.
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from rld_lightning.atomic_files import write_whole
from rld_lightning.download import download, open_tar, tar_members
from rld_lightning.models.factory import create_model
from rld_lightning.models.teacher.published import PUBLISHED, PUBLISHED_CLASSES, PUBLISHED_SHA256
from rld_lightning.models.weights.read import WeightsError, read_torch_weights
from rld_lightning.models.weights.verify import verify_weights

_RECORD = ".published.json"  # the SHA-256 of the archive of each URL
_MOST_MEMBER_BYTES = 1 << 30  # ten times the largest

GIVE_A_FILE = "give a file with model.teacher.weights=/path/to/file"
OR_TRAIN_IT = "or train the teacher first with model.teacher.weights=fit"


class DownloadError(WeightsError):
    """Raised if the published teachers cannot be downloaded, or are not the expected ones."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; {GIVE_A_FILE}, {OR_TRAIN_IT}")


@contextmanager
def published_archive(url: str, folder: Path) -> Iterator["Archive"]:
    """Context with the downloaded archive, which is deleted on exit; without an error its checksum is recorded.

    Raises:
        DownloadError: it cannot be downloaded, or its checksum is not the one recorded in ``folder`` for this URL.
    """
    # The name contains a hash of the URL, so that a download is never continued with another archive.
    path = folder / f".{hashlib.sha256(url.encode()).hexdigest()[:16]}.partial"
    try:
        download(url, path)
    except (OSError, HTTPException, ValueError) as error:
        raise DownloadError(f"{url} cannot be downloaded ({getattr(error, 'reason', error)})") from error
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        record = folder / _RECORD
        known = _read_record(record)
        if known.get(url, sha256) != sha256:
            raise DownloadError(
                f"{url} is not the archive of the first download: its SHA-256 is {sha256[:12]}..., and "
                f"{record} has {known[url][:12]}...; if it was replaced for a good reason, remove that file"
            )
        yield Archive(path, url, sha256)
        write_whole(record, json.dumps(known | {url: sha256}, indent=1).encode())
    finally:
        path.unlink()


@dataclass(frozen=True)
class Archive:
    """A downloaded archive."""

    path: Path
    url: str
    sha256: str

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor], dict[str, object]]]:
        """Yields the name, weights and metadata of each requested teacher.

        Raises:
            DownloadError: the archive lacks one, or has another model in its place.
        """
        members = {name: f"cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth" for name in names}
        for name, (member, content) in zip(members, self._read_members(list(members.values())), strict=True):
            sha256 = hashlib.sha256(content).hexdigest()
            metadata: dict[str, object] = {
                "num_classes": PUBLISHED_CLASSES,
                "top1": PUBLISHED[name],
                "source": "published",
                "url": self.url,
                "archive_sha256": self.sha256,
                "member": member,
                "member_sha256": sha256,
            }
            yield name, self._parse(name, member, content, sha256), metadata

    def _parse(self, name: str, member: str, content: bytes, sha256: str) -> dict[str, Tensor]:
        """Reads one member, and verifies that it is the expected model."""
        try:
            if PUBLISHED_SHA256.get(name, sha256) != sha256:
                raise WeightsError(f"{member} has the SHA-256 {sha256}, not that of the published {name}")
            weights = read_torch_weights(io.BytesIO(content), source=member)
            with torch.device("meta"):
                verify_weights(create_model(name, num_classes=PUBLISHED_CLASSES), weights, name=name)
        except WeightsError as error:
            raise DownloadError(f"{self.url} has an unusable member: {error}") from error
        if not all(value.isfinite().all() for value in weights.state_dict.values()):
            raise DownloadError(f"{self.url} has an unusable member: {member} holds values that are not finite")
        return weights.state_dict

    def _read_members(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Reads members by name; nothing is extracted, so other members' paths do no harm."""
        try:
            with self.path.open("rb") as file, open_tar(file) as tar:
                members = {str(PurePosixPath(member.name)): member for member in tar_members(tar) if member.isreg()}
                if missing := [path for path in paths if path not in members]:
                    raise DownloadError(f"{self.url} lacks {', '.join(missing)}")
                self._check_sizes([members[path] for path in paths])
                for path in paths:
                    content = tar.extractfile(members[path])
                    assert content is not None  # of a regular file
                    yield path, content.read()
        except tarfile.TarError as error:
            raise DownloadError(f"{self.url} is not the expected tar archive of teachers ({error})") from error

    def _check_sizes(self, members: Sequence[tarfile.TarInfo]) -> None:
        """Refuses members that would fill the memory or disk, since a tar file may claim more than it holds."""
        for member in members:
            if member.issparse() or member.size > _MOST_MEMBER_BYTES:
                raise DownloadError(f"{self.url} has an unusable member: {member.name} claims {member.size:,} bytes")
        needed, free = sum(member.size for member in members), shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise DownloadError(
                f"the disk of {self.path.parent} has {free:,} bytes free, and the teachers in {self.url} take "
                f"{needed:,}"
            )


def _read_record(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
