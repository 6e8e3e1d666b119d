"""`PrecisionPlan`: which group of which block reads how many bits, and why.

One grid for all (`low`), and the groups that are raised above it, each with its reason. Plans are JSON, made to be read
and edited: delete a line of `raised` and that group reads the low grid again; give the file back with `--plan`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from phasequant.arch import GROUPS, ModelMap, Place
from phasequant.errors import PhaseQuantError, did_you_mean
from phasequant.nn import Activations
from phasequant.numerics import QuantSpec

KEYS = (
    "policy", "model", "a8_share", "weights", "kv", "low", "raised", "weights_raised", "kv_raised", "clips",
    "alpha", "rows",
)  # fmt: skip


@dataclass(frozen=True)
class Raised:
    """The grid of a raised group (None: 16 bits) and the reason."""

    spec: QuantSpec | None
    why: str


@dataclass(frozen=True)
class Rows:
    """Per-token precision of the low grid: by which measure single rows read 8 bits, from where on in each group, and
    the share of them on the calibration text."""

    by: str
    share: float
    above: Mapping[Place, float]


@dataclass(frozen=True)
class PrecisionPlan:
    """Weights, KV, and every group's activations of one model. None means 16 bits. `clips`: what was learned for single
    groups, instead of their grid's own clip. `alpha`: QFeM's threshold, where it left groups out. `rows`: single rows
    that read more than their group. `weights_raised`, `kv_raised`: groups whose weights, blocks whose keys and values
    have more bits than the others'."""

    policy: str
    model: ModelMap
    weights: QuantSpec | None = None
    kv: QuantSpec | None = None
    low: QuantSpec | None = None
    raised: Mapping[Place, Raised] = field(default_factory=dict)
    clips: Mapping[Place, float] = field(default_factory=dict)
    alpha: float | None = None
    rows: Rows | None = None
    weights_raised: Mapping[Place, Raised] = field(default_factory=dict)
    kv_raised: Mapping[int, Raised] = field(default_factory=dict)

    @property
    def weights_others(self) -> dict[Place, QuantSpec]:
        """The grids of weights that are not `weights`."""
        return {place: entry.spec for place, entry in self.weights_raised.items() if entry.spec is not None}

    def kv_at(self, block: int) -> QuantSpec | None:
        """The grid of a block's keys and values."""
        entry = self.kv_raised.get(block)
        return self.kv if entry is None else entry.spec

    def spec(self, block: int, group: str) -> QuantSpec | None:
        """The grid that a group reads."""
        entry = self.raised.get((block, group))
        spec = entry.spec if entry is not None else self.low
        clip = self.clips.get((block, group))
        if spec is None:
            return None
        if entry is None and self.rows is not None and (block, group) in self.rows.above:
            spec = replace(spec, rows_by=self.rows.by, above=self.rows.above[block, group])
        return spec if clip is None else replace(spec, clip=clip)

    @property
    def activations(self) -> Activations:
        """Every group's grid."""
        return {(block, group): self.spec(block, group) for block in self.model.blocks for group in GROUPS}

    @property
    def a8_share(self) -> float:
        """The fraction of all linear multiply-adds inside the blocks whose activations are read in 8 bits."""
        eight = sum(
            self.model.macs(group)
            for (_, group), spec in self.activations.items()
            if spec is not None and spec.bits == 8
        )
        return eight / self.model.macs_total

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "policy": self.policy,
            "model": {"fingerprint": self.model.fingerprint(), **self.model.describe()},
            "a8_share": round(self.a8_share, 6),
            "weights": self.weights and self.weights.to_dict(),
            "kv": self.kv and self.kv.to_dict(),
            "low": self.low and self.low.to_dict(),
            "raised": _raised_dict(self.raised),
            "weights_raised": _raised_dict(self.weights_raised),
            "kv_raised": {
                str(block): {**(entry.spec.to_dict() if entry.spec else {"bits": 16}), "why": entry.why}
                for block, entry in sorted(self.kv_raised.items())
            },
            "clips": {f"{block}.{group}": clip for (block, group), clip in sorted(self.clips.items(), key=_order)},
            "alpha": self.alpha,
            "rows": self.rows
            and {
                "by": self.rows.by,
                "share": self.rows.share,
                "above": {f"{b}.{g}": value for (b, g), value in sorted(self.rows.above.items(), key=_order)},
            },
        }

    def to_json(self) -> str:
        """For a file."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: Any, model_map: ModelMap) -> "PrecisionPlan":
        """Checked against the model; every problem is a `PhaseQuantError`."""
        if not isinstance(values, dict):
            raise PhaseQuantError("a plan is a JSON object: write one with `phasequant analyze` and edit it")
        for key in values:
            if key not in KEYS:
                raise PhaseQuantError(f"unknown key '{key}' in the plan: {did_you_mean(key, KEYS)}")
        missing = [key for key in ("model", "low", "raised") if key not in values]
        if missing:
            raise PhaseQuantError(f"the plan lacks '{missing[0]}': write one with `phasequant analyze` and edit it")
        made_for = values["model"] if isinstance(values["model"], dict) else {}
        if made_for.get("fingerprint") != model_map.fingerprint():
            here = model_map.describe()
            raise PhaseQuantError(
                f"the plan is for another model ({made_for.get('family')} with {made_for.get('blocks')} blocks of "
                f"width {made_for.get('d_model')}; this is {here['family']} with {here['blocks']} of "
                f"{here['d_model']}): make one with `phasequant analyze` on this model"
            )
        low = _spec(values["low"], "low", "activations")
        base = {**(low.to_dict() if low else {}), "clip": 1.0}
        raised = {
            _place(name, model_map, "raises"): Raised(_spec({**base, **own}, name, "activations"), why)
            for name, own, why in _entries(values["raised"], "raised", "BLOCK.GROUP")
        }
        weights = _spec(values.get("weights"), "weights", "weights", tuple(map(model_map.width_in, GROUPS)))
        kv = _spec(values.get("kv"), "kv", "kv", (model_map.shape.d_head,))
        return cls(
            str(values.get("policy", "by hand")),
            model_map,
            weights,
            kv,
            low,
            raised,
            _clips(values.get("clips") or {}, model_map),
            _alpha(values.get("alpha")),
            _rows(values.get("rows"), low, model_map),
            _weights_raised(values.get("weights_raised") or {}, weights, model_map),
            _kv_raised(values.get("kv_raised") or {}, kv, model_map),
        )

    @classmethod
    def from_json(cls, text: str, model_map: ModelMap) -> "PrecisionPlan":
        """From a file's text."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PhaseQuantError(f"the plan is not valid JSON ({error})") from error
        return cls.from_dict(values, model_map)


