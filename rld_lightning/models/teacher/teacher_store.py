"""A folder of trained teachers, and the resolution of a run's ``model.teacher.weights``."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from torch import Tensor, nn

from rld_lightning.atomic_files import write_whole
from rld_lightning.models.registry import canonical_name
from rld_lightning.models.teacher.published import PUBLISHED, PUBLISHED_DATASET, PUBLISHED_URL
from rld_lightning.models.teacher.published_archive import GIVE_A_FILE, OR_TRAIN_IT, published_archive
from rld_lightning.models.weights.read import WeightsError, read_metadata, read_once, split_part
from rld_lightning.models.weights.save import save_weights
from rld_lightning.models.weights.seal import is_damaged

# Values of model.teacher.weights for which the store is searched; what it lacks is downloaded or trained.
SEARCHED = ("auto", "fit", "published")
SOURCES = (*SEARCHED, "pretrained")  # any other value is a path

_WAYS_OUT = (
    f"{GIVE_A_FILE}, use a published teacher with model.teacher.weights=published "
    f"({PUBLISHED_DATASET}: {', '.join(map(canonical_name, PUBLISHED))}), {OR_TRAIN_IT}"
)


@dataclass(frozen=True)
class TeacherStore:
    """A folder of trained teachers, one safetensors file each: ``<root>/<dataset>/<name>.safetensors``.

    Names may have any spelling that :func:`~rld_lightning.models.registry.canonical_name` accepts; existing files are
    not renamed. The metadata of a file has ``dataset``, ``name``, ``num_classes``, ``top1`` and ``source``: ``fit`` for
    a teacher trained here, ``published`` for a downloaded one, with the ``url`` and checksums of the download.
    """

    root: Path

    def path(self, dataset: str, name: str) -> Path:
        """Returns the path for storing a teacher."""
        return Path(self.root).expanduser() / dataset / f"{canonical_name(name)}.safetensors"

    def find(self, dataset: str, name: str) -> Path | None:
        """Returns the path of a stored teacher; ``None`` if the store does not have it."""
        path = self.path(dataset, name)
        if path.is_file():
            return path
        others = sorted((Path(self.root).expanduser() / dataset).glob("*.safetensors"))
        return next((other for other in others if canonical_name(other.stem) == canonical_name(name)), None)

    def has(self, dataset: str, name: str) -> bool:
        """Whether the store has a teacher, undamaged."""
        path = self.find(dataset, name)
        return path is not None and not is_damaged(read_once(path))

    def save(
        self, model: nn.Module | Mapping[str, Tensor], dataset: str, name: str, metadata: Mapping[str, object]
    ) -> Path:
        """Stores a teacher, replacing an earlier one; its ``source`` is ``fit`` unless ``metadata`` has another.

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
        """Stores an unchanged copy of a run's weights file as a teacher, replacing an earlier one.

        Raises:
            WeightsError: it is damaged.
        """
        path, content = self.path(dataset, name), read_once(file)
        if is_damaged(content):
            raise WeightsError(f"{file} is damaged and is not stored as a teacher")
        write_whole(path, content)
        return path

    def download_published(self, url: str) -> list[Path]:
        """Downloads the published teachers that the store lacks, without replacing teachers that were trained here.

        The next call continues an interrupted download if the server allows it; of several processes, one downloads
        while the others wait. ``file://`` URLs work too.

        Returns:
            the files of all published teachers in the store.

        Raises:
            DownloadError: the archive cannot be downloaded, or is not the expected one.
        """
        folder = self.path(PUBLISHED_DATASET, "any").parent
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".published.lock"):
            if missing := [name for name in PUBLISHED if self.find(PUBLISHED_DATASET, name) is None]:
                with published_archive(url, folder) as archive:
                    for name, state_dict, metadata in archive.read(missing):
                        self.save(state_dict, PUBLISHED_DATASET, name, metadata)
        stored = (self.find(PUBLISHED_DATASET, name) for name in PUBLISHED)
        return [path for path in stored if path is not None and _is_published(path)]


def teacher_file(spec: str | os.PathLike[str]) -> Path:
    """Returns the path of a teacher's weights file, possibly with ``::`` and a part, after checking that it exists.

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
    """Finds the weights file for a value of ``model.teacher.weights``.

    Args:
        spec: a file; ``published`` for the published teacher, downloaded unless the store has it; ``fit`` for the
            store's teacher, or ``None`` if it is missing or damaged; ``auto`` for the store's teacher, else the
            published one.

    Returns:
        the file, or ``None`` if the caller has to train the teacher and store it.

    Raises:
        FileNotFoundError: ``spec`` is a path, and there is no such file.
        ValueError: there is no such teacher, or it cannot be downloaded (``DownloadError``).
    """
    if spec not in SEARCHED:
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
