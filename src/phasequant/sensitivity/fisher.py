r"""Gradient-weighted noise, from one backward pass:

    harm(g, b) = Σ_t ( Σ_{linears of g} ∂L/∂y_t · W·(Q_b(x_t) - x_t) )² / 2

L is the negative log-likelihood of the calibration text, so the square of its directional derivative along the rounding
noise is the empirical Fisher's quadratic form: the expected rise of the loss, up to what noise of different tokens and
groups has in common. Costs one forward and one backward pass; the model is on one device, and the noise of every
linear's output is kept for the backward pass (tokens × widths × 4 bytes).
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from phasequant.arch import Place
from phasequant.nn import QuantLinear, in_16_bits
from phasequant.numerics import QuantSpec, fake_quantize
from phasequant.ranks import Dealt
from phasequant.sensitivity.contract import Ask, Sensitivity, bits_of
from phasequant.stream import resident


def _watch(linear: QuantLinear, grids: list[QuantSpec], sums: dict[int, list[Tensor]]) -> Any:
    """Add, for every grid, g·δy of the tokens of each call to `sums`, when the gradient comes."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = linear.prepare(args[0].detach())
        weight = linear.dense_weight().to(x)
        shifts = {spec.bits: (fake_quantize(x, spec) - x) @ weight.T for spec in grids}

        def arrived(grad: Tensor) -> None:
            for bits, shift in shifts.items():
                sums[bits].append((grad * shift).sum(-1).flatten())

        y.register_hook(arrived)

    return linear.register_forward_hook(hook)


def _run(ask: Ask, row: Tensor, watch: Callable[[], list[Any]]) -> None:
    hooks = watch()
    try:
        embeddings = ask.run.model.get_submodule(ask.map.family.embeddings)
        with torch.enable_grad():
            inputs = embeddings(row[None].to(embeddings.weight.device)).detach().requires_grad_(True)
            logits = ask.run.model(inputs_embeds=inputs, use_cache=False).logits[0]
            loss = nn.functional.cross_entropy(logits[:-1].float(), row[1:].to(logits.device), reduction="sum")
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()


def fisher(ask: Ask) -> Sensitivity:
    """See the module's docstring."""
    begun = time.monotonic()
    specs = [spec for spec in (ask.low, *ask.choices) if spec is not None]
    grids = {place: [own for s in specs if (own := ask.at(place, s))] for place in ask.places}
    harm: dict[Place, dict[int, float]] = {p: dict.fromkeys((s.bits for s in specs), 0.0) for p in ask.places}
    with in_16_bits(ask.run.model), resident(ask.run.model, ask.run.device):
        dealt = Dealt.of(len(ask.run.tokens))
        for row in ask.run.tokens[dealt.mine]:
            sums: dict[str, dict[int, list[Tensor]]] = {}

            def watch(into: dict[str, dict[int, list[Tensor]]] = sums) -> list[Any]:
                hooks = []
                for block, group, name in ask.map.linears():
                    linear = ask.run.model.get_submodule(name)
                    assert isinstance(linear, QuantLinear)
                    into[name] = {spec.bits: [] for spec in specs}
                    hooks.append(_watch(linear, grids[block, group], into[name]))
                return hooks

            _run(ask, row, watch)
            for place in ask.places:
                parts = ask.map.parts(ask.map.group(place[1]))
                for bits in harm[place]:
                    for part in parts:  # experts have tokens of their own; other linears of a group share theirs
                        names = [f"{ask.map.block_name(place[0])}.{name}" for name in part.linears]
                        found = [torch.cat(sums[name][bits]) for name in names if sums[name][bits]]
                        if found:
                            harm[place][bits] += float(torch.stack(found).sum(0).square().sum()) / 2
    tokens = ask.run.tokens.numel()
    scaled = {place: {bits: dealt.total(value) / tokens for bits, value in by.items()} for place, by in harm.items()}
    for choice in ask.choices:
        for by in scaled.values():
            by.setdefault(bits_of(choice), 0.0)
    return Sensitivity("fisher", scaled, time.monotonic() - begun, {})
