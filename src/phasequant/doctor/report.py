"""What a doctor says: rows (what runs, at which precision, beside what was promised), problems, notes."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from phasequant.numerics import QuantSpec
from phasequant.ranges import ranges

SIXTEEN = "16-bit"


@dataclass(frozen=True, slots=True)
class Precision:
    """Of one thing: as the checkpoint promises it, and as it will be."""

    promised: str
    real: str

    @property
    def kept(self) -> bool:
        """Whether they are the same."""
        return self.promised == self.real

    def __str__(self) -> str:
        return self.promised if self.kept else f"{self.promised} → {self.real}"


@dataclass(frozen=True, slots=True)
class Row:
    """One group of some blocks, which all run alike. `kernel` "" where nothing runs. `online`: what its input goes
    through first."""

    blocks: tuple[int, ...]
    group: str
    kernel: str
    weights: Precision
    inputs: Precision
    online: str = ""
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "blocks": list(self.blocks), "group": self.group, "kernel": self.kernel,
            "weights": {"promised": self.weights.promised, "real": self.weights.real},
            "inputs": {"promised": self.inputs.promised, "real": self.inputs.real},
            "online": self.online, "why": self.why,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class KVRow:
    """Keys and values of some blocks."""

    blocks: tuple[int, ...]
    states: Precision
    how: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"blocks": list(self.blocks), "promised": self.states.promised, "real": self.states.real,
                "how": self.how}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as promised: where, what, and what to do."""

    where: str
    what: str
    do: str


@dataclass
class Report:
    """All of it. `asked`: who gave the answers."""

    path: str
    kind: str
    target: str
    device: str
    asked: str
    rows: list[Row] = field(default_factory=list)
    kv: list[KVRow] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    online: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `as_promised` is what the exit status says."""
        return {
            "path": self.path, "kind": self.kind, "target": self.target, "device": self.device, "asked": self.asked,
            "as_promised": not self.problems,
            "groups": [row.to_dict() for row in self.rows],
            "kv": [row.to_dict() for row in self.kv],
            "folded": self.folded, "online": self.online, "notes": self.notes,
            "problems": [{"where": p.where, "what": p.what, "do": p.do} for p in self.problems],
        }  # fmt: skip


def merged(rows: Iterable[Any]) -> list[Any]:
    """Rows that differ in their blocks alone, as one; in the order of first blocks."""
    found: dict[Any, Any] = {}
    for row in rows:
        key = replace(row, blocks=())
        found[key] = replace(row, blocks=(*found[key].blocks, *row.blocks)) if key in found else row
    return list(found.values())


def together(problems: Iterable[Problem]) -> list[Problem]:
    """Problems that differ in their place alone, as one."""
    found: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        found.setdefault((problem.what, problem.do), []).append(problem.where)
    return [Problem("; ".join(where), what, do) for (what, do), where in found.items()]


def place(blocks: Iterable[int], group: str) -> str:
    """Like blocks 0-3, down."""
    told = ranges(blocks)
    return f"block{'s' if not told.isdecimal() else ''} {told}, {group}" if told else group


def short(spec: QuantSpec | None) -> str:
    """A grid in few words."""
    if spec is None:
        return SIXTEEN
    if not spec.is_int:
        return spec.kind
    size = f"group {spec.group_size}" if spec.group_size is not None else spec.granularity
    words = [f"int{spec.bits}", *(["static"] if spec.static else []), "" if spec.symmetric else "asym", f"per {size}"]
    told = " ".join(word for word in words if word)
    return f"{told}, rows by {spec.rows_by} in int{spec.wide.bits}" if spec.mixed else told
