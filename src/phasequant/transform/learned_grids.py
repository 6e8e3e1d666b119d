"""Grids whose clips are parameters: of weights, of inputs, of keys and values.

A clip ratio is sigmoid(p), p = 4 at the start (0.982, FlatQuant's), one per weight scale, one per input, key and value
grid.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.numerics import QuantSpec, grid, straight_through
from phasequant.transform.learned_maps import LearnedMap

CLIP_START = 4.0
LEAST_CLIP = 0.05
ALMOST_ONE = 0.998


class Clip(nn.Module):
    """sigmoid(p): fractions of the largest magnitude."""

    def __init__(self, start: Float[Tensor, "..."]) -> None:
        """Begins at the fractions `start`; where those are 1, at FlatQuant's 0.982."""
        super().__init__()
        self.shape = start.shape
        self.logit = nn.Parameter(torch.empty(start.numel(), device=start.device))
        self.begin_at(start)

    @torch.no_grad()
    def begin_at(self, start: Float[Tensor, "..."]) -> None:
        """Begin at other fractions."""
        logits = torch.logit(start.float().clamp(LEAST_CLIP, ALMOST_ONE))
        self.logit.copy_(torch.where(start < 1, logits, CLIP_START).flatten())

    def forward(self) -> Tensor:
        """The fractions."""
        return self.logit.sigmoid().reshape(self.shape)


class Grid(nn.Module):
    """A grid with a clip that is learned or fixed; no spec: the input stays as it is."""

    fixed: Tensor | None

    def __init__(
        self,
        spec: QuantSpec | None,
        *,
        learned: bool,
        start: Float[Tensor, "..."] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`start`: clip ratios to begin with, or to stay at where they are not learned; default: the grid's own."""
        super().__init__()
        self.spec = spec
        self.clip: Clip | None = None
        self.register_buffer("fixed", start)
        if learned and spec is not None:
            own = torch.tensor(1.0 if spec.clip == "mse" else float(spec.clip), device=device)
            self.clip = Clip(own if start is None else start)

    def forward(self, x: Tensor) -> Tensor:
        """x rounded, with a straight-through gradient."""
        if self.spec is None:
            return x
        return straight_through(x, self.spec, self.fixed if self.clip is None else self.clip())

    def result(self) -> QuantSpec | None:
        """The grid with its learned clip, if it has one."""
        if self.clip is None or self.spec is None:
            return None
        return replace(self.spec, clip=float(self.clip().detach()))


class LearnedKV(nn.Module):
    """Stands in an attention module where a `KVQuantizer` would: rounds, and hands dense states on."""

    enabled = True

    def __init__(self, keys: Grid, values: Grid, qk: LearnedMap | None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.qk = qk

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mapped and rounded keys, rounded values."""
        return self.keys(keys if self.qk is None else self.qk(keys)), self.values(values)

    def rotate_keys(self, keys: Tensor) -> Tensor:
        """k·T, of the prefix, which is not rounded."""
        return keys if self.qk is None else self.qk(keys)

    def decode(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """They are dense already."""
        return _for_attention(states)

    def rotate_queries(self, queries: Tensor) -> Tensor:
        """q·T^{-T}."""
        return _for_attention(queries if self.qk is None else self.qk.inverse_transpose(queries))


def _for_attention(states: Tensor) -> Tensor:
    """In bfloat16 on a GPU, which has fast attention for that alone; keys and values were rounded to 4 bits before."""
    return states.bfloat16() if states.is_cuda else states


def searched_clips(weight: Float[Tensor, "O I"], spec: QuantSpec) -> Float[Tensor, "O G"]:
    """The clip ratio that the MSE search finds for every scale of a weight."""
    searched, _ = grid(weight, replace(spec, clip="mse"))
    plain, _ = grid(weight, replace(spec, clip=1.0))
    return searched / plain
