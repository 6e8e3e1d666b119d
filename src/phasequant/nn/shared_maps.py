"""On a CPU, linears of a group, which read one tensor through equal maps, map it once: the last mapped input is kept as
long as the tensor it was made from lives unchanged."""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phasequant.nn.online import OnlineMap


def stamp_of(tensors: Iterable[Tensor | None]) -> tuple[Any, ...] | None:
    """Which tensors these are, and as of which write; None where one of them does not count its writes."""
    held = [t for t in tensors if t is not None]
    if any(t.is_inference() for t in held):
        return None
    return tuple((id(t), t.data_ptr(), t._version) for t in held)


class SharedMaps:
    """`map` maps, or gives what the reader before was given."""

    class Last(NamedTuple):
        """A mapped input."""

        of: "weakref.ref[Tensor]"
        version: int
        online: OnlineMap
        stamp: tuple[Any, ...] | None
        read: Tensor

        def equals(self, other: OnlineMap) -> bool:
            """Whether another map is what made this."""
            if self.stamp != stamp_of(self.online.buffers()):
                return False
            if other is self.online:
                return True
            if type(other) is not OnlineMap or other.layout() != self.online.layout():
                return False
            pairs = zip(self.online.buffers(), other.buffers(), strict=True)
            return all(own.dtype == its.dtype and torch.equal(own, its) for own, its in pairs)

    def __init__(self) -> None:
        self._last: SharedMaps.Last | None = None

    def map(self, x: Tensor, online: OnlineMap) -> Tensor:
        """`online(x)`, or what it gave to the reader before."""
        last = self._last
        if last is not None and last.of() is x and last.version == x._version and last.equals(online):
            return last.read
        read, stamp = online(x), stamp_of(online.buffers())
        known = stamp is not None and type(online) is OnlineMap and not (x.is_inference() or read.requires_grad)
        if known and x.device.type == "cpu":
            self._last = self.Last(weakref.ref(x, self._forget), x._version, online, stamp, read)
        return read

    def _forget(self, of: "weakref.ref[Tensor]") -> None:
        if self._last is not None and self._last.of is of:
            self._last = None
