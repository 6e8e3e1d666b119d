"""PhaseQuant: language models at W4A4KV4, with the few activations that 4 bits would ruin in 8.

Shapes, everywhere in this package, are named by one legend:

    B batch    T tokens      D model width     F ffn width     V vocabulary
    N heads    K kv heads    H head width      G scale groups  I, O a linear's input and output width

All vectors are rows: a linear is y = x·Wᵀ with W (O, I), a rotation x → x·R. Blocks are counted from 0.

Importing the package registers the quantization method `phasequant` with Transformers.
"""

from phasequant.api import Analysis, analyze, bench_linears, chat, evaluate, quantize
from phasequant.checkpoint import load, push, register
from phasequant.doctor import doctor
from phasequant.errors import PhaseQuantError
from phasequant.export import export
from phasequant.pipeline import Quantized
from phasequant.plan import PrecisionPlan
from phasequant.recipe import Recipe
from phasequant.source import open_model

register()

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "PhaseQuantError",
    "PrecisionPlan",
    "Quantized",
    "Recipe",
    "analyze",
    "bench_linears",
    "chat",
    "doctor",
    "evaluate",
    "export",
    "load",
    "open_model",
    "push",
    "quantize",
]
