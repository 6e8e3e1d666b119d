"""`Transform`: what a method decides, apart from how it is put into a model.

A method (QuaRot, later SpinQuant, FRTQ …) chooses the rotations; `apply` folds the foldable ones in fp64 and leaves the
rest online. Places, in the order of computation (rows; R = I where None):

    residual   R1, D × D    folded: embedding rows, readers' inputs, writers' outputs, head
    value      R2, H × H    folded: v's output by kv head, o's input by head
    heads      M,  N × N    online before o, its inverse folded into o
    qk         R3, H × H    online on q and k after RoPE, where the KV cache is quantized
    down       R4, F × F    online before down, its inverse folded into down
"""

from dataclasses import dataclass
from typing import Any

from phasequant.arch import ModelMap
from phasequant.numerics import Rotation


@dataclass(frozen=True)
class Transform:
    """The rotations of one model; `folds_norms` says that norm gains move into the linears that read them."""

    method: str
    folds_norms: bool = False
    residual: Rotation | None = None
    value: Rotation | None = None
    heads: Rotation | None = None
    qk: Rotation | None = None
    down: Rotation | None = None

    def describe(self, model_map: ModelMap, kv: bool = True) -> list[dict[str, Any]]:
        """One entry a place, for reports: which matrix, on which rung, folded or online, at what cost a token.
        R3 runs only where the KV cache is quantized (`kv`)."""
        shape = model_map.shape
        places = (
            ("R1", "residual stream", self.residual, "folded", 0),
            ("R2", "values, per kv head", self.value, "folded", 0),
            ("R2·M", "heads, before o", self.heads, "online", shape.d_head),
            ("R3", "queries and keys, after RoPE", self.qk if kv else None, "online", shape.heads + shape.kv_heads),
            ("R4", "before down", self.down, "online", 1),
        )
        found: list[dict[str, Any]] = []
        if self.folds_norms:
            found.append({"name": "gains", "place": "RMSNorm weights", "where": "folded", "matrix": "diagonal",
                          "rung": "diagonal", "macs": 0})  # fmt: skip
        for name, place, rotation, where, times in places:
            if rotation is not None:
                found.append({"name": name, "place": place, "where": where, "matrix": str(rotation),
                              "rung": rotation.rung, "macs": rotation.macs * times * shape.blocks})  # fmt: skip
        return found
