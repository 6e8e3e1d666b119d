"""`ModelLayout`: everything that decides which modules a quantized model has and on which grids they compute.

It is what `config.json` carries: from it and the architecture's config an empty model is laid out, and weights only
have to be filled in. The pipeline builds the same modules from live tensors, so what is saved is what was measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from phasequant.arch import GROUPS, ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.nn.fits import check_grid, check_map
from phasequant.nn.kv import KVLayout
from phasequant.numerics import QuantSpec

Activations = dict[tuple[int, str], QuantSpec | None]
"""(block, group) → the grid its input is read on; None is 16 bits."""


KV = dict[int, KVLayout]
"""Block → the grids of its keys and values; empty where the KV cache is 16-bit."""


@dataclass(frozen=True)
class LowRank:
    """Branches beside the codes: group → rank, the same in every block; whether they read rounded inputs."""

    ranks: Mapping[str, int]
    rounded: bool = False
    dtype: str = "bfloat16"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], model_map: ModelMap) -> "LowRank":
        """Checked: known groups, ranks that fit, a type that weights may have."""
        ranks = {str(group): int(rank) for group, rank in values["ranks"].items()}
        for group, rank in ranks.items():
            if group not in GROUPS or not 0 < rank < model_map.width_in(group):
                raise PhaseQuantError(f"the config gives a low-rank branch of rank {rank} to '{group}'")
        if values["dtype"] not in ("bfloat16", "float16", "float32"):
            raise PhaseQuantError(f"the config gives low-rank branches the type '{values['dtype']}'")
        return cls(ranks, bool(values["rounded"]), str(values["dtype"]))


@dataclass(frozen=True)
class PrefixLayout:
    """Tokens that stand before every sequence, whose 16-bit keys and values the checkpoint holds; who chose them."""

    tokens: tuple[int, ...]
    method: str
    dtype: str = "bfloat16"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], model_map: ModelMap) -> "PrefixLayout":
        """Checked: ids that the model knows, a type that keys may have."""
        tokens = tuple(int(token) for token in values["tokens"])
        if not tokens or not all(0 <= token < model_map.shape.vocab for token in tokens):
            raise PhaseQuantError(f"the config gives a prefix of tokens {tokens}")
        if values["dtype"] not in ("bfloat16", "float16", "float32"):
            raise PhaseQuantError(f"the config gives the prefix the type '{values['dtype']}'")
        return cls(tokens, str(values["method"]), str(values["dtype"]))


@dataclass
class ModelLayout:
    """`online`: group → `OnlineMap.layout()`, the same in every block. `weights`: the grid of all codes, but for those
    of the groups in `weights_others`."""

    weights: QuantSpec | None = None
    kv: KV = field(default_factory=dict)
    activations: Activations = field(default_factory=dict)
    online: dict[str, dict[str, Any]] = field(default_factory=dict)
    lowrank: LowRank | None = None
    prefix: PrefixLayout | None = None
    weights_others: Mapping[tuple[int, str], QuantSpec] = field(default_factory=dict)

    def weights_at(self, block: int, group: str) -> QuantSpec | None:
        """The grid of a group's codes."""
        return self.weights_others.get((block, group), self.weights)

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`: the commonest activation grid once, others and clips by name."""
        plain = {place: spec and replace(spec.narrow, clip=1.0) for place, spec in self.activations.items()}
        kinds = list(plain.values())
        base = max(kinds, key=kinds.count) if kinds else None
        first = next(iter(self.kv.values()), None)
        return {
            "weights": self.weights and self.weights.to_dict(),
            "weights_others": {
                f"{block}.{group}": spec.to_dict() for (block, group), spec in sorted(self.weights_others.items())
            },
            "kv": first
            and {
                "grid": replace(first.keys, clip=1.0).to_dict(),
                "qk": first.qk,
                "clips": self._kv_clips(),
                "bits": [kv.keys.bits for _, kv in sorted(self.kv.items())],
            },
            "activations": {
                "base": base and base.to_dict(),
                "others": {
                    f"{block}.{group}": spec and spec.to_dict()
                    for (block, group), spec in sorted(plain.items())
                    if spec != base
                },
                "clips": {
                    f"{block}.{group}": spec.clip
                    for (block, group), spec in sorted(self.activations.items())
                    if spec is not None and spec.clip != 1.0
                },
                "rows": {
                    f"{block}.{group}": [spec.rows_by, spec.above]
                    for (block, group), spec in sorted(self.activations.items())
                    if spec is not None and spec.mixed
                },
            },
            "online": self.online,
            "lowrank": self.lowrank and {**vars(self.lowrank), "ranks": dict(self.lowrank.ranks)},
            "prefix": self.prefix and {**vars(self.prefix), "tokens": list(self.prefix.tokens)},
        }

    def _kv_clips(self) -> list[list[float]]:
        return [[float(kv.keys.clip), float(kv.values.clip)] for _, kv in sorted(self.kv.items())]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], model_map: ModelMap) -> "ModelLayout":
        """The inverse of `to_dict`, checked against the model."""

        def spec(entry: Mapping[str, Any] | None) -> QuantSpec | None:
            return QuantSpec.from_dict(entry) if entry is not None else None

        def place(name: str) -> tuple[int, str]:
            block, group = name.split(".")
            if (int(block), group) not in activations:
                raise PhaseQuantError(f"the config gives bits to '{name}', which this model does not have")
            return int(block), group

        try:
            given = values["activations"]
            activations: Activations = {
                (block, group): spec(given["base"]) for block in model_map.blocks for group in GROUPS
            }
            for name, entry in given["others"].items():
                activations[place(name)] = spec(entry)
            for name, clip in given["clips"].items():
                there = activations[place(name)]
                assert there is not None
                activations[place(name)] = replace(there, clip=float(clip))
            for name, (rule, above) in given.get("rows", {}).items():
                there = activations[place(name)]
                assert there is not None
                activations[place(name)] = replace(there, rows_by=rule, above=float(above))
            kv: KV = {}
            if values["kv"] is not None:
                grid, qk, clips = spec(values["kv"]["grid"]), values["kv"]["qk"], values["kv"]["clips"]
                assert grid is not None
                bits = values["kv"].get("bits") or [grid.bits] * len(clips)
                for block, (keys, states), width in zip(model_map.blocks, clips, bits, strict=True):
                    grids = (
                        replace(grid, clip=float(keys), bits=width),
                        replace(grid, clip=float(states), bits=width),
                    )
                    kv[block] = KVLayout(*grids, dict(qk) if qk is not None else None)
            made = cls(
                weights=spec(values["weights"]),
                kv=kv,
                activations=activations,
                online={group: dict(entry) for group, entry in values["online"].items()},
                lowrank=None if (branch := values.get("lowrank")) is None else LowRank.from_dict(branch, model_map),
                prefix=None if (given := values.get("prefix")) is None else PrefixLayout.from_dict(given, model_map),
                weights_others={
                    place(name): QuantSpec.from_dict(entry) for name, entry in values.get("weights_others", {}).items()
                },
            )
            made._check(model_map)
        except (LookupError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError) as error:
            raise PhaseQuantError(
                f"the quantization config is not one of PhaseQuant's ({type(error).__name__}: {error}): "
                "config.json was edited or cut short; get it again"
            ) from error
        return made

    def _check(self, model_map: ModelMap) -> None:
        """Raise where a grid does not suit its place, or a map or a group of a scale its width: before any tensor is
        made in their sizes."""
        if self.weights is None and self.weights_others:
            raise PhaseQuantError("the config gives grids to single weights where all others are in 16 bits")
        for block in model_map.blocks:
            for group in GROUPS:
                check_grid(self.weights_at(block, group), "weights", model_map.width_in(group))
        for spec in set(self.activations.values()):
            check_grid(spec, "activations", 1)
        for layout in self.kv.values():
            for spec in (layout.keys, layout.values):
                check_grid(spec, "kv", model_map.shape.d_head)
        first = next(iter(self.kv.values()), None)
        if first is not None and first.qk is not None:
            check_map(first.qk, "keys", model_map.shape.d_head)
        for group, entry in self.online.items():
            if group not in GROUPS:
                raise PhaseQuantError(f"the config gives an online map to '{group}', which this model does not have")
            check_map(entry, group, model_map.width_in(group))


def prefix_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that stand before every sequence of a quantized model; none where it has no prefix."""
    config = getattr(model.config, "quantization_config", None)
    layout = getattr(config, "layout", None) or {}
    return tuple((layout.get("prefix") or {}).get("tokens", ()))
