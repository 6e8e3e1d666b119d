"""How much each group's low-bit input hurts, by name and with its cost: what a budget is spent by."""

from phasequant.sensitivity.closed import gsr, jr_snr, noise, ratio
from phasequant.sensitivity.contract import KV, WEIGHTS, Ask, Runs, Sensitivity, bits_of
from phasequant.sensitivity.fisher import fisher
from phasequant.sensitivity.gradient import gradient
from phasequant.sensitivity.kl import PlanDivergence, kl, kl_alone, measured_gains
from phasequant.sensitivity.local import local

MEASURES = {
    "noise": noise,
    "gsr": gsr,
    "ratio": ratio,
    "jr_snr": jr_snr,
    "local": local,
    "fisher": fisher,
    "gradient": gradient,
    "kl": kl,
    "kl_alone": kl_alone,
}
"""Name in the recipe → measure."""

RUNS_MODEL = frozenset({"local", "fisher", "gradient", "kl", "kl_alone"})
"""Those that run the model; the others are read off a sweep."""

__all__ = [
    "KV",
    "MEASURES",
    "RUNS_MODEL",
    "WEIGHTS",
    "Ask",
    "PlanDivergence",
    "Runs",
    "Sensitivity",
    "bits_of",
    "measured_gains",
]
