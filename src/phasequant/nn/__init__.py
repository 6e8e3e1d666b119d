"""What stands in a quantized model: linears, online rotations, the packed KV cache, the attention function."""

from phasequant.nn.attention import ATTENTION, PackedCache, attach, kv_bytes_per_token
from phasequant.nn.kv import KVQuantizer, PackedLayer, PackedStates
from phasequant.nn.layout import Activations, ModelLayout, lay_out, quant_linears, replace_module, set_activations
from phasequant.nn.linear import QuantLinear
from phasequant.nn.online import OnlineRotation

__all__ = [
    "ATTENTION",
    "Activations",
    "KVQuantizer",
    "ModelLayout",
    "OnlineRotation",
    "PackedCache",
    "PackedLayer",
    "PackedStates",
    "QuantLinear",
    "attach",
    "kv_bytes_per_token",
    "lay_out",
    "quant_linears",
    "replace_module",
    "set_activations",
]
