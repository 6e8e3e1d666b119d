r"""`Transform`: what a method decides, apart from how it is put into a model.

A method chooses maps; `apply` folds the foldable ones in fp64 and leaves the rest online. Places, in the order of
computation (rows; no entry = identity):

    residual   R1, D × D     folded: embedding rows, readers' inputs, writers' outputs, head. Orthogonal; one a model
    qkv        D × D         online, after the norm and its gain
    value      K·H × K·H     folded: v's output (a block a kv head), its inverse transpose in o's input
    heads      M ⊗ I_H       online before o
    qk         H × H         online on keys after RoPE, its inverse transpose on queries, where the KV cache is rounded
    gate_up    D × D         online, after the norm and its gain
    down       F × F         online before down

and diagonal scales c of a group's input channels, always folded: of qkv and gate_up into the norm's gain and bias (one
c, named qkv, where both read one norm), of down into up's rows (x·diag(c); the weights that read it are divided by c).
A family that has no linear for a place leaves it empty: `check_places`. Clips are the learned grids: fractions of the
largest magnitude, per weight row, per group of inputs, for keys and for values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.nn import Activations
from phasequant.numerics import LinearMap, QuantSpec
from phasequant.recipe import LearningPart, RotationPart, TransformPart

SCALED = ("qkv", "gate_up", "down")
"""Groups whose inputs can carry folded scales, where the family has a linear for it (`ModelMap.scaled`)."""


@dataclass(frozen=True, eq=False)
class BlockTransform:
    """What happens in one block. `inputs`, `keys`, `values` are learned grids, `weight_clips` one fraction a scale."""

    qkv: LinearMap | None = None
    value: LinearMap | None = None
    heads: LinearMap | None = None
    qk: LinearMap | None = None
    gate_up: LinearMap | None = None
    down: LinearMap | None = None
    scales: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)
    weight_clips: Mapping[str, Float[Tensor, "O G"]] = field(default_factory=dict)
    inputs: Mapping[str, QuantSpec] = field(default_factory=dict)
    kv: tuple[QuantSpec, QuantSpec] | None = None
    notes: Mapping[str, float] = field(default_factory=dict)

    def online(self, group: str) -> LinearMap | None:
        """What runs before a group's linears."""
        found: LinearMap | None = getattr(self, "heads" if group == "o" else group)
        return found

    def with_maps(self, maps: Mapping[str, LinearMap | None]) -> "BlockTransform":
        """Some places' maps replaced."""
        return replace(self, **maps)  # type: ignore[arg-type]


MAPS = ("qkv", "value", "heads", "qk", "gate_up", "down")


def check_folding(model_map: ModelMap) -> None:
    """Refuse to fold a rotation of the residual stream where that would change the model."""
    if model_map.unfoldable is not None:
        raise PhaseQuantError(
            f"no rotation of the residual stream can be folded into a {model_map.family.name} model: "
            f"{model_map.unfoldable}; set rotation.where=online, which rotates after the norms"
        )


def check_places(block: BlockTransform, model_map: ModelMap) -> None:
    """Refuse maps and scales for which the family has no linear to be folded into."""
    wrong = [f"scales of {group}" for group in block.scales if group not in model_map.scaled]
    wrong += ["a map of values"] if block.value is not None and model_map.family.value is None else []
    if wrong:
        raise PhaseQuantError(
            f"{' and '.join(wrong)} cannot be folded into a {model_map.family.name} model, whose scales can stand at "
            f"{', '.join(model_map.scaled)} only: the transform was made for another family; learn it anew"
        )


