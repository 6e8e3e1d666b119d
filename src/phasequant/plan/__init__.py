"""Plans: policies turn observations into the bits that every group reads."""

from phasequant.plan.budget import allowed, choices, prices, sensitivity
from phasequant.plan.entries import Raised, Rows
from phasequant.plan.policies import NEEDS_NOISE, NEEDS_OBSERVATIONS, POLICIES, make_plan, thresholds
from phasequant.plan.precision import PrecisionPlan
from phasequant.plan.prices import Prices
from phasequant.plan.seen import Seen
from phasequant.plan.swaps import Terms, better
from phasequant.sensitivity.closed import LOW

__all__ = [
    "LOW",
    "NEEDS_NOISE",
    "NEEDS_OBSERVATIONS",
    "POLICIES",
    "PrecisionPlan",
    "Prices",
    "Raised",
    "Rows",
    "Seen",
    "Terms",
    "allowed",
    "better",
    "choices",
    "make_plan",
    "prices",
    "sensitivity",
    "thresholds",
]
