r"""Keys and values in 4 bits: the grid, the packed cache layer, and R3.

Each token's key and value of each kv head is one row (or `group_size` pieces of it) on an asymmetric grid:

    q = clamp(round(x/s) + z, 0, 15),   s = (max(x,0) - min(x,0))/15 rounded to fp16,   x̂ = s·(q - z)

Keys are mapped first, after RoPE, by a T of the head size (R3, a Hadamard matrix; or a learned one); queries get T^{-T}
in the attention function, so q·kᵀ is unchanged but for the rounding: (q·T^{-T})(k·T)ᵀ = q·kᵀ. Values were mapped when
the weights were folded. A token costs, a head: d_head/2 bytes of codes + 3 bytes (fp16 scale, 8-bit zero) a group, for
keys and for values. Because every token is rounded on its own, prefill, chunked prefill and decoding see the same
numbers, with a cache or without. A full cache layer moves to twice its room: a step writes its own
token and moves one other on average; up to twice the bytes held are reserved.

Sources: QuaRot (arXiv 2404.00456) for R3 and the asymmetric KV grid; the fp16 scale and including zero are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from phasequant.kernels.gpu import runs_on
from phasequant.nn.online import OnlineMap
from phasequant.numerics import LinearMap, QuantSpec, dequantize, grid, pack, packed_width, round_to_codes
from phasequant.numerics import unpack as unpack_codes

TINY = 2.0**-24  # smallest fp16: keeps a scale from becoming 0
TRITON_ON = {
    "cuda"
}  # kinds of device where Triton reads and writes the cache; tests add "cpu", where it is interpreted


@dataclass
class PackedStates:
    """Keys or values as codes; the token axis is the third."""

    codes: UInt8[Tensor, "B K T bytes"]
    scale: Float[Tensor, "B K T G"]
    zero: Integer[Tensor, "B K T G"]
    lengths: Int[Tensor, " B"] | None = None  # tokens of each row, on the device; None: all T

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales, zero points."""
        return self.codes, self.scale, self.zero

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
        return PackedStates(*(change(part) for part in self.parts))

    def first(self, tokens: int) -> "PackedStates":
        """Views of the first tokens."""
        return self.map(lambda t: t[:, :, :tokens])


class KeyValue(NamedTuple):
    """Keys and values of the same tokens."""

    keys: PackedStates
    values: PackedStates

    def map(self, change: Any) -> "KeyValue":
        """The same change to all tensors."""
        return KeyValue(self.keys.map(change), self.values.map(change))

    def first(self, tokens: int) -> "KeyValue":
        """Views of the first tokens."""
        return KeyValue(self.keys.first(tokens), self.values.first(tokens))

    def with_room(self, tokens: int) -> "KeyValue":
        """A copy with unset tokens after these, to a length of `tokens`."""

        def roomier(t: Tensor) -> Tensor:
            out = t.new_empty(*t.shape[:2], tokens, t.shape[3])
            out[:, :, : t.shape[2]] = t
            return out

        return self.map(roomier)

    def write(self, new: "KeyValue", at: int) -> None:
        """Put `new` at token `at`, in place."""
        for states, more in zip(self, new, strict=True):
            for kept, part in zip(states.parts, more.parts, strict=True):
                kept[:, :, at : at + more.length] = part


@dataclass(frozen=True)
class KVLayout:
    """The KV grids of one block, and the map of its keys (None: none)."""

    keys: QuantSpec
    values: QuantSpec
    qk: Mapping[str, Any] | None = None


@cache
def _triton_runs(spec: QuantSpec, d_head: int, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    ok, reason = runs_on(device)
    if not ok:
        return False, reason
    from phasequant.kernels.gpu.kv import can_run

    return can_run(spec, d_head, dtype, device)


class KVQuantizer(nn.Module):
    """The KV grids of one attention module, and the map of its keys and queries (R3, or a learned one)."""

    def __init__(self, layout: KVLayout, d_head: int, device: torch.device | None = None) -> None:
        """Empty maps, for a loader to fill."""
        super().__init__()
        self.layout = layout
        self.d_head = d_head
        self.enabled = True
        self.attended: str | None = None  # what computed the last attention over this cache (`nn.attention`)
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

    def by_triton(self, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """Whether Triton's kernels read and write this cache, for states of `dtype` on `device`; if not, why."""
        if device.type not in TRITON_ON:
            return False, f"Triton is for {', '.join(sorted(TRITON_ON)) or 'no device'}, not for {device.type}"
        return _triton_runs(self.layout.keys, self.d_head, dtype, device)

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
        self._room: KeyValue | None = None
        self._held = 0

    @property
    def packed(self) -> KeyValue | None:
        """What is held, as views."""
        return None if self._room is None else self._room.first(self._held)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate before the first token."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Quantize the new tokens, keep them, return all as (keys, values) `PackedStates`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = self.quantizer.encode(key_states, value_states)
        total = self._held + new.keys.length
        if self._room is None:
            self._room = new.map(Tensor.contiguous)
        else:
            room = self._room.keys
            frozen = room.codes.is_inference() and not torch.is_inference_mode_enabled()
            if total > room.length or frozen:
                self._room = self._room.first(self._held).with_room(max(2 * self._held, total))
            self._room.write(new, self._held)
        self._held = total
        return tuple(self._room.first(total))

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length of keys after the update, offset)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and zero points held."""
        packed = self.packed
        return 0 if packed is None else packed.keys.nbytes + packed.values.nbytes

    def _change(self, change: Any) -> None:
        packed = self.packed
        if packed is not None:
            self._room = packed.map(change)

    def reset(self) -> None:
        """Forget all tokens."""
        self._room, self._held = None, 0
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
        keep = tokens_to_remove if tokens_to_remove > 0 else self._held + tokens_to_remove
        self._held = min(max(keep, 0), self._held)

    def offload(self) -> None:
        """To the CPU."""
        self._change(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to the device."""
        self._change(lambda t: t.to(self.device, non_blocking=True))
