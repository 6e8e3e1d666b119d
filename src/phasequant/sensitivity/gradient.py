r"""Gradient of what rounding costs the model, in the noise of each group, at all-low:

    harm(g, b) = Σ_t ⟨ ∂L/∂y_t , W·(Q_b(x_t) - x_t) ⟩        ∂L/∂y where every group reads y = W·Q_low(x)
    L = KL to the 16-bit model + loss of the next token, on calibration tokens; rounding passed straight through

The loss is what perplexity is made of, but noisy on few tokens; KL is not noisy, but what it gains most from is not
what the loss does: their sum chose better plans than either (LOG.md). Where `fisher` weighs each group's
noise as if it were alone, this is taken where all the others round too, so what noises have in common counts; and
where `kl` takes a difference of two runs of a model that answers a flipped code with another one, a gradient does not
see such chaos. To first order it is what raising a group wins. (The mean with the gradient under the plan that it led
to should be right to second order; measured, it chose worse: LOG.md.) Where weights and KV share the budget
(`policy.allow`), they are rounded too (weights to nearest: more noise than GPTQ leaves), and

    harm(weights of g, b) = Σ_t ⟨ ∂L/∂y_t , x̂_t·(Q_b(W) - W)ᵀ ⟩
    harm(KV of a block, b) = Σ_t ⟨ ∂L/∂k_t , Q_b(k_t) - k_t ⟩ + the same of v

Costs, for the tokens, two forward passes and one backward; memory as `fisher`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from phasequant.arch import Place
from phasequant.nn import SLOT, QuantLinear, in_16_bits, switch_attention
from phasequant.numerics import LinearMap, QuantSpec, dequantize, fake_quantize, quantize
from phasequant.ranks import Dealt
from phasequant.sensitivity.contract import KV, WEIGHTS, Ask, Sensitivity, bits_of
from phasequant.stream import resident
from phasequant.transform.learned_grids import Grid, LearnedKV
from phasequant.transform.learned_maps import LearnedMap

Sums = dict[int, float]
"""Bits → ⟨gradient, noise⟩ so far."""


def _collect(noisy: Tensor, shifts: dict[int, Tensor], sums: Sums) -> None:
    """Add ⟨gradient of `noisy`, noise⟩ of every grid to `sums` when it comes."""

    def arrived(grad: Tensor) -> None:
        for bits, shift in shifts.items():
            sums[bits] += float((grad * shift).sum())

    noisy.register_hook(arrived)


def _noisy(
    linear: QuantLinear, now: QuantSpec | None, grids: list[QuantSpec], sums: Sums, weights: tuple[QuantSpec, ...],
    weight_sums: Sums,
) -> Any:  # fmt: skip
    """Have a linear read the grid `now` with weights on the first of `weights`, and collect what every grid adds."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = linear.prepare(args[0].detach())
        weight = linear.dense_weight().to(x)
        shifts = {spec.bits: (fake_quantize(x, spec) - x) @ weight.T for spec in grids}
        read = x if now is None else fake_quantize(x, now)
        of_weights = {spec.bits: read @ (_rounded(weight, spec) - weight).T for spec in weights}
        noisy = y + (read - x) @ weight.T
        if weights:
            noisy = noisy + of_weights[weights[0].bits]
        _collect(noisy, shifts, sums)
        if weights:
            _collect(noisy, of_weights, weight_sums)
        return noisy

    return linear.register_forward_hook(hook)


def _rounded(weight: Tensor, spec: QuantSpec) -> Tensor:
    codes, scale, zero = quantize(weight.float(), spec, mse_step=4)
    return dequantize(codes, scale, zero, spec).to(weight)


