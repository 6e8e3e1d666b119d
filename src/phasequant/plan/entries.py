"""The entries of a plan's JSON: what is raised, which rows read more, learned clips; each checked against the model.

Every problem is a `PhaseQuantError` that names the entry.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from phasequant.arch import GROUPS, ModelMap, Place
from phasequant.errors import PhaseQuantError
from phasequant.nn.fits import ROLES
from phasequant.numerics import QuantSpec


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


def raised_dict(raised: Mapping[Place, Raised]) -> dict[str, Any]:
    return {
        f"{block}.{group}": {**(entry.spec.to_dict() if entry.spec else {"bits": 16}), "why": entry.why}
        for (block, group), entry in sorted(raised.items(), key=order)
    }


def entries_of(values: Any, key: str, places: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(place, grid's keys, why) of raised entries."""
    if not isinstance(values, dict):
        raise PhaseQuantError(f"the plan's '{key}' must be an object of {places} entries (empty: {{}})")
    for name, entry in values.items():
        if not isinstance(entry, dict):
            raise PhaseQuantError(f"the plan's entry for '{name}' must be an object such as {{\"bits\": 8}}")
        own = dict(entry)
        why = str(own.pop("why", "set by hand"))
        yield str(name), own, why


def weights_raised_of(values: Any, base: QuantSpec | None, model_map: ModelMap) -> dict[Place, Raised]:
    """Groups whose weights have other bits."""
    found: dict[Place, Raised] = {}
    for name, own, why in entries_of(values, "weights_raised", "BLOCK.GROUP"):
        if base is None:
            raise PhaseQuantError("the plan's 'weights_raised' raise weights that have 16 bits already")
        place = place_of(name, model_map, "raises the weights of")
        spec = spec_of({**base.to_dict(), **own}, f"weights of {name}", "weights", (model_map.width_in(place[1]),))
        if spec is None or spec.is_int != base.is_int:
            raise PhaseQuantError(f"the plan's weights at '{name}' must be codes, of the kind that the others are")
        found[place] = Raised(spec, why)
    return found


def kv_raised_of(values: Any, base: QuantSpec | None, model_map: ModelMap) -> dict[int, Raised]:
    """Blocks whose keys and values have other bits."""
    found: dict[int, Raised] = {}
    for name, own, why in entries_of(values, "kv_raised", "BLOCK"):
        if base is None:
            raise PhaseQuantError("the plan's 'kv_raised' raise keys and values that have 16 bits already")
        if not _is_block(name, model_map):
            raise PhaseQuantError(f"the plan raises the KV of block '{name}', which this model does not have")
        spec = spec_of({**base.to_dict(), **own}, f"KV of block {name}", "kv", (model_map.shape.d_head,))
        if spec is None or replace(spec, bits=base.bits, clip=base.clip) != base:
            raise PhaseQuantError(f"the plan's KV of block {name} may differ from the others' in bits and clip alone")
        found[int(name)] = Raised(spec, why)
    return found


def order(item: tuple[Place, Any]) -> tuple[int, int]:
    return item[0][0], GROUPS.index(item[0][1])


def clips_of(values: Any, model_map: ModelMap) -> dict[Place, float]:
    """Learned clips of a plan."""
    if not isinstance(values, dict):
        raise PhaseQuantError("the plan's 'clips' must be an object of BLOCK.GROUP entries (or be left away)")
    found: dict[Place, float] = {}
    for name, clip in values.items():
        if not isinstance(clip, (int, float)) or not 0 < clip <= 1:
            raise PhaseQuantError(f"the plan's clip at '{name}' is not valid: a fraction in (0, 1], not {clip!r}")
        found[place_of(name, model_map, "clips")] = float(clip)
    return found


def rows_of(values: Any, low: QuantSpec | None, model_map: ModelMap) -> Rows | None:
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
        place = place_of(name, model_map, "raises rows of")
        try:
            replace(low, rows_by=values["by"], above=value)
        except PhaseQuantError as error:
            raise PhaseQuantError(f"the plan's rows at '{name}' are not valid: {error}") from error
        above[place] = float(value)
    return Rows(str(values["by"]), float(share), above)


def alpha_of(value: Any) -> float | None:
    if value is not None and not isinstance(value, (int, float)):
        raise PhaseQuantError(f"the plan's alpha is a number (or null), not {value!r}")
    return value


def _is_block(name: str, model_map: ModelMap) -> bool:
    return name.isdecimal() and len(name) < 10 and int(name) in model_map.blocks


def place_of(name: Any, model_map: ModelMap, verb: str) -> Place:
    block, _, group = str(name).partition(".")
    if group not in GROUPS or not _is_block(block, model_map):
        raise PhaseQuantError(
            f"the plan {verb} '{name}', which this model does not have: places are BLOCK.GROUP with blocks "
            f"0 to {model_map.shape.blocks - 1} and groups {', '.join(GROUPS)}"
        )
    return int(block), group


def spec_of(values: Any, place: str, role: str, widths: tuple[int, ...] = ()) -> QuantSpec | None:
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
