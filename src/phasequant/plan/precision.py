"""`PrecisionPlan`: which group of which block reads how many bits, and why.

One grid for all (`low`), and the groups that are raised above it, each with its reason. Plans are JSON, made to be read
and edited: delete a line of `raised` and that group reads the low grid again; give the file back with `--plan`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from phasequant.arch import GROUPS, ModelMap, Place
from phasequant.errors import PhaseQuantError, did_you_mean
from phasequant.nn import Activations
from phasequant.numerics import QuantSpec
from phasequant.plan.entries import (
    Raised,
    Rows,
    alpha_of,
    clips_of,
    entries_of,
    kv_raised_of,
    order,
    place_of,
    raised_dict,
    rows_of,
    spec_of,
    weights_raised_of,
)

KEYS = (
    "policy", "model", "a8_share", "weights", "kv", "low", "raised", "weights_raised", "kv_raised", "clips",
    "alpha", "rows",
)  # fmt: skip


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

    @property
    def input_bits(self) -> float:
        """Bits that the linears inside the blocks read, on average over their multiply-adds."""
        read = (
            self.model.macs(group) * (16 if spec is None else spec.bits)
            for (_, group), spec in self.activations.items()
        )
        return sum(read) / self.model.macs_total

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "policy": self.policy,
            "model": {"fingerprint": self.model.fingerprint(), **self.model.describe()},
            "a8_share": round(self.a8_share, 6),
            "weights": self.weights and self.weights.to_dict(),
            "kv": self.kv and self.kv.to_dict(),
            "low": self.low and self.low.to_dict(),
            "raised": raised_dict(self.raised),
            "weights_raised": raised_dict(self.weights_raised),
            "kv_raised": {
                str(block): {**(entry.spec.to_dict() if entry.spec else {"bits": 16}), "why": entry.why}
                for block, entry in sorted(self.kv_raised.items())
            },
            "clips": {f"{block}.{group}": clip for (block, group), clip in sorted(self.clips.items(), key=order)},
            "alpha": self.alpha,
            "rows": self.rows
            and {
                "by": self.rows.by,
                "share": self.rows.share,
                "above": {f"{b}.{g}": value for (b, g), value in sorted(self.rows.above.items(), key=order)},
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
        low = spec_of(values["low"], "low", "activations")
        base = {**(low.to_dict() if low else {}), "clip": 1.0}
        raised = {
            place_of(name, model_map, "raises"): Raised(spec_of({**base, **own}, name, "activations"), why)
            for name, own, why in entries_of(values["raised"], "raised", "BLOCK.GROUP")
        }
        weights = spec_of(values.get("weights"), "weights", "weights", tuple(map(model_map.width_in, GROUPS)))
        kv = spec_of(values.get("kv"), "kv", "kv", (model_map.shape.d_head,))
        return cls(
            str(values.get("policy", "by hand")),
            model_map,
            weights,
            kv,
            low,
            raised,
            clips_of(values.get("clips") or {}, model_map),
            alpha_of(values.get("alpha")),
            rows_of(values.get("rows"), low, model_map),
            weights_raised_of(values.get("weights_raised") or {}, weights, model_map),
            kv_raised_of(values.get("kv_raised") or {}, kv, model_map),
        )

    @classmethod
    def from_json(cls, text: str, model_map: ModelMap) -> "PrecisionPlan":
        """From a file's text."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PhaseQuantError(f"the plan is not valid JSON ({error})") from error
        return cls.from_dict(values, model_map)
