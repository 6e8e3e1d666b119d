"""Plans: policies turn observations into the bits that every group reads."""

from phasequant.plan.policies import LOW, NEEDS_NOISE, NEEDS_OBSERVATIONS, POLICIES, Seen, make_plan, thresholds
from phasequant.plan.precision import PrecisionPlan, Raised

__all__ = [
    "LOW",
    "NEEDS_NOISE",
    "NEEDS_OBSERVATIONS",
    "POLICIES",
    "PrecisionPlan",
    "Raised",
    "Seen",
    "make_plan",
    "thresholds",
]
