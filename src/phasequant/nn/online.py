"""Transforms that still run at inference: rotations of a linear's input that nothing before it could absorb.

    down   x → x · (I ⊗ A ⊗ B)      R4: the MLP's product act(gate)·up has no linear before it to fold into
    o      x → x · (M ⊗ I_head)     the mixing of heads; with R2 = H_head folded into v the sum is x·(M ⊗ H_head)

Both are the same operation, two small matrix products: `(I_blocks ⊗ left ⊗ right)`, where right = I is skipped.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.numerics import Rotation, apply_factors


class OnlineRotation(nn.Module):
    """x → x·(I ⊗ left ⊗ right), computed in at least fp32. The factors are stored in the checkpoint: small, and then
    no later version of a table or of a random generator can change what a model computes."""

    left: Tensor
    right: Tensor

    def __init__(
        self, left: int, right: int, tail: int, rung: str = "hadamard", device: torch.device | None = None
    ) -> None:
        """`left`, `right`: orders of the factors; `tail`: channels that move together (the head size at `o`)."""
        super().__init__()
        self.tail = tail
        self.rung = rung
        self.register_buffer("left", torch.zeros(left, left, dtype=torch.float32, device=device))
        self.register_buffer("right", torch.zeros(right, right, dtype=torch.float32, device=device))

    @classmethod
    def of(cls, rotation: Rotation, tail: int = 1, dtype: torch.dtype = torch.float32) -> "OnlineRotation":
        """From a rotation without signs (signs fold into the weights that come before or are left out)."""
        assert rotation.signs is None
        module = cls(rotation.left.shape[0], rotation.right.shape[0], tail, rotation.rung)
        module.left = rotation.left.to(dtype)
        module.right = rotation.right.to(dtype)
        return module

    def layout(self) -> dict[str, Any]:
        """What rebuilds the empty module."""
        return {"left": self.left.shape[0], "right": self.right.shape[0], "tail": self.tail, "rung": self.rung}

    def forward(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """The rotated input, in the precision of `x`."""
        wide = torch.promote_types(x.dtype, self.left.dtype)
        values = x.to(wide)
        if self.tail == 1:
            return apply_factors(values, self.left, self.right).to(x.dtype)
        # Mix the heads: bring them last, rotate, bring them back.
        heads = values.unflatten(-1, (-1, self.tail)).transpose(-1, -2)
        return apply_factors(heads, self.left, self.right).transpose(-1, -2).flatten(-2).to(x.dtype)