def _raised_dict(raised: Mapping[Place, Raised]) -> dict[str, Any]:
    return {
        f"{block}.{group}": {**(entry.spec.to_dict() if entry.spec else {"bits": 16}), "why": entry.why}
        for (block, group), entry in sorted(raised.items(), key=_order)
    }


def _entries(values: Any, key: str, places: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(place, grid's keys, why) of raised entries."""
    if not isinstance(values, dict):
        raise PhaseQuantError(f"the plan's '{key}' must be an object of {places} entries (empty: {{}})")
    for name, entry in values.items():
        if not isinstance(entry, dict):
            raise PhaseQuantError(f"the plan's entry for '{name}' must be an object such as {{\"bits\": 8}}")
        own = dict(entry)
        why = str(own.pop("why", "set by hand"))
        yield str(name), own, why


def _weights_raised(values: Any, base: QuantSpec | None, model_map: ModelMap) -> dict[Place, Raised]:
    """Groups whose weights have other bits."""
    found: dict[Place, Raised] = {}
    for name, own, why in _entries(values, "weights_raised", "BLOCK.GROUP"):
        if base is None:
            raise PhaseQuantError("the plan's 'weights_raised' raise weights that have 16 bits already")
        place = _place(name, model_map, "raises the weights of")
        spec = _spec({**base.to_dict(), **own}, f"weights of {name}", "weights", (model_map.width_in(place[1]),))
        if spec is None or spec.is_int != base.is_int:
            raise PhaseQuantError(f"the plan's weights at '{name}' must be codes, of the kind that the others are")
        found[place] = Raised(spec, why)
    return found


def _kv_raised(values: Any, base: QuantSpec | None, model_map: ModelMap) -> dict[int, Raised]:
    """Blocks whose keys and values have other bits."""
    found: dict[int, Raised] = {}
    for name, own, why in _entries(values, "kv_raised", "BLOCK"):
        if base is None:
            raise PhaseQuantError("the plan's 'kv_raised' raise keys and values that have 16 bits already")
        if not _is_block(name, model_map):
            raise PhaseQuantError(f"the plan raises the KV of block '{name}', which this model does not have")
        spec = _spec({**base.to_dict(), **own}, f"KV of block {name}", "kv", (model_map.shape.d_head,))
        if spec is None or replace(spec, bits=base.bits, clip=base.clip) != base:
            raise PhaseQuantError(f"the plan's KV of block {name} may differ from the others' in bits and clip alone")
        found[int(name)] = Raised(spec, why)
    return found


def _order(item: tuple[Place, Any]) -> tuple[int, int]:
    return item[0][0], GROUPS.index(item[0][1])


def _clips(values: Any, model_map: ModelMap) -> dict[Place, float]:
    """Learned clips of a plan."""
    if not isinstance(values, dict):
        raise PhaseQuantError("the plan's 'clips' must be an object of BLOCK.GROUP entries (or be left away)")
    found: dict[Place, float] = {}
    for name, clip in values.items():
        if not isinstance(clip, (int, float)) or not 0 < clip <= 1:
            raise PhaseQuantError(f"the plan's clip at '{name}' is not valid: a fraction in (0, 1], not {clip!r}")
        found[_place(name, model_map, "clips")] = float(clip)
    return found


def _rows(values: Any, low: QuantSpec | None, model_map: ModelMap) -> Rows | None:
    """Per-token precision of a plan."""
    if values is None:
        return None
    if not isinstance(values, dict) or set(values) != {"by", "share", "above"} or not isinstance(values["above"], dict):
        raise PhaseQuantError("the plan's 'rows' must be an object of by, share and above (or be left away)")
    if low is None:
        raise PhaseQuantError("the plan's 'rows' raise single rows above 'low', which is 16 bits already")
    share = values["share"]
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise PhaseQuantError(f"the plan's rows.share is a fraction, not {share!r}")
    above: dict[Place, float] = {}
    for name, value in values["above"].items():
        place = _place(name, model_map, "raises rows of")
        try:
            replace(low, rows_by=values["by"], above=value)
        except PhaseQuantError as error:
            raise PhaseQuantError(f"the plan's rows at '{name}' are not valid: {error}") from error
        above[place] = float(value)
    return Rows(str(values["by"]), float(share), above)


def _alpha(value: Any) -> float | None:
    if value is not None and not isinstance(value, (int, float)):
        raise PhaseQuantError(f"the plan's alpha is a number (or null), not {value!r}")
    return value


def _is_block(name: str, model_map: ModelMap) -> bool:
    return name.isdecimal() and len(name) < 10 and int(name) in model_map.blocks


def _place(name: Any, model_map: ModelMap, verb: str) -> Place:
    block, _, group = str(name).partition(".")
    if group not in GROUPS or not _is_block(block, model_map):
        raise PhaseQuantError(
            f"the plan {verb} '{name}', which this model does not have: places are BLOCK.GROUP with blocks "
            f"0 to {model_map.shape.blocks - 1} and groups {', '.join(GROUPS)}"
        )
    return int(block), group


ROLES = {"weights": ("channel", "group"), "kv": ("group",), "activations": ("token", "tensor", "column")}
"""What may share a scale, by what is quantized."""


def _spec(values: Any, place: str, role: str, widths: tuple[int, ...] = ()) -> QuantSpec | None:
    """A grid of a plan; it must suit its role, and its groups divide every width it is used on."""
    if values is None or (isinstance(values, dict) and values.get("bits") == 16):
        return None
    try:
        spec = QuantSpec.from_dict(values)
        if not spec.is_int and (role == "kv" or (role == "weights" and spec.kind == "fp8")):
            raise PhaseQuantError(f"{role} cannot be {spec.kind}")
        if spec.is_int and spec.granularity not in ROLES[role]:
            raise PhaseQuantError(f"{role} are quantized per {' or '.join(ROLES[role])}, not per {spec.granularity}")
        if spec.static and role != "activations":
            raise PhaseQuantError("only activations can have static scales")
        if spec.granularity == "column" and not spec.static:
            raise PhaseQuantError("a scale a column is static: nothing can take it from the tokens that pass")
        if spec.clip == "mse" and role != "weights":
            raise PhaseQuantError("clip 'mse' is for weights only")
        for width in widths:
            spec.groups(width)
    except (PhaseQuantError, TypeError, ValueError, AttributeError) as error:
        raise PhaseQuantError(f"the plan's grid at '{place}' is not valid: {error}") from error
    return spec
