r"""QFeM: groups whose inputs a few tokens dominate are left out of the low grid (arXiv 2405.14428).

    r(m) = mean over sequences of ( max_t s / median_t s )      s: token-wise absmax of m's input (observe.spikes)
    left out = { m : r(m) > α }                                 m: a group; linears that read one input go together

Left out means that the *input* is read in 16 bits, or in 8 with a scale for every token; weights are quantized like the
others. Ratios are taken where the quantizer stands: after the transform, behind the prefix if there is one.

The authors' search of α was never released (their script has `pass` in its place). Ours: groups in the order of r; the
fewest that must be left out for the perplexity on the calibration text to stay within `budget` of the 16-bit
activations', by bisection, since leaving out more can only help but for noise; never more than `most` of all groups.
Weights and KV are in 16 bits meanwhile. α is the geometric mean of the two ratios at the border. Costs about
log2(groups) passes over the calibration text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from phasequant.arch import Place
from phasequant.console import note, warn

EDGE = 1.01  # beside the last ratio, where no second one bounds α


@dataclass(frozen=True)
class Excluded:
    """Which groups are left out and why; `alpha` is the threshold, `searched` whether it was found or given."""

    alpha: float
    places: Mapping[Place, str]
    searched: bool


def exclude(ratios: Mapping[Place, float], alpha: float, *, searched: bool = False) -> Excluded:
    """The groups above a threshold."""
    order = sorted((place for place, r in ratios.items() if r > alpha), key=lambda place: -ratios[place])
    why = {
        place: f"QFeM: its largest token is {ratios[place]:.4g} times its median one (> {alpha:.4g})" for place in order
    }
    return Excluded(alpha, why, searched)


def threshold(ratios: Sequence[float], count: int) -> float:
    """An α that `count` of the ratios (in falling order) exceed; fewer where ratios tie at the border."""
    if count <= 0:
        return max(ratios[0] * EDGE, 1.0) if ratios else 1.0
    if count >= len(ratios):
        return ratios[-1] / EDGE
    return math.sqrt(ratios[count - 1] * ratios[count])


def search_alpha(
    ratios: Mapping[Place, float], perplexity: Callable[[frozenset[Place]], float], limit: float, most: float
) -> Excluded:
    """The largest α whose left-out groups keep `perplexity` (of a set of places that are left out) within `limit`."""
    order = sorted(ratios, key=lambda place: -ratios[place])
    values = [ratios[place] for place in order]
    top = math.floor(most * len(order))

    def good(count: int) -> bool:
        found = perplexity(frozenset(order[:count]))
        note(f"qfem: {count} of {len(order)} groups left out: perplexity {found:.4g} on the calibration text "
             f"(wanted: {limit:.4g})")  # fmt: skip
        return found <= limit

    if good(0):
        return exclude(ratios, threshold(values, 0), searched=True)
    low, high = 0, top
    if not good(top):
        warn(
            f"qfem: leaving out {top} of {len(order)} groups does not keep to the budget: they are left out all the "
            "same; raise exclude.most or exclude.budget, or isolate the tokens (prefix.method)"
        )
        low = top
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return exclude(ratios, threshold(values, high), searched=True)
