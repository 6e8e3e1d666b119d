r"""Gradient of the model's KL in the noise of each group, under a plan (all-low at first):

    harm(g, b) = Σ_t ⟨ ∂KL/∂y_t , W·(Q_b(x_t) - x_t) ⟩        ∂KL/∂y where every group reads y = W·Q_plan(x)

KL is to the 16-bit model, on calibration tokens, rounding passed straight through. Where `fisher` weighs each group's
noise as if it were alone, this is taken where all the others round too, so what noises have in common counts; and
where `kl` takes a difference of two runs of a model that answers a flipped code with another one, a gradient does not
see such chaos. To first order it is what raising a group wins; the mean of the gradients at all-low and under the plan
that they led to (`policy.rounds: 2`) is right to second order, as a trapezoid is. Costs, for the tokens, two forward
passes and one backward; memory as `fisher`.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from phasequant.arch import Place
from phasequant.nn import QuantLinear, in_16_bits
from phasequant.numerics import QuantSpec, fake_quantize
from phasequant.sensitivity.contract import Ask, Sensitivity, bits_of


def _noisy(linear: QuantLinear, now: QuantSpec | None, grids: list[QuantSpec], sums: dict[int, float]) -> Any:
    """Have a linear read the grid `now`, and add ⟨∂KL/∂y, noise⟩ of every grid to `sums` when the gradient comes."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = linear.prepare(args[0].detach())
        weight = linear.dense_weight().to(x)
        shifts = {spec.bits: (fake_quantize(x, spec) - x) @ weight.T for spec in grids}
        noisy = y.clone() if now is None else y + (fake_quantize(x, now) - x) @ weight.T

        def arrived(grad: Tensor) -> None:
            for bits, shift in shifts.items():
                sums[bits] += float((grad * shift).sum())

        noisy.register_hook(arrived)
        return noisy

    return linear.register_forward_hook(hook)


def _run(ask: Ask, row: Tensor, hooked: Any) -> float:
    """One sequence; its KL summed over tokens."""
    embeddings = ask.run.model.get_submodule(ask.map.family.embeddings)
    ids = row[None].to(embeddings.weight.device)
    with torch.no_grad():
        p = ask.run.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    hooks = hooked()
    try:
        with torch.enable_grad():
            inputs = embeddings(ids).detach().requires_grad_(True)
            q = ask.run.model(inputs_embeds=inputs, use_cache=False).logits[0].float().log_softmax(-1)
            loss = nn.functional.kl_div(q, p, reduction="sum", log_target=True)
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return float(loss.detach())


def gradient(ask: Ask) -> Sensitivity:
    """See the module's docstring."""
    begun = time.monotonic()
    specs = [spec for spec in (ask.low, *ask.choices) if spec is not None]
    sums: dict[Place, dict[int, float]] = {p: dict.fromkeys((s.bits for s in specs), 0.0) for p in ask.places}
    total = 0.0

    def hooked() -> list[Any]:
        hooks = []
        for block, group, name in ask.map.linears():
            linear = ask.run.model.get_submodule(name)
            assert isinstance(linear, QuantLinear)
            own = [found for spec in specs if (found := ask.at((block, group), spec))]
            now = ask.at((block, group), ask.low) if ask.plan is None else ask.plan[block, group]
            hooks.append(_noisy(linear, now and now.dynamic, own, sums[block, group]))
        return hooks

    with in_16_bits(ask.run.model):
        for row in ask.run.tokens:
            total += _run(ask, row, hooked)
    tokens = ask.run.tokens.numel()
    harm = {place: {bits: value / tokens for bits, value in by.items()} for place, by in sums.items()}
    for choice in ask.choices:
        for by in harm.values():
            by.setdefault(bits_of(choice), 0.0)
    return Sensitivity("gradient", harm, time.monotonic() - begun, {"kl": total / tokens})
