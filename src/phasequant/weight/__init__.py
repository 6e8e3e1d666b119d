"""Real codes for weights: round to nearest, GPTQ."""

from phasequant.weight.codes import Told, WeightCodes
from phasequant.weight.gptq import gptq
from phasequant.weight.kept import KeptCodes, keep_blocks
from phasequant.weight.moments import Moments, best_weights, shrunk
from phasequant.weight.rtn import round_to_nearest
from phasequant.weight.task import WeightTask, needs_tokens
from phasequant.weight.walk import quantize_weights

__all__ = [
    "KeptCodes",
    "Moments",
    "Told",
    "WeightCodes",
    "WeightTask",
    "best_weights",
    "gptq",
    "keep_blocks",
    "needs_tokens",
    "quantize_weights",
    "round_to_nearest",
    "shrunk",
]
