r"""What transforms read and write of a norm: y = n(x)·diag(γ) + β, whatever its family keeps of it.

    rms      n(x) = x / √(mean x² + ε)                     γ = w
    rms+1    the same                                      γ = 1 + w
    layer    n(x) = (x - mean x) / √(var x + ε)            γ = w, β = b

Scaling the output by c takes γ·c and β·c. γ·c is rounded as it will be stored, and what readers are divided by is the
quotient of the rounded gain; β·c follows that quotient, and is rounded when it is stored, as every 16-bit bias is.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

WORK = torch.float64
OFFSET = {"rms": 0.0, "rms+1": 1.0, "layer": 0.0}
"""Kind of norm → gain less weight."""


def gain_of(norm: nn.Module, kind: str) -> Float[Tensor, " D"]:
    """γ, fp64, a copy."""
    return norm.get_parameter("weight").detach().to(WORK, copy=True) + OFFSET[kind]


def set_gain(norm: nn.Module, kind: str, gain: Float[Tensor, " D"]) -> None:
    """Make γ what is given."""
    weight = norm.get_parameter("weight")
    weight.data.copy_((gain - OFFSET[kind]).to(weight.dtype))


def stored_gain(gain: Float[Tensor, " D"], kind: str, stored: torch.dtype) -> Float[Tensor, " D"]:
    """γ as it comes back from a weight that is stored in `stored`."""
    return (gain - OFFSET[kind]).to(stored).to(gain.dtype) + OFFSET[kind]


def scale_bias(norm: nn.Module, factor: Float[Tensor, " D"]) -> None:
    """β times `factor`, where there is a β."""
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias.data.copy_((bias.detach().to(factor.dtype) * factor).to(bias.dtype))


def unit(x: Float[Tensor, "T D"], norm: nn.Module, kind: str) -> Float[Tensor, "T D"]:
    """n(x): the norm without gain and bias."""
    epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
