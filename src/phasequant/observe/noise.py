r"""What one group's 4-bit input alone does to the residual stream that leaves its block.

Run the block twice on the same input, once with everything in 16 bits (y) and once with only group g read on its grid
(y_g). The noise it injects, relative to the stream it is added to, per token:

    ν_g = median_t ‖y_g - y‖² / ‖y‖²

All groups of all blocks are measured in one currency, so that a budget can be spent where it buys most. The median
keeps a massive token, whose norm hides any noise, from speaking for the others. Costs one more forward of the block a
group, on the first few sequences only.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def relative_noise(noisy: Float[Tensor, "T D"], clean: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
    """‖y_g - y‖²/‖y‖² of every token."""
    power = clean.square().sum(-1)
    return (noisy - clean).square().sum(-1) / torch.where(power > 0, power, torch.ones_like(power))
