"""The walk: source → observe → plan → transform → weights → a quantized model in memory.

A plan is made before weights are quantized, on the transformed model that the activations will live in; weights come
last. Everything happens in place on the source's model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phasequant import observe, text, transform, weight
from phasequant.arch import ModelMap
from phasequant.checkpoint import mark_quantized, save
from phasequant.console import note, progress, warn
from phasequant.errors import PhaseQuantError
from phasequant.nn import KVQuantizer, ModelLayout, QuantLinear, attach, quant_linears, set_activations
from phasequant.numerics import QuantSpec
from phasequant.observe import Observations
from phasequant.plan import LOW, NEEDS_NOISE, NEEDS_OBSERVATIONS, PrecisionPlan, Seen, make_plan
from phasequant.recipe import Recipe
from phasequant.source import Source
from phasequant.stream import resident
from phasequant.transform import Transform


@dataclass
class Quantized:
    """A quantized model in memory, with all that made it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    map: ModelMap
    recipe: Recipe
    plan: PrecisionPlan
    transform: Transform
    observations: list[Observations] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint; see `checkpoint.native`."""
        return save(path, self.model, self.tokenizer, self.recipe, self.plan, self.origin)

    @contextmanager
    def reading(self, plan: PrecisionPlan) -> Iterator[PreTrainedModel]:
        """The same weights with another plan's activations, for a while: to compare plans without quantizing again."""
        set_activations(self.model, self.map, plan.activations)
        try:
            yield self.model
        finally:
            set_activations(self.model, self.map, self.plan.activations)


def calibration_tokens(source: Source, recipe: Recipe) -> tuple[Int[Tensor, "sequences T"], dict[str, Any]]:
    """The recipe's calibration sequences, and their origin for the manifest."""
    wanted = recipe.calibration
    corpus = text.find(wanted.text, "calibration")
    tokens = text.cut(corpus, source.tokenizer, wanted.seqlen, wanted.sequences)
    if len(tokens) < wanted.sequences:
        note(f"calibration text {corpus.source} holds {len(tokens)} sequences of {wanted.seqlen}: all are used")
    return tokens, {
        "text": corpus.source,
        "sha256": corpus.sha256,
        "tokens_sha256": text.digest(tokens),
        "sequences": len(tokens),
        "seqlen": wanted.seqlen,
    }


@dataclass
class Transformed:
    """A source whose model carries a transform but no codes yet."""

    source: Source
    recipe: Recipe
    transform: Transform
    observations: list[Observations]
    calibration: dict[str, Any] | None


def observe_and_transform(source: Source, recipe: Recipe, *, raw: bool, transformed: bool, noise: bool) -> Transformed:
    """Sweep the raw model, transform it in place, sweep again; each sweep only if asked for."""
    if source.quantized:
        raise PhaseQuantError(f"'{source.name}' is quantized already: start from its 16-bit original")
    if quant_linears(source.model):
        raise PhaseQuantError(f"'{source.name}' was transformed already (by an earlier analyze?): open the model anew")
    observations: list[Observations] = []
    calibration = None
    tokens = None
    if raw or transformed or noise:
        tokens, calibration = calibration_tokens(source, recipe)
    if raw:
        assert tokens is not None
        observations.append(
            observe.sweep(source.model, source.map, tokens, tokenizer=source.tokenizer, device=source.compute)
        )
    chosen = transform.METHODS[recipe.transform.method](source.map, recipe.seed)
    transform.apply(source.model, source.map, chosen, source.compute)
    for step in chosen.describe(source.map):
        if step["rung"] in ("block-hadamard", "random-orthogonal"):
            note(f"{step['name']} ({step['place']}): no Hadamard matrix of this width; taken: {step['matrix']}")
    if transformed or noise:
        assert tokens is not None
        low = recipe.activations.spec()
        observations.append(
            observe.sweep(
                source.model,
                source.map,
                tokens,
                coordinates=f"after {chosen.method}",
                tokenizer=source.tokenizer,
                noise={LOW: low} if noise and low is not None else None,
                device=source.compute,
            )
        )
    return Transformed(source, recipe, chosen, observations, calibration)


