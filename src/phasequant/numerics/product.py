"""The precision of small products.

Served products (`summing_type`): fp64 on CPUs, where libraries sum a row in another order when other rows stand beside
it; rounded to fp32 afterwards, a row's result is its own, in a prompt, a step, or a batch of strangers. One code that
flips moves a 4-bit model's logits by whole units, so that nothing less gives the same tokens. fp32 on GPUs, where the
fused kernels take a row at a time.

Products for learning: bfloat16 operands, fp32 sums, where the device has units for it (CUDA from compute capability
8.0, CPUs with AMX); fp32 elsewhere.

Codes of up to 8 bits are exact in bfloat16; what they are multiplied with is rounded to 8 bits of mantissa, and so is
the result: a few thousandths, beside grids of 4 bits. What learning finds is measured afterwards by the exact kernels.
On a CPU with AMX these products are nine times as fast as fp32's (2 cores of a Sapphire Rapids: 733 against 81 GFLOP/s
a core, 1024 × 576 × 1536).
"""

from functools import cache

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def summing_type(x: Tensor) -> torch.dtype:
    """What an online map or a low-rank branch of `x` is computed in; see above."""
    return torch.float64 if x.device.type == "cpu" else torch.promote_types(x.dtype, torch.float32)


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than fp32's on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return False


def learning_product(
    x: Float[Tensor, "*rows I"], weight: Shaped[Tensor, "O I"], fast: bool | None = None
) -> Float[Tensor, "*rows O"]:
    """x·Wᵀ, differentiable, in the type of `x`; W numbers or codes. `fast`: in bfloat16 (default: where the device has
    units for it)."""
    if multiplies_bfloat16(x.device) if fast is None else fast:
        return torch.nn.functional.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype))
