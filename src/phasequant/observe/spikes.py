r"""Token-wise absmax and QFeM's ratio: which linear inputs a few tokens dominate (arXiv 2405.14428).

    s[i,t] = max_j |X[i,t,j]|        sequence i, token t
    r      = mean_i ( max_t s[i,t] / median_t s[i,t] )

The median is torch's lower one, as in the authors' code. A grid shared by all tokens must stretch to max s; a ratio of
1000 leaves the median token a thousandth of it.
"""

from jaxtyping import Float
from torch import Tensor


def token_absmax(x: Float[Tensor, "*sequences T n"]) -> Float[Tensor, "*sequences T"]:
    """s of every token."""
    return x.abs().amax(-1)


def spike_ratio(absmax: Float[Tensor, "sequences T"]) -> float:
    """QFeM's r of one linear input."""
    return float((absmax.amax(-1) / absmax.median(-1).values.clamp(min=1e-20)).mean())
