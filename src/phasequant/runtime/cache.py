"""Caches of fixed capacity whose rows have their own lengths, on the device: what a CUDA graph can be captured over.

    update(k, v, layer)   writes at each row's length, hands on what attention reads
    advance(n)            the rows are n tokens longer, after all layers were updated
    mask()                which slots a single new token sees; None where attention reads the lengths itself

A 16-bit cache is two tensors a layer. Attention over it is SDPA: over the new tokens while a cache is filled, over all
slots and masked afterwards. `flash` leaves the mask off, so that SDPA takes its flash kernel: right only once a
row is full, and there for one thing, to give a 16-bit baseline its fastest attention when it is timed.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phasequant.nn.attention import quantizers
from phasequant.nn.static_kv import StaticPackedCache


class Static16Cache:
    """Keys and values of every layer in 16 bits (B, K, S, H)."""

    def __init__(self, decoder: Any, batch: int, capacity: int, *, flash: bool = False) -> None:
        shape = (batch, decoder.kv_heads, capacity, decoder.d_head)
        self.capacity, self.flash = capacity, flash
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=decoder.device)
        kept = {"dtype": decoder.dtype, "device": decoder.device}
        self.keys = [torch.zeros(shape, **kept) for _ in decoder.blocks]
        self.values = [torch.zeros(shape, **kept) for _ in decoder.blocks]

    def update(
        self, keys: Float[Tensor, "B K T H"], values: Float[Tensor, "B K T H"], layer: int
    ) -> tuple[Tensor, Tensor]:
        """All slots after one token, the new tokens alone where there are more (a cache is filled from its start)."""
        count = keys.shape[2]
        if count > 1:
            self.keys[layer][:, :, :count], self.values[layer][:, :, :count] = keys, values
            return keys, values
        at = self.lengths.long()[:, None, None, None].expand(-1, keys.shape[1], 1, keys.shape[3])
        self.keys[layer].scatter_(2, at, keys)
        self.values[layer].scatter_(2, at, values)
        return self.keys[layer], self.values[layer]

    def mask(self) -> Tensor | None:
        """(B, 1, 1, S), True where seen."""
        if self.flash:
            return None
        return (torch.arange(self.capacity, device=self.lengths.device) <= self.lengths[:, None])[:, None, None]

    def set_lengths(self, lengths: Tensor) -> None:
        """Of the rows."""
        self.lengths.copy_(lengths)

    def advance(self, count: int) -> None:
        """The rows are longer by `count`."""
        self.lengths += count

    def reset(self) -> None:
        """Empty."""
        self.lengths.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def describe(self) -> str:
        """For people."""
        return "16-bit, SDPA" + (" (flash, over all slots)" if self.flash else "")


def make_cache(decoder: Any, batch: int, capacity: int, *, flash: bool = False) -> Any:
    """Packed where the model's KV is quantized, else in 16 bits."""
    if quantizers(decoder.model):
        return StaticPackedCache(decoder.model, batch, capacity)
    return Static16Cache(decoder, batch, capacity, flash=flash)
