"""Lists, downloads, trains and verifies the teachers of the store."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from rld_lightning.console import print_line, print_table, quiet_lightning
from rld_lightning.errors import UserError, did_you_mean, user_errors
from rld_lightning.hydra.checks.mistakes import checked
from rld_lightning.hydra.options import list_options
from rld_lightning.hydra.quoting import for_hydra, with_quotes
from rld_lightning.models.registry import canonical_name
from rld_lightning.models.teacher.published import PUBLISHED, PUBLISHED_DATASET, published_top1
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.models.weights.facts import WeightsFacts, read_facts
from rld_lightning.models.weights.read import WeightsError, read_metadata, read_once
from rld_lightning.models.weights.seal import is_damaged
from rld_lightning.runs.summary import Summary
from rld_lightning.tasks.evaluate import evaluate
from rld_lightning.tasks.fit import fit
from rld_lightning.tasks.run.make import make_data
from rld_lightning.tasks.teacher.training_lock import training_turn
from rld_lightning.tasks.teacher.weights import is_reusable, store_teacher

TOLERANCE = 0.1  # points: ten images of CIFAR-100's test split, for rounding on other hardware


@dataclass(frozen=True)
class Stored:
    """A teacher in the store."""

    dataset: str  # its data set
    path: Path  # its file
    sha256: str  # of the file
    facts: WeightsFacts  # facts from its file; empty if it cannot be used
    refusal: str = ""  # why it cannot be used; empty if it can

    @property
    def name(self) -> str:
        """The network's name."""
        return canonical_name(self.path.stem)

    @property
    def expected(self) -> float | None:
        """The expected top-1 in percent: as published, or as measured by its run."""
        return published_top1(self.dataset, self.name) if self.facts.source == "published" else self.facts.top1


def stored_teachers(store: TeacherStore) -> Iterator[Stored]:
    """Yields all teachers of a store, by data set and name, including damaged files."""
    for path in sorted(Path(store.root).expanduser().glob("*/*.safetensors")):
        content = read_once(path)
        facts, refusal = WeightsFacts(), f"{path} is damaged" if is_damaged(content) else ""
        try:
            facts = facts if refusal else read_facts(read_metadata(path), path)
        except WeightsError as error:
            refusal = str(error)
        yield Stored(path.parent.name, path, hashlib.sha256(content).hexdigest(), facts, refusal)


def print_teachers(store: TeacherStore) -> None:
    """Prints a store's teachers with accuracy, checksum and source, and the published teachers that it lacks."""
    found = list(stored_teachers(store))
    rows: list[tuple[object, ...]] = [
        (
            f"{teacher.dataset}/{teacher.name}",
            teacher.facts.top1,
            published_top1(teacher.dataset, teacher.name),
            teacher.sha256[:12],
            "unusable" if teacher.refusal else teacher.facts.source,
        )
        for teacher in found
    ]
    there = {teacher.name for teacher in found if teacher.dataset == PUBLISHED_DATASET}
    for name in sorted(set(map(canonical_name, PUBLISHED)) - there):
        published = published_top1(PUBLISHED_DATASET, name)
        rows.append((f"{PUBLISHED_DATASET}/{name}", None, published, None, "fetch gets it"))
    print_table(f"Teachers in {store.root}", ("teacher", "top-1 %", "published", "SHA-256", "source"), rows)
    for url in sorted({teacher.facts.url for teacher in found if teacher.facts.url}):
        print_line("from", url)
    for refusal in filter(None, (teacher.refusal for teacher in found)):
        print_line("unusable", refusal)


def fetch_teachers(store: TeacherStore, url: str) -> None:
    """Downloads the published teachers that a store lacks.

    Raises:
        DownloadError: the archive cannot be downloaded, or is not the expected one.
    """
    for path in store.download_published(url):
        print_line("teacher", str(path))