class _NoisyKV(LearnedKV):
    """Keys and values on the first of `grids`, straight through; collects what every grid adds."""

    def __init__(self, grids: tuple[QuantSpec, ...], qk: LinearMap | None, sums: Sums) -> None:
        own = None if qk is None else LearnedMap(qk).requires_grad_(False)
        super().__init__(Grid(None, learned=False), Grid(None, learned=False), own)
        self._grids, self._sums = grids, sums

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mapped and rounded keys, rounded values."""
        mapped = keys if self.qk is None else self.qk(keys)
        return self._through(mapped), self._through(values)

    def _through(self, x: Tensor) -> Tensor:
        shifts = {spec.bits: (fake_quantize(x.detach().float(), spec) - x.detach()).to(x) for spec in self._grids}
        noisy = x + shifts[self._grids[0].bits]
        _collect(noisy, shifts, self._sums)
        return noisy


@contextmanager
def _noisy_kv(ask: Ask, sums: dict[Place, Sums]) -> Iterator[None]:
    """Every block's keys and values noisy, for a while."""
    model = ask.run.model
    decoder = model.get_submodule(ask.map.family.decoder)
    before = model.config._attn_implementation, decoder.config._attn_implementation
    attentions = [model.get_submodule(f"{ask.map.block_name(b)}.{ask.map.family.attention}") for b in ask.map.blocks]
    try:
        if ask.kv:
            switch_attention(model, ask.map)
            for block, attention in enumerate(attentions):
                noisy = _NoisyKV(ask.kv, ask.qk.get(block), sums[block, KV])
                setattr(attention, SLOT, noisy.to(next(attention.parameters()).device))
        yield
    finally:
        if ask.kv:
            for attention in attentions:
                delattr(attention, SLOT)
            model.config._attn_implementation, decoder.config._attn_implementation = before


def _run(ask: Ask, row: Tensor, sums: dict[Place, Sums], hooked: Any) -> float:
    """One sequence; its KL summed over tokens."""
    embeddings = ask.run.model.get_submodule(ask.map.family.embeddings)
    ids = row[None].to(embeddings.weight.device)
    with torch.no_grad():
        p = ask.run.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    hooks = hooked()
    try:
        with torch.enable_grad(), _noisy_kv(ask, sums):
            inputs = embeddings(ids).detach().requires_grad_(True)
            q = ask.run.model(inputs_embeds=inputs, use_cache=False).logits[0].float().log_softmax(-1)
            divergence = nn.functional.kl_div(q, p, reduction="sum", log_target=True)
            (divergence + nn.functional.nll_loss(q[:-1], ids[0, 1:], reduction="sum")).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return float(divergence.detach())


def gradient(ask: Ask) -> Sensitivity:
    """See the module's docstring."""
    begun = time.monotonic()
    specs = [spec for spec in (ask.low, *ask.choices) if spec is not None]
    sums: dict[Place, dict[int, float]] = {p: dict.fromkeys((s.bits for s in specs), 0.0) for p in ask.places}
    for block in ask.map.blocks:
        if ask.weights:
            for group in ask.map.groups:
                sums[block, WEIGHTS + group.name] = dict.fromkeys((s.bits for s in ask.weights), 0.0)
        if ask.kv:
            sums[block, KV] = dict.fromkeys((s.bits for s in ask.kv), 0.0)
    total = 0.0

    def hooked() -> list[Any]:
        hooks = []
        for block, group, name in ask.map.linears():
            linear = ask.run.model.get_submodule(name)
            assert isinstance(linear, QuantLinear)
            own = [found for spec in specs if (found := ask.at((block, group), spec))]
            now = ask.at((block, group), ask.low)
            of_weights = sums.get((block, WEIGHTS + group), {})
            hooks.append(_noisy(linear, now, own, sums[block, group], ask.weights, of_weights))
        return hooks

    with in_16_bits(ask.run.model), resident(ask.run.model, ask.run.device):
        dealt = Dealt.of(len(ask.run.tokens))
        for row in ask.run.tokens[dealt.mine]:
            total += _run(ask, row, sums, hooked)
    tokens = ask.run.tokens.numel()
    harm = {place: {bits: dealt.total(value) / tokens for bits, value in by.items()} for place, by in sums.items()}
    total = dealt.total(total)
    for choice in ask.choices:
        for place in ask.places:
            harm[place].setdefault(bits_of(choice), 0.0)
    return Sensitivity("gradient", harm, time.monotonic() - begun, {"kl": total / tokens})
