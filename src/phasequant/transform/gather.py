"""What the closed-form methods read of a 16-bit block: its groups' inputs, what its norms give, what v gives.

`gather` hooks one block while a `stream.Step` runs it over all sequences, and hands every call's tensors to the
collectors it is given; a collector keeps a sum, a maximum, or a sample, never the activations themselves.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.arch import ModelMap
from phasequant.transform.norms import unit

Collector = Callable[[Float[Tensor, "T n"]], None]


@contextmanager
def gather(
    block: nn.Module,
    model_map: ModelMap,
    *,
    inputs: Mapping[str, Collector] | None = None,
    norms: Mapping[str, Collector] | None = None,
    values: Collector | None = None,
) -> Iterator[None]:
    """Hooks for the time of a run: `inputs` of groups, unit outputs of their `norms` (no gain), outputs of v (where
    it is a linear of its own)."""
    hooks = []

    def keep_input(collect: Collector) -> Any:
        return lambda module, args: collect(args[0].flatten(0, -2).float())

    def keep_norm(collect: Collector) -> Any:
        kind = model_map.family.norm
        return lambda module, args: collect(unit(args[0].flatten(0, -2).float(), module, kind))

    for group in model_map.groups:
        if inputs and group.name in inputs:
            entrance = block.get_submodule(group.input)
            hooks.append(entrance.register_forward_pre_hook(keep_input(inputs[group.name])))
        if norms and group.name in norms and group.norm is not None:
            hooks.append(block.get_submodule(group.norm).register_forward_pre_hook(keep_norm(norms[group.name])))
    if values is not None and model_map.family.value is not None:
        take, rows = values, model_map.value_rows
        linear = block.get_submodule(model_map.family.value)
        hooks.append(linear.register_forward_hook(lambda m, a, y: take(y[..., rows].flatten(0, -2).float())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Largest:
    """Largest magnitude of every channel."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, x: Float[Tensor, "T n"]) -> None:
        top = x.abs().amax(0)
        self.value = top if self.value is None else torch.maximum(self.value, top)


class SecondMoments:
    """Σ xxᵀ of every block of `size` neighbouring channels, and how many tokens it is over."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, x: Float[Tensor, "T n"]) -> None:
        parts = x.unflatten(-1, (-1, self.size)).transpose(0, 1)  # (blocks, T, size)
        product = (parts.transpose(-1, -2) @ parts).to(torch.float64)
        self.total = product if self.total is None else self.total + product
        self.count += len(x)

    @property
    def mean(self) -> Float[Tensor, "m B B"]:
        """E[xxᵀ] by block, fp64."""
        assert self.total is not None
        return self.total / self.count


class Sample:
    """Up to `most` tokens, spread evenly over what passes, those with the largest values always among them."""

    def __init__(self, most: int, a_call: int) -> None:
        """`most`: tokens kept in all; `a_call`: tokens kept of each call."""
        self.most, self.a_call = most, a_call
        self.parts: list[Tensor] = []

    def __call__(self, x: Float[Tensor, "T n"]) -> None:
        if len(x) > self.a_call:
            peaks = x.abs().amax(-1).topk(min(max(self.a_call // 32, 1), len(x))).indices
            even = torch.linspace(0, len(x) - 1, self.a_call - len(peaks), device=x.device).long()
            x = x[torch.cat((even, peaks)).unique()]
        self.parts.append(x.clone())

    @property
    def rows(self) -> Float[Tensor, "T n"]:
        """The sample."""
        return torch.cat(self.parts)[: self.most]


def group_weight(block: nn.Module, linears: tuple[str, ...]) -> Float[Tensor, "O I"]:
    """The stacked weights of the linears that read one input."""
    return torch.cat([block.get_submodule(name).get_parameter("weight").detach().float() for name in linears])
