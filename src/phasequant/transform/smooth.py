r"""SmoothQuant: scale migration from activations into weights (arXiv 2211.10438).

    s_j = max|X_j|^α / max|W_j|^{1-α}        x → x / s,  W → W·diag(s)         W over all linears that read X

    qkv, gate_up   1/s goes into the norm's gain and bias                SmoothQuant's own places
    down           1/s goes into up's rows (or, before a ReLU, into the rows of the linear before it)
    o              1/s goes into v's rows; query heads of one kv head share their s

Linears behind one norm share one s, whichever groups they are of; where no linear's rows scale a group's input (the
input of down behind a GELU, of o where q, k and v are one linear) it keeps its scale. All folded: nothing runs online.

It flattens channels, not tokens, and was made for 8 bits; at W4A4 it alone does not hold: 83.12 is LLaMA-2-7B's
perplexity in FlatQuant's table (arXiv 2410.09426), and ours shows the same. α is one per model: given, or the one of
0.3 … 0.9 with the least error of all groups' outputs, Σ ‖Q(X/s)·Q(W·s)ᵀ - XWᵀ‖²/‖XWᵀ‖², on a sample of tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phasequant.arch import ModelMap
from phasequant.console import note
from phasequant.numerics import LinearMap, QuantSpec, fake_quantize
from phasequant.stream import BlockStream, Step
from phasequant.transform.contract import BlockTransform, Task, Transform
from phasequant.transform.gather import Largest, Sample, gather, group_weight

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FALLBACK = 0.5  # where nothing is quantized, and nothing can be measured
TINY = 1e-5
SAMPLED = 512


def migration(x_max: Float[Tensor, " n"], w_max: Float[Tensor, " n"], alpha: float) -> Float[Tensor, " n"]:
    """s: what inputs are divided and weights multiplied by. Channels that are always zero keep 1."""
    s = x_max.clamp(min=TINY).pow(alpha) / w_max.clamp(min=TINY).pow(1 - alpha)
    return torch.where(x_max > 0, s.clamp(min=TINY), 1.0)


def shared_by_kv_heads(values: Float[Tensor, " n"], model_map: ModelMap) -> Float[Tensor, " k"]:
    """The largest over the query heads that read one kv head: (N·H) → (K·H)."""
    shape = model_map.shape
    return values.reshape(shape.kv_heads, -1, shape.d_head).amax(1).flatten()


def over_query_heads(values: Float[Tensor, " k"], model_map: ModelMap) -> Float[Tensor, " n"]:
    """(K·H) → (N·H)."""
    shape = model_map.shape
    times = shape.heads // shape.kv_heads
    return values.reshape(shape.kv_heads, 1, shape.d_head).expand(-1, times, -1).flatten()


def _scales(
    block: nn.Module, model_map: ModelMap, x_max: dict[str, Tensor], alpha: float
) -> dict[str, Float[Tensor, " n"]]:
    """Group → s over its input channels, of the groups that can be scaled."""
    found: dict[str, Tensor] = {}
    for group in model_map.groups:
        carrier = model_map.scale_of(group.name)
        peak, w_max = x_max[group.name], group_weight(block, model_map.sharing(group.name)).abs().amax(0)
        if group.name == "o" and model_map.family.value is not None:
            peak, w_max = (shared_by_kv_heads(values, model_map) for values in (peak, w_max))
            found["o"] = over_query_heads(migration(peak, w_max, alpha), model_map)
        elif carrier is not None:
            found[group.name] = migration(peak, w_max, alpha)
    return found


def scaled_error(
    x: Float[Tensor, "T n"],
    weight: Float[Tensor, "O n"],
    s: Float[Tensor, " n"],
    inputs: QuantSpec | None,
    weights: QuantSpec | None,
) -> float:
    """Squared error of a group's outputs, relative to them, with the input divided and the weight multiplied by s."""
    smooth_x, smooth_w = x / s, weight * s
    q_x = fake_quantize(smooth_x, inputs.dynamic) if inputs is not None else smooth_x
    q_w = fake_quantize(smooth_w, weights) if weights is not None else smooth_w
    exact = x @ weight.T
    return float((q_x @ q_w.T - exact).square().sum() / exact.square().sum().clamp(min=1e-20))


def observe_inputs(step: Step, model_map: ModelMap, sequences: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Group → the largest magnitude of every channel of its input, and a sample of tokens."""
    peaks = {group.name: Largest() for group in model_map.groups}
    samples = {group.name: Sample(SAMPLED, max(SAMPLED // sequences, 1)) for group in model_map.groups}

    def both(name: str):  # type: ignore[no-untyped-def]
        def collect(x: Tensor) -> None:
            peaks[name](x)
            samples[name](x)

        return collect

    with gather(step.block, model_map, inputs={g.name: both(g.name) for g in model_map.groups}):
        step.drain()
    return {n: p.value for n, p in peaks.items() if p.value is not None}, {n: s.rows for n, s in samples.items()}


def smooth(task: Task) -> Transform:
    """SmoothQuant's scales, with α given or searched."""
    assert task.tokens is not None
    given = task.part.alpha
    alphas = ALPHAS if given is None else (given,)
    weights = None if task.weights is None else QuantSpec(**{**task.weights.to_dict(), "clip": 1.0})
    errors = dict.fromkeys(alphas, 0.0)
    by_alpha: dict[float, list[BlockTransform]] = {alpha: [] for alpha in alphas}
    stream = BlockStream(task.model, task.map, task.tokens, task.device)
    for step in stream.steps("smooth"):
        x_max, samples = observe_inputs(step, task.map, len(task.tokens))
        for alpha in alphas:
            scales = _scales(step.block, task.map, x_max, alpha)
            if len(alphas) > 1:
                for group in (g for g in task.map.groups if g.name in scales):
                    weight = group_weight(step.block, group.linears)
                    grid = task.activations.get((step.index, group.name))
                    errors[alpha] += scaled_error(samples[group.name], weight, scales[group.name], grid, weights)
            by_alpha[alpha].append(folded_scales(scales, task.map))
    best = min(alphas, key=lambda alpha: errors[alpha])
    if given is None:
        if not any(errors.values()):
            best = FALLBACK
        note(f"smooth: alpha {best}, of " + ", ".join(f"{a} ({e:.3f})" for a, e in errors.items()))
    return Transform(f"smooth (alpha {best})", blocks=tuple(by_alpha[best]))


def folded_scales(scales: dict[str, Tensor], model_map: ModelMap) -> BlockTransform:
    """What folds s (group → divisors of its input channels) into norms, up's and v's rows."""
    inverse = {name: s.reciprocal().to("cpu", torch.float64) for name, s in scales.items()}
    value = LinearMap.scaling(shared_by_kv_heads(inverse["o"], model_map)) if "o" in inverse else None
    return BlockTransform(value=value, scales={name: inverse[name] for name in model_map.scaled})