def storage_dtype(recipe: Recipe, source: Source) -> torch.dtype:
    """The type of what is not quantized."""
    if recipe.storage.dtype != "auto":
        return getattr(torch, recipe.storage.dtype)
    dtype = source.model.get_submodule(source.map.family.embeddings).weight.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


@torch.no_grad()
def finish(transformed: Transformed, plan: PrecisionPlan) -> Quantized:
    """Quantize weights, put activations and KV on the plan's grids, round the rest to its stored type."""
    source, recipe = transformed.source, transformed.recipe
    model, model_map = source.model, source.map
    compute = model.get_submodule(model_map.family.embeddings).weight.dtype
    if plan.weights is not None:
        _quantize_weights(source, recipe.weights.method, plan.weights)
    stored = storage_dtype(recipe, source)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).to(compute)
    set_activations(model, model_map, plan.activations)
    qk = transformed.transform.qk
    if plan.kv is not None:
        spec, d_head = plan.kv, model_map.shape.d_head
        attach(model, model_map, lambda: KVQuantizer.of(spec, d_head, qk).to(source.device))
    layout = ModelLayout(
        plan.weights,
        plan.kv,
        plan.activations,
        _online_layout(model, model_map),
        (qk.left.shape[0], qk.right.shape[0]) if qk is not None and plan.kv is not None else None,
    )
    source.quantized = True
    mark_quantized(model, layout, str(stored).removeprefix("torch."))
    origin = {
        "source": source.origin,
        "model": model_map.describe(),
        "transform": transformed.transform.describe(model_map, plan.kv is not None),
        "calibration": transformed.calibration,
        "a8_share": plan.a8_share,
    }
    return Quantized(
        model, source.tokenizer, model_map, recipe, plan, transformed.transform, transformed.observations, origin
    )


def _quantize_weights(source: Source, method: str, spec: QuantSpec) -> None:
    """Codes for every linear, one block on the device at a time."""
    blocks = source.map.blocks
    with progress(f"weights ({method}, {spec})", len(blocks)) as tick:
        for index in blocks:
            block = source.model.get_submodule(source.map.block_name(index))
            with resident(block, source.compute):
                for _, module in quant_linears(block):
                    module.set_codes(*weight.METHODS[method](module.dense_weight(), spec), spec)
            tick()


def _online_layout(model: PreTrainedModel, model_map: ModelMap) -> dict[str, dict[str, Any]]:
    prefix = model_map.block_name(0)
    found = {}
    for group in model_map.groups:
        module = model.get_submodule(f"{prefix}.{group.linears[0]}")
        assert isinstance(module, QuantLinear)
        if module.online is not None:
            found[group.name] = module.online.layout()
    return found


def check_plan(plan: PrecisionPlan, recipe: Recipe, source: Source) -> None:
    """A plan that is given decides the bits; say where that differs from the recipe."""
    pairs = (
        ("weights", plan.weights, recipe.weights.spec()),
        ("kv", plan.kv, recipe.kv.spec(source.map.shape.d_head)),
        ("activations", plan.low, recipe.activations.spec()),
    )
    for part, given, wanted in pairs:
        if given != wanted:
            warn(f"the plan gives {part} {given or '16 bits'}, the recipe {wanted or '16 bits'}: the plan is followed")


def run(source: Source, recipe: Recipe, plan: PrecisionPlan | None = None) -> Quantized:
    """Everything, observing only what the policy needs. In place on the source's model."""
    if plan is not None:
        check_plan(plan, recipe, source)
        transformed = observe_and_transform(source, recipe, raw=False, transformed=False, noise=False)
        return finish(transformed, plan)
    name, raw_only = recipe.policy.name, recipe.policy.coordinates == "raw"
    transformed = observe_and_transform(
        source,
        recipe,
        raw=name == "threshold" and raw_only,
        transformed=name in NEEDS_OBSERVATIONS and not (name == "threshold" and raw_only),
        noise=name in NEEDS_NOISE,
    )
    seen = Seen(*transformed.observations) if transformed.observations else None
    made = make_plan(recipe, source.map, seen)
    note(f"plan: {made.policy}, {len(made.raised)} groups raised, A8 share {100 * made.a8_share:.1f} %")
    return finish(transformed, made)


__all__ = [
    "Quantized",
    "Transformed",
    "calibration_tokens",
    "check_plan",
    "finish",
    "observe_and_transform",
    "run",
]