def fit_teacher(cfg: DictConfig) -> Summary:
    """Trains a single network, by ``conf/fit.yaml``, and stores it.

    Raises:
        UserError: the store has it already, other runs could not use it, or its training failed.
    """
    name = cfg.model.student.name
    with user_errors():
        if cfg.model.teacher is not None:
            raise ValueError(f"{cfg.model.label} is a pair; name the teacher alone, such as model=wrn40_2.")
        data = make_data(cfg.data)
        if not is_reusable(data, None):
            raise ValueError("a teacher of the store has learned from all images: data.val_fraction=0 data.subset=1.")
    store = TeacherStore(Path(cfg.paths.teachers))
    with training_turn(store, data.name, name, Path(cfg.paths.run)) as lacks:
        if not lacks:
            raise UserError(f"{store.find(data.name, name)} is there; move it away to train {name} again.")
        summary = fit(cfg)
        store_teacher(summary, Path(cfg.paths.run), store, data, name, None)
    kept = store.find(data.name, name)
    print_line("teacher", f"kept as {kept}" if kept else "not stored: it was not trained to the end on all images")
    return summary


def verify_teachers(store: TeacherStore, names: Sequence[str], overrides: Sequence[str]) -> None:
    """Evaluates teachers of a store on the test split, and compares with their expected accuracy.

    Args:
        overrides: of ``conf/eval.yaml``, such as ``data.root=...``; ``data=...`` restricts to one data set.

    Raises:
        UserError: a teacher does not exist, or its accuracy differs.
    """
    quiet_lightning()
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    found, dataset = list(stored_teachers(store)), given.get("data")
    if dataset is not None and dataset not in {teacher.dataset for teacher in found}:  # a folder's has its own name
        dataset = given.get("data.name") or Path(given.get("data.root", dataset)).expanduser().resolve().name
    teachers = _chosen(found, names, dataset, store)
    rows, wrong = [], []
    for teacher in teachers:
        top1 = difference = None
        if not teacher.refusal:
            run = Path(given.get("paths.runs", "runs")) / "verify" / teacher.dataset / teacher.name
            run.mkdir(parents=True, exist_ok=True)
            own = [f"weights={for_hydra(str(teacher.path))}", f"paths.run={for_hydra(str(run))}"]
            if "data" not in given:
                own.append(f"data={teacher.dataset}")
            top1 = evaluate(checked([*own, *with_quotes(overrides)], "eval"), classes_shown=0).top1
            difference = None if teacher.expected is None else round(top1 - teacher.expected, 4) + 0.0  # avoids -0
        verdict = "unusable" if teacher.refusal else _verdict(difference)
        if teacher.refusal or abs(difference or 0.0) > TOLERANCE:
            wrong.append(teacher.refusal or f"{teacher.path} is {verdict}")
        rows.append((f"{teacher.dataset}/{teacher.name}", top1, teacher.expected, difference, verdict))
    print_table("Teachers, measured", ("teacher", "top-1 %", "should be", "difference", ""), rows)
    if wrong:
        raise UserError("\n".join(wrong))


def _chosen(found: Sequence[Stored], names: Sequence[str], dataset: str | None, store: TeacherStore) -> list[Stored]:
    of_data = [teacher for teacher in found if dataset in (None, teacher.dataset)]
    there = [teacher.name for teacher in of_data]
    for name in names:
        if canonical_name(name) not in there:
            raise UserError(
                f"{name} is not in {store.root}; there are {', '.join(there) or 'none'}.{did_you_mean(name, there)}"
            )
    wanted = list(map(canonical_name, names)) or there
    chosen = [teacher for teacher in of_data if teacher.name in wanted]
    if not chosen:
        raise UserError(f"{store.root} holds no teacher; fetch or fit one, or name the folder with --root.")
    if unknown := sorted({teacher.dataset for teacher in chosen} - {dataset, *list_options("data")}):
        raise UserError(
            f"{unknown[0]} is not the name of a data set; say where it is, such as data=imagefolder data.root=..."
        )
    return chosen


def _verdict(difference: float | None) -> str:
    if difference is None:
        return "nothing to compare with"
    return "as it should be" if abs(difference) <= TOLERANCE else f"{difference:+.2f} points off what it should be"
