"""A decoder block that is computed again for the gradient, so that its inside need not be kept (gradient checkpointing,
arXiv 1604.06174). Transformers' own runs in training mode alone, which would let a model's dropout loose.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """Stands in for `block`; other attributes are the block's own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, x: Tensor, **arguments: Any) -> Any:
        """The block; twice, where there is a gradient."""
        if not torch.is_grad_enabled():
            return self.block(x, **arguments)
        return checkpoint(self.block, x, use_reentrant=False, **arguments)
