r"""Keys and values in 4 bits: the grid, the packed cache layer, and R3.

Each token's key and value of each kv head is one row (or `group_size` pieces of it) on an asymmetric grid:

    q = clamp(round(x/s) + z, 0, 15),   s = (max(x,0) - min(x,0))/15 rounded to fp16,   x̂ = s·(q - z)

Keys are mapped first, after RoPE, by a T of the head size (R3, a Hadamard matrix; or a learned one); queries get T^{-T}
in the attention function, so q·kᵀ is unchanged but for the rounding: (q·T^{-T})(k·T)ᵀ = q·kᵀ. Values were mapped when
the weights were folded. A token costs, a head: d_head/2 bytes of codes + 3 bytes (fp16 scale, 8-bit zero) a group, for
keys and for values. Because every token is rounded on its own, prefill, chunked prefill and decoding see the same
numbers, with a cache or without.

Sources: QuaRot (arXiv 2404.00456) for R3 and the asymmetric KV grid; the fp16 scale and including zero are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from phasequant.nn.online import OnlineMap
from phasequant.numerics import LinearMap, QuantSpec, dequantize, grid, pack, packed_width, round_to_codes
from phasequant.numerics import unpack as unpack_codes

TINY = 2.0**-24  # smallest fp16: keeps a scale from becoming 0


@dataclass
class PackedStates:
    """Keys or values as codes; the token axis is the third."""

    codes: UInt8[Tensor, "B K T bytes"]
    scale: Float[Tensor, "B K T G"]
    zero: Integer[Tensor, "B K T G"]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def map(self, change: Any) -> "PackedStates":
        """The same change to codes, scales and zero points."""
        return PackedStates(change(self.codes), change(self.scale), change(self.zero))

    def then(self, other: "PackedStates") -> "PackedStates":
        """With `other`'s tokens after these."""
        pairs = ((self.codes, other.codes), (self.scale, other.scale), (self.zero, other.zero))
        return PackedStates(*(torch.cat(pair, dim=2) for pair in pairs))


class KeyValue(NamedTuple):
    """Keys and values of the same tokens."""

    keys: PackedStates
    values: PackedStates


@dataclass(frozen=True)
class KVLayout:
    """The KV grids of one block, and the map of its keys (None: none)."""

    keys: QuantSpec
    values: QuantSpec
    qk: Mapping[str, Any] | None = None


class KVQuantizer(nn.Module):
    """The KV grids of one attention module, and the map of its keys and queries (R3, or a learned one)."""

    def __init__(self, layout: KVLayout, d_head: int, device: torch.device | None = None) -> None:
        """Empty maps, for a loader to fill."""
        super().__init__()
        self.layout = layout
        self.d_head = d_head
        self.enabled = True
        self.key_map: OnlineMap | None = None
        self.query_map: OnlineMap | None = None
        if layout.qk is not None:
            self.key_map = OnlineMap(layout.qk, device)
            if not layout.qk["orthogonal"]:
                self.query_map = OnlineMap(layout.qk, device)

    @classmethod
    def of(cls, keys: QuantSpec, values: QuantSpec, d_head: int, qk: LinearMap | None) -> "KVQuantizer":
        """With keys mapped by `qk` and queries by its inverse transpose, or neither."""
        module = cls(KVLayout(keys, values, None if qk is None else qk.layout()), d_head)
        if qk is not None:
            module.key_map = OnlineMap.of(qk)
            module.query_map = None if qk.orthogonal else OnlineMap.of(qk.inverse_transpose())
        return module

    def rotate_keys(self, x: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows H"]:
        """k·T, after RoPE."""
        return x if self.key_map is None else self.key_map(x)

    def rotate_queries(self, x: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows H"]:
        """q·T^{-T}, after RoPE; T itself where it is orthogonal."""
        if self.query_map is not None:
            return self.query_map(x)
        return self.rotate_keys(x)

    def _encode(self, x: Float[Tensor, "B K T H"], spec: QuantSpec) -> PackedStates:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        scale, zero = grid(values, spec)
        scale = scale.to(torch.float16).clamp(min=TINY)  # the codes are made for the scale that is stored
        codes = round_to_codes(values, scale.to(values.dtype), zero, spec)
        return PackedStates(pack(codes, spec), scale, zero.to(torch.uint8))

    def encode(self, keys: Float[Tensor, "B K T H"], values: Float[Tensor, "B K T H"]) -> KeyValue:
        """Map the keys, quantize both."""
        return KeyValue(
            self._encode(self.rotate_keys(keys), self.layout.keys), self._encode(values, self.layout.values)
        )

    def decode(self, packed: PackedStates, dtype: torch.dtype) -> Float[Tensor, "B K T H"]:
        """What attention reads; keys stay mapped. Clips are no part of it: keys and values share one grid's shape."""
        wide = torch.promote_types(dtype, torch.float32)
        spec = self.layout.keys
        codes = unpack_codes(packed.codes, self.d_head, spec)
        return dequantize(codes, packed.scale.to(wide), packed.zero.to(wide), spec).to(dtype)

    def bytes_per_token(self, kv_heads: int) -> int:
        """Bytes that one token takes in this layer's cache, keys and values."""
        spec = self.layout.keys
        return 2 * kv_heads * (packed_width(self.d_head, spec) + 3 * spec.groups(self.d_head))


class PackedLayer(CacheLayerMixin):
    """A layer of a Transformers cache that holds codes. `update` hands packed states on: our attention function reads
    them."""

    is_sliding = False  # holds every token; a sliding window is then the mask's work
    is_croppable = True

    def __init__(self, quantizer: KVQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.packed: KeyValue | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate before the first token."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Quantize the new tokens, keep them, return all as (keys, values) `PackedStates`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = self.quantizer.encode(key_states, value_states)
        self.packed = (
            new
            if self.packed is None
            else KeyValue(self.packed.keys.then(new.keys), self.packed.values.then(new.values))
        )
        return self.packed.keys, self.packed.values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self.packed is None else self.packed.keys.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length of keys after the update, offset)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return 0 if self.packed is None else self.packed.keys.nbytes + self.packed.values.nbytes

    def _change(self, change: Any) -> None:
        if self.packed is not None:
            self.packed = KeyValue(self.packed.keys.map(change), self.packed.values.map(change))

    def reset(self) -> None:
        """Forget all tokens."""
        self.packed = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._change(lambda t: t[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: a negative count, or (older Transformers) the length to keep."""
        keep = tokens_to_remove if tokens_to_remove > 0 else self.get_seq_length() + tokens_to_remove
        self._change(lambda t: t[:, :, :keep])

    def offload(self) -> None:
        """To the CPU."""
        self._change(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to the device."""
        self._change(lambda t: t.to(self.device, non_blocking=True))
