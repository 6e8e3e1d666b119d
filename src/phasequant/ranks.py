"""More than one process on one run: `torchrun --nproc-per-node 2 -m phasequant quantize …`, on one machine or several.

    sequences of calibration   dealt to the ranks in turn; sums, extremes and rows of statistics are brought together
    rows of a weight           a part for each rank (GPTQ's solves and the clip searches are independent by row)
    blocks that learn alone    dealt in turn (`flat` and every other block-wise method); the learned ones are exchanged
    sequences of a batch       of `spin` and of `finetune`'s distillation, dealt in turn; their gradients are added
    chunks, requests           of evaluation, dealt in turn
    everything else            done by all alike, and what rank 0 found is taken: a plan, a transform, scales

Every rank holds the model, and takes the same path: whatever a rank could decide otherwise than rank 0 is `agreed`
first. Rank 0 alone speaks and writes. CPU tensors travel by gloo, CUDA tensors by NCCL. With one process all of this is
the identity. Sums are in another order than in one process, and differ in their last bits.

A rank that fails ends the run: torchrun stops the others.
"""

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from phasequant.errors import PhaseQuantError

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # a rank may work alone for long; one that fails is noticed by torchrun


@dataclass(frozen=True)
class World:
    """How many processes there are, which of them this is, and which on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


_world = World()


def world() -> World:
    """Where this process stands."""
    return _world


def leads() -> bool:
    """Whether this process speaks and writes."""
    return _world.rank == 0


def start() -> World:
    """Join the run that torchrun's variables name; alone where there are none."""
    global _world
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return _world
    found = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    cuda = torch.cuda.is_available()
    if cuda:
        if found.local >= torch.cuda.device_count():
            raise PhaseQuantError(
                f"torchrun started {found.local + 1} processes or more here, and there are "
                f"{torch.cuda.device_count()} GPUs: one process a GPU (--nproc-per-node {torch.cuda.device_count()})"
            )
        torch.cuda.set_device(found.local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    _world = found
    return found


def stop() -> None:
    """Leave the run."""
    global _world
    if _world.size > 1:
        _world = World()
        dist.destroy_process_group()


def wait() -> None:
    """Until all ranks are here."""
    agreed(None)


def agreed(value: T, owner: int = 0) -> T:
    """What rank `owner` has."""
    if _world.size == 1:
        return value
    sends = _world.rank == owner
    data = torch.frombuffer(bytearray(_packed(value)), dtype=torch.uint8) if sends else torch.empty(0)
    size = torch.tensor(data.numel())
    dist.broadcast(size, src=owner)
    if not sends:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=owner)
    return value if sends else _unpacked(data.numpy().tobytes())


def agreed_tensor(tensor: Tensor) -> None:
    """Overwrite a tensor by rank 0's, in place."""
    if _world.size > 1:
        whole = tensor.contiguous()
        dist.broadcast(whole, src=0)
        if whole is not tensor:
            tensor.copy_(whole)


def everyones(value: T) -> list[T]:
    """What each rank has, in the order of ranks."""
    if _world.size == 1:
        return [value]
    found: list[Any] = [None] * _world.size
    for owner in range(_world.size):
        found[owner] = agreed(value, owner)
    return found


def total(value: T) -> T:
    """The sum over ranks of a tensor (in place) or a number."""
    if _world.size == 1:
        return value
    if isinstance(value, Tensor):
        dist.all_reduce(value)
        return value
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box)
    return type(value)(box.item())  # type: ignore[call-arg]


def gradients_together(parameters: Iterable[Tensor], loss: float) -> float:
    """The loss of all ranks, each of which took its part of a batch; parameters have the gradient of all of it."""
    if _world.size == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        total(parameter.grad)
    return total(loss)


def rows_together(part: Tensor, counts: Sequence[int]) -> Tensor:
    """Parts of a tensor's rows, `counts[r]` of them rank r's, one after the other."""
    if _world.size == 1:
        return part
    kind = part.dtype
    wire = part.to(torch.int32) if kind in (torch.int16, torch.uint16) else part.contiguous()
    pieces = [torch.empty(count, *part.shape[1:], dtype=wire.dtype, device=part.device) for count in counts]
    for owner, piece in enumerate(pieces):
        if owner == _world.rank:
            piece.copy_(wire)
        dist.broadcast(piece, src=owner)
    return torch.cat(pieces).to(kind)


def part_of(count: int, rank: int | None = None) -> range:
    """The rows, of `count`, that are a rank's (this one's)."""
    rank = _world.rank if rank is None else rank
    return range(count * rank // _world.size, count * (rank + 1) // _world.size)


@dataclass(frozen=True)
class Dealt:
    """Things dealt to the ranks in turn: this rank has every `step`-th, from `first`. Where they are not dealt (`step`
    1), everyone has all, and nothing is brought together."""

    count: int
    first: int = 0
    step: int = 1

    @classmethod
    def of(cls, count: int, spread: bool = True) -> "Dealt":
        """Deal them; where there are fewer than ranks, everyone has all."""
        if not spread or count < _world.size:
            return cls(count)
        return cls(count, _world.rank, _world.size)

    @property
    def mine(self) -> range:
        """Which are this rank's."""
        return range(self.first, self.count, self.step)

    def below(self, most: int) -> int:
        """How many of the first `most` are this rank's."""
        return len(range(self.first, min(most, self.count), self.step))

    def total(self, value: T) -> T:
        """The sum over all of a sum over this rank's."""
        return value if self.step == 1 else total(value)

    def ordered(self, values: Sequence[T], count: int | None = None) -> list[T]:
        """What all ranks have of theirs (of the first `count`), in the order of the things."""
        if self.step == 1:
            return list(values)
        count = self.count if count is None else min(count, self.count)
        found: list[Any] = [None] * count
        for owner, theirs in enumerate(everyones(list(values))):
            for index, value in zip(range(owner, count, self.step), theirs, strict=True):
                found[index] = value
        return found


def _packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(data: bytes) -> Any:
    """What another rank of this run sent; its GPU's tensors come to this rank's."""

    def place(storage: Any, at: str) -> Any:
        return storage.cuda(_world.local) if at.startswith("cuda") else storage

    return torch.load(io.BytesIO(data), map_location=place, weights_only=False)
