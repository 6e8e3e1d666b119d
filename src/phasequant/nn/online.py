"""Transforms that still run at inference: maps of a linear's input that nothing before it could absorb.

    qkv, gate_up   x → x·T          after the norm's gain: Kronecker pair or blocks; the inverse is in the weights
    o              x → x·(M ⊗ I_H)  the mixing of heads; what acts inside a head is folded into v
    down           x → x·T          the product act(gate)·up has no linear before it to fold into
    keys, queries  k·T, q·T^{-T}    after RoPE, where the KV cache is quantized

All are one operation, two small matrix products (`numerics.linear_map`). The factors stand in the checkpoint: small,
and then no later version of a table or of a random generator can change what a model computes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.numerics import LinearMap, apply_map, layout_shapes, summing_type


class OnlineMap(nn.Module):
    """x → x·T, computed in at least fp32; on CPUs in fp64 (`numerics.product` says why)."""

    left: Tensor
    right: Tensor | None
    diagonal: Tensor | None

    def __init__(
        self, layout: Mapping[str, Any], device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Empty factors of the layout's shapes, for a loader to fill."""
        super().__init__()
        shapes = layout_shapes(layout)
        self._layout = dict(layout)
        self.tail = int(layout["tail"])
        for name in ("left", "right", "diagonal"):
            shape = shapes.get(name)
            self.register_buffer(name, None if shape is None else torch.zeros(shape, dtype=dtype, device=device))

    @classmethod
    def of(cls, linear_map: LinearMap, dtype: torch.dtype = torch.float32) -> "OnlineMap":
        """From a map."""
        module = cls(linear_map.layout(), linear_map.left.device, dtype)
        for name, tensor in linear_map.tensors().items():
            setattr(module, name, tensor.to(dtype))
        return module

    def layout(self) -> dict[str, Any]:
        """What rebuilds the empty module."""
        return dict(self._layout)

    def map(self) -> LinearMap:
        """The map it computes."""
        return LinearMap.from_layout(self._layout, {n: b for n, b in self.named_buffers() if b is not None})

    def forward(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """The mapped input, in the precision of `x`."""
        wide = torch.promote_types(summing_type(x), self.left.dtype)
        return apply_map(x.to(wide), self.left, self.right, tail=self.tail, diagonal=self.diagonal).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "OnlineMap":
        """Moves go through; `.half()` and the like must not round the factors."""
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self
