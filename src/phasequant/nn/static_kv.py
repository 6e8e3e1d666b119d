r"""A packed cache of fixed capacity whose rows have their own lengths, on the device: for CUDA graphs.

    update(k, v, layer)   quantizes the new tokens into each row's next slots, hands on what attention reads
    advance(n)            the rows are n tokens longer, after all layers were updated

One new token a row: nothing depends on the host. The slots are read off the device, all slots are handed on with the
rows' lengths, and attention stops there (`kernels.gpu.attention`), so that a captured step stays right while it is
replayed. More tokens (prefill, in one piece or several): the longest row's length is read once a step, and only slots
up to it are handed on; after `reset` it is known to be 0, so that filling an empty cache can be captured too. On a GPU
one kernel quantizes and writes (`kernels.gpu.kv`), elsewhere `KVQuantizer.encode`; the codes are the same.

Memory is taken at the first update: capacity × `KVQuantizer.bytes_per_token` a row. Who calls keeps count: past the
capacity a GPU drops new tokens, and everything else is an error. Transformers' models take it as their cache, if
`advance` follows every forward; `generate` does not do that.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from phasequant.errors import PhaseQuantError
from phasequant.nn.attention import quantizers
from phasequant.nn.kv import KeyValue, KVQuantizer, PackedLayer, PackedStates
from phasequant.numerics import packed_width


class Rows:
    """How long the rows of a cache are: one for all its layers."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.lengths: Int[Tensor, " B"] = torch.zeros(batch, dtype=torch.int32, device=device)
        self.seen = torch.zeros_like(self.lengths)  # with this step's tokens
        self.longest = 0  # of `lengths`, where this step has several tokens
        self.empty = True  # known without asking the device

    def begin(self, count: int) -> None:
        """A step of `count` tokens a row, before its first layer."""
        torch.add(self.lengths, count, out=self.seen)
        if count > 1:
            self.longest = 0 if self.empty else int(self.lengths.max())

    def change(self, lengths: Int[Tensor, " B"]) -> None:
        """Other lengths than before."""
        self.lengths.copy_(lengths)
        self.empty = False

    def forget(self) -> None:
        """No tokens."""
        self.lengths.zero_()
        self.empty = True


class StaticPackedLayer(PackedLayer):
    """One layer of a `StaticPackedCache`."""

    is_croppable = False

    def __init__(self, quantizer: KVQuantizer, rows: Rows, capacity: int) -> None:
        super().__init__(quantizer)
        self.rows, self.capacity, self.batch_size = rows, capacity, len(rows.lengths)
        self._matrix: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """All slots; their scales are 0, so that unset ones are read as 0."""
        super().lazy_initialization(key_states, value_states)
        spec, d_head = self.quantizer.layout.keys, self.quantizer.d_head
        shape = (self.batch_size, key_states.shape[1], self.capacity)

        def slots() -> PackedStates:
            codes = torch.zeros(*shape, packed_width(d_head, spec), dtype=torch.uint8, device=self.device)
            scale = torch.zeros(*shape, spec.groups(d_head), dtype=torch.float16, device=self.device)
            return PackedStates(codes, scale, torch.zeros_like(scale, dtype=torch.uint8))

        self._room = KeyValue(slots(), slots())
        if self.quantizer.key_map is not None:
            self._matrix = self.quantizer.key_map.map().matrix().to(self.device, torch.float32).contiguous()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Quantize the new tokens into their slots, return (keys, values) `PackedStates` with the rows' lengths."""
        batch, _, count, _ = key_states.shape
        if batch != self.batch_size:
            raise PhaseQuantError(f"this cache has {self.batch_size} rows, and was given {batch}")
        if count > 1 and self.rows.longest + count > self.capacity:
            raise PhaseQuantError(
                f"{count} tokens after {self.rows.longest} do not fit the cache's capacity of {self.capacity}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._room is not None
        keys, values = self._room
        if self.quantizer.by_triton(key_states.dtype, key_states.device)[0]:
            from phasequant.kernels.gpu.kv import write_kv

            layout, states = self.quantizer.layout, (key_states.detach(), value_states.detach())
            write_kv(*states, self.rows.lengths, keys.parts, values.parts, (layout.keys, layout.values), self._matrix)
        else:
            self._scatter(self._room, self.quantizer.encode(key_states, value_states))
        if count > 1 and not self.rows.longest:
            return tuple(self._room.first(count))
        filled = self._room if count == 1 else self._room.first(self.rows.longest + count)
        return tuple(PackedStates(*states.parts, self.rows.seen) for states in filled)

    def _scatter(self, room: KeyValue, new: KeyValue) -> None:
        slots = self.rows.lengths.long()[:, None] + torch.arange(new.keys.length, device=self.device)
        if slots.device.type == "cpu" and int(slots.max()) >= self.capacity:
            raise PhaseQuantError(f"a row exceeds the cache's capacity of {self.capacity}")
        for states, more in zip(room, new, strict=True):
            for kept, part in zip(states.parts, more.parts, strict=True):
                kept.scatter_(2, slots[:, None, :, None].expand_as(part), part)

    def get_seq_length(self) -> Any:
        """Of the longest row, on the device."""
        return self.rows.lengths.amax()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length of keys after the update, offset)."""
        return (self.capacity if query_length == 1 else int(self.rows.lengths.max()) + query_length), 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return 0 if self._room is None else self._room.keys.nbytes + self._room.values.nbytes

    def _change(self, change: Any) -> None:
        raise PhaseQuantError("the rows of a static cache stay where they are: no beams, no offloading")

    def crop(self, tokens_to_remove: int) -> None:
        """Not a layer's to do."""
        raise PhaseQuantError("rows of a static cache are shortened by its `set_lengths`")

    def reset(self) -> None:
        """The lengths are all that need be forgotten."""
        self.rows.forget()


class StaticPackedCache(Cache):
    """`batch` rows of `capacity` tokens; see the module's docstring."""

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int) -> None:
        self.capacity = capacity
        self.rows = Rows(batch, next(model.parameters()).device)
        super().__init__(layers=[StaticPackedLayer(q, self.rows, capacity) for q in quantizers(model)])

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Tokens of each row, this step's not counted; on the device."""
        return self.rows.lengths

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Of the layers in their order, from the first one on."""
        if layer_idx == 0:
            self.rows.begin(key_states.shape[2])
        return self.layers[layer_idx].update(key_states, value_states)

    def set_lengths(self, lengths: Int[Tensor, " B"]) -> None:
        """Shorten the rows: what comes after is forgotten."""
        self.rows.change(lengths)

    def advance(self, count: int) -> None:
        """The rows are longer by the `count` tokens that every layer was given."""
        self.rows.change(self.rows.lengths + count)

    def mask(self) -> None:
        """None: attention reads the lengths."""

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def describe(self) -> str:
        """For people: what is kept, and what read it last."""
        quantizer = self.layers[0].quantizer
        read = quantizer.attended or "not read yet"
        return f"{quantizer.layout.keys.bits}-bit packed, {read}"
