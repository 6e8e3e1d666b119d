"""What stands in a quantized model: linears, online maps, the packed KV cache, the attention function."""

from phasequant.nn.attention import (
    ATTENTION,
    SLOT,
    PackedCache,
    attach,
    kv_bytes_per_token,
    kv_in_16_bits,
    switch_attention,
)
from phasequant.nn.experts import prepared, take_apart, take_block_apart
from phasequant.nn.kv import KVLayout, KVQuantizer, PackedLayer, PackedStates
from phasequant.nn.layout import Activations, LowRank, ModelLayout, PrefixLayout, prefix_tokens
from phasequant.nn.linear import QuantLinear
from phasequant.nn.modules import (
    empty_linear,
    in_16_bits,
    lay_out,
    quant_linears,
    replace_module,
    row_share,
    set_activations,
)
from phasequant.nn.online import OnlineMap
from phasequant.nn.prefix import PrefixStates, attach_prefix, prefix_length, prefix_states, without_prefix
from phasequant.nn.recomputed import Recomputed
from phasequant.nn.softcap import capped_logits, is_capped, logits_of

__all__ = [
    "ATTENTION",
    "SLOT",
    "Activations",
    "KVLayout",
    "KVQuantizer",
    "LowRank",
    "ModelLayout",
    "OnlineMap",
    "PackedCache",
    "PackedLayer",
    "PackedStates",
    "PrefixLayout",
    "PrefixStates",
    "QuantLinear",
    "Recomputed",
    "attach",
    "attach_prefix",
    "capped_logits",
    "empty_linear",
    "in_16_bits",
    "is_capped",
    "kv_bytes_per_token",
    "kv_in_16_bits",
    "lay_out",
    "logits_of",
    "prefix_length",
    "prefix_states",
    "prefix_tokens",
    "prepared",
    "quant_linears",
    "replace_module",
    "row_share",
    "set_activations",
    "switch_attention",
    "take_apart",
    "take_block_apart",
    "without_prefix",
]
