r"""Sensitivities that are read off a sweep, at no cost of their own.

    noise    what the group's low-bit input alone adds to the residual stream (observe.noise)
    gsr      GSR² of the group's input: the power of its rounding noise over its own, but for a factor 1/12
    ratio    QFeM's max-median ratio (observe.spikes)
    jr_snr   DynamicPTQ's two: Jump Ratio of the block in dB less its Historical SNR in dB; alike for all its groups

Rounding noise falls by 4 a bit, and so do noise and gsr; ratio and jr_snr say where, not how much, and are given the
same fall so that a knapsack can weigh more bits too. jr_snr is counted from the least of all blocks: harm is not
negative.
"""

import math
from collections.abc import Callable

from phasequant.arch import Place
from phasequant.errors import PhaseQuantError
from phasequant.sensitivity.contract import Ask, Sensitivity, bits_of

LOW = "low"  # the name of the noise measured on the recipe's own activation grid


def falling(name: str, ask: Ask, score: Callable[[Place], float]) -> Sensitivity:
    """A score at the low grid, less by 4 for every bit more."""
    low = ask.low.bits
    harm = {
        place: {
            low: score(place),
            **{bits_of(c): 0.0 if c is None else score(place) * 4.0 ** (low - c.bits) for c in ask.choices},
        }
        for place in ask.places
    }
    return Sensitivity(name, harm, 0.0, {})


def noise(ask: Ask) -> Sensitivity:
    """See the module's docstring."""
    if any(LOW not in g.noise for g in ask.seen.groups):
        raise PhaseQuantError("these observations have no noise by group, which this policy ranks by: observe again")
    return falling("noise", ask, lambda place: ask.seen.group(*place).noise[LOW])


def gsr(ask: Ask) -> Sensitivity:
    """See the module's docstring."""
    return falling("gsr", ask, lambda place: ask.seen.group(*place).gsr ** 2)


def ratio(ask: Ask) -> Sensitivity:
    """See the module's docstring."""
    return falling("ratio", ask, lambda place: ask.seen.group(*place).spike_ratio)


def jr_snr(ask: Ask) -> Sensitivity:
    """See the module's docstring."""
    jumps = ask.seen.jump_ratio.pick(ask.first_token)
    snrs = ask.seen.snr["4"].pick(ask.first_token)
    scores = [20 * math.log10(max(jump, 1e-20)) - snr for jump, snr in zip(jumps, snrs, strict=True)]
    return falling("jr_snr", ask, lambda place: scores[place[0]] - min(scores))
