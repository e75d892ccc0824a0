"""The measurements of a run's teacher, student alone and distilled student, and their table."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rld_lightning.runs.files import NETWORKS, read_json, write_json

ROLES = ("teacher", "student alone", "distilled student")
_LONGEST = 300  # characters of a name
_LARGEST = 1e18


@dataclass(frozen=True)
class Network:
    """A network of a run; written to ``networks.json``.

    Accuracies and calibration error (15 bins, Guo et al., arXiv 1706.04599) are in percent, NLL in nats, all on the
    test split. Time is the fastest of one image at a time, in float32 (of a teacher in its own ``dtype``) with batch
    norms folded into convolutions, on the run's device.
    """

    role: str  # of `ROLES`
    name: str  # for `create_model`
    split: str
    images: int
    top1: float
    top5: float | None
    nll: float
    ece: float
    # Number of parameters, of a teacher before its batch norms were folded; None for a program that has no count
    parameters: int | None
    macs: int | None  # multiply-accumulates for an image; None for such a program
    bytes: int  # of its weights file, or of its parameters if it has no such file
    milliseconds: float  # for an image
    device: str  # of the timing


_TEXTS = ("role", "name", "split", "device")
_OPTIONAL = ("top5", "parameters", "macs")
_PERCENT = ("top1", "top5", "ece")
_IN_TABLE: dict[str, Callable[[Network], str]] = {
    "network": lambda network: network.name,
    "top-1 %": lambda network: f"{network.top1:.2f}",
    "ECE %": lambda network: f"{network.ece:.2f}",
    "NLL": lambda network: f"{network.nll:.4f}",
    "parameters, M": lambda network: _millions(network.parameters, ".2f"),
    "MACs, M": lambda network: _millions(network.macs, ",.1f"),
    "file, MB": lambda network: f"{network.bytes / 1e6:.1f}",
    "one image, ms": lambda network: f"{network.milliseconds:.2f}",
}


def table_of(networks: Sequence[Network]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The header and rows of a table with one column per network and one row per measurement."""
    head = ("", *(network.role for network in networks))
    return head, [(what, *map(show, networks)) for what, show in _IN_TABLE.items()]


def write_networks(run: Path, networks: Sequence[Network]) -> None:
    """Writes ``networks.json`` in the run directory."""
    write_json(run / NETWORKS, [asdict(network) for network in networks])


def read_networks(run: Path) -> list[Network]:
    """Reads and checks ``networks.json`` of an untrusted folder; an empty list if there is none.

    Raises:
        ValueError: the file has unexpected contents.
    """
    path = run / NETWORKS
    if not path.exists():
        return []
    records = read_json(path)
    known = {field.name for field in fields(Network)}
    if not isinstance(records, list) or len(records) > len(ROLES) or not all(isinstance(one, dict) for one in records):
        raise ValueError(f"{path} is not a list of at most {len(ROLES)} networks. Move it away.")
    networks = []
    for one in records:
        values = dict.fromkeys(known) | {key: value for key, value in one.items() if key in known}
        if wrong := [key for key, value in values.items() if not _is_valid(key, value)]:
            raise ValueError(f"{path} has a network whose {sorted(wrong)[0]} is not as a run writes it. Move it away.")
        networks.append(Network(**values))
    return networks


def _is_valid(key: str, value: object) -> bool:
    if value is None:
        return key in _OPTIONAL
    if key == "role":
        return value in ROLES
    if key in _TEXTS:
        return isinstance(value, str) and 0 < len(value) <= _LONGEST
    whole = key in ("images", "parameters", "macs", "bytes")
    most = 100 if key in _PERCENT else _LARGEST
    return type(value) in ((int,) if whole else (int, float)) and 0 <= value <= most  # type: ignore[operator]


def _millions(count: int | None, form: str) -> str:
    return "-" if count is None else format(count / 1e6, form)