@dataclass(frozen=True, eq=False)
class Transform:
    """The maps of one model; `folds_norms` says that norm gains move into the linears that read them."""

    method: str
    folds_norms: bool = False
    residual: LinearMap | None = None
    blocks: tuple[BlockTransform, ...] = ()

    @classmethod
    def alike(cls, method: str, model_map: ModelMap, block: BlockTransform, **rest: Any) -> "Transform":
        """The same maps in every block."""
        return cls(method, blocks=(block,) * model_map.shape.blocks, **rest)

    def block(self, index: int) -> BlockTransform:
        """One block's maps; none where the transform has none."""
        return self.blocks[index] if self.blocks else BlockTransform()

    def changed(self, change: Callable[[int, BlockTransform], BlockTransform]) -> "Transform":
        """Every block's maps replaced by `change(index, maps)`."""
        return replace(self, blocks=tuple(change(i, b) for i, b in enumerate(self.blocks)))

    def describe(self, model_map: ModelMap, kv: bool = True) -> list[dict[str, Any]]:
        """One entry a place, for reports: which matrix, on which rung, folded or online, at what cost a token, over all
        blocks. The map of keys runs only where the KV cache is quantized (`kv`)."""
        shape = model_map.shape
        reads = "input of gate and up" if model_map.gated else "input of the MLP"
        places = (
            ("qkv", "input of q, k, v", "online", 1),
            ("value", "values, per kv head", "folded", 0),
            ("heads", "heads, before o", "online", 1),
            ("qk", "queries and keys, after RoPE", "online", shape.heads + shape.kv_heads),
            ("gate_up", reads, "online", model_map.rows("gate_up")),
            ("down", "input of down", "online", model_map.rows("down")),
        )
        found: list[dict[str, Any]] = []
        if self.folds_norms:
            found.append({"name": "gains", "place": "RMSNorm weights", "where": "folded", "matrix": "diagonal",
                          "rung": "diagonal", "macs": 0})  # fmt: skip
        if self.residual is not None:
            found.append({"name": "R1", "place": "residual stream", "where": "folded", "matrix": str(self.residual),
                          "rung": self.residual.kind, "macs": 0})  # fmt: skip
        for group in SCALED:
            if any(group in block.scales for block in self.blocks):
                place = f"input of {group}, into {'up' if group == 'down' else 'the norm'}"
                found.append({"name": f"{group} scales", "place": place, "where": "folded", "matrix": "diagonal",
                              "rung": "diagonal", "macs": 0})  # fmt: skip
        for name, place, where, times in places:
            maps = [m for m in (getattr(block, name) for block in self.blocks) if m is not None]
            if maps and (name != "qk" or kv):
                found.append({"name": NAMES[name], "place": place, "where": where, "matrix": str(maps[0]),
                              "rung": maps[0].kind, "macs": sum(m.macs * times for m in maps)})  # fmt: skip
        return found

    def online_macs(self, model_map: ModelMap, kv: bool = True) -> int:
        """Multiply-adds a token of all that runs online."""
        return sum(step["macs"] for step in self.describe(model_map, kv) if step["where"] == "online")


NAMES = {"qkv": "T qkv", "value": "R2", "heads": "M", "qk": "R3", "gate_up": "T gate_up", "down": "R4"}


@dataclass(frozen=True, eq=False)
class Task:
    """All that a method may look at. The model is the 16-bit original and stays as it is; the plan is made already, so
    that a block which will read 8 bits is learned with 8 bits."""

    model: PreTrainedModel
    map: ModelMap
    tokens: Int[Tensor, "sequences T"] | None
    activations: Activations
    weights: QuantSpec | None
    kv: QuantSpec | None
    part: TransformPart
    rotation: RotationPart
    learning: LearningPart
    seed: int
    device: torch.device
    stored: torch.dtype
    learned_clips: frozenset[str] = frozenset()
    kept: Path | None = None


@dataclass(frozen=True)
class Method:
    """One way to choose a transform."""

    learn: Callable[[Task], Transform]
    needs_tokens: bool = False
    learns_clips: bool = False
    sees_plan: bool = False
    rough: Callable[[Task], Transform] | None = None
    """What stands in for it while the plan that it sees is made; None: itself, learned at the low grid."""
