"""The walk: source → observe → isolate → plan → transform → weights → a quantized model in memory.

A prefix is found first, on the raw model: all that is measured or learned later sees it.

A plan is made before what is learned for it: a transform that does not see bits (QuaRot, FRTQ …) is applied first and
the plan made in its coordinates; one that does (FlatQuant, SpinQuant, learned clips) is drafted at all-low on a copy,
the plan made there, and the transform then learned for that plan. Weights come last. Everything else happens in place
on the source's model.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phasequant import isolate, observe, text, transform, weight
from phasequant.arch import ModelMap
from phasequant.checkpoint import mark_quantized, save
from phasequant.console import note, warn
from phasequant.demo_model import cache_folder
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import streamed_perplexity
from phasequant.nn import (
    KVLayout,
    KVQuantizer,
    LowRank,
    ModelLayout,
    PrefixLayout,
    QuantLinear,
    attach,
    attach_prefix,
    prefix_states,
    quant_linears,
    set_activations,
)
from phasequant.numerics import QuantSpec
from phasequant.observe import Observations
from phasequant.plan import (
    LOW,
    NEEDS_NOISE,
    NEEDS_OBSERVATIONS,
    PrecisionPlan,
    Raised,
    Seen,
    better,
    choices,
    make_plan,
    price,
    sensitivity,
)
from phasequant.recipe import Recipe
from phasequant.sensitivity import MEASURES, RUNS_MODEL, Ask, PlanDivergence, Runs, bits_of
from phasequant.source import Source
from phasequant.surroundings import Cost, measured
from phasequant.transform import Transform

WORTH_SAYING = 2.0  # seconds


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

    def save_transform(self, path: str | Path) -> Path:
        """Keep the transform alone: `transform: {method: load, file: …}` finds it again, for another weight method."""
        return transform.save_transform(path, self.transform, self.map)

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
    cost: dict[str, Any] = field(default_factory=dict)


def check_fresh(source: Source) -> None:
    """A transform starts from a 16-bit model that carries none."""
    if source.quantized:
        raise PhaseQuantError(f"'{source.name}' is quantized already: start from its 16-bit original")
    if quant_linears(source.model):
        raise PhaseQuantError(f"'{source.name}' was transformed already (by an earlier analyze?): open the model anew")


def _cut(source: Source, recipe: Recipe, seqlen: int, most: int, use: str) -> Int[Tensor, "sequences T"]:
    """The recipe's calibration text in other sequences; said where there are fewer."""
    corpus = text.find(recipe.calibration.text, "calibration")
    tokens = text.cut(corpus, source.tokenizer, seqlen, most)
    if len(tokens) < most:
        note(f"{use}: calibration text {corpus.source} holds {len(tokens)} sequences of {seqlen}: all are used")
    return tokens


def learn(
    source: Source, recipe: Recipe, plan: PrecisionPlan, *, rough: bool = False
) -> tuple[Transform, dict[str, Any]]:
    """The recipe's transform for a plan, and what it cost. `rough`: what may stand in for it while plans are made."""
    method = transform.METHODS[recipe.transform.method]
    stand_in = rough and (method.rough is not None or not method.learns_clips)
    clips = frozenset() if stand_in else recipe.learned_clips
    task = transform.Task(
        model=source.model,
        map=source.map,
        tokens=_cut(source, recipe, recipe.learning.seqlen, recipe.learning.sequences, "learning")
        if method.needs_tokens or clips
        else None,
        activations=plan.activations,
        weights=plan.weights,
        kv=plan.kv,
        part=recipe.transform,
        rotation=recipe.rotation,
        learning=recipe.learning,
        seed=recipe.seed,
        device=source.compute,
        stored=storage_dtype(recipe, source),
        learned_clips=clips,
        kept=cache_folder() / "learned",
    )
    with measured(source.compute) as cost:
        chosen = (method.rough if rough and method.rough else method.learn)(task)
        if clips and not method.learns_clips and not all(block.inputs or block.weight_clips for block in chosen.blocks):
            chosen = transform.learn_clips(task, chosen)
    return chosen, _costs(chosen, cost, source.map.shape.blocks)


def _costs(chosen: Transform, cost: Cost, blocks: int) -> dict[str, Any]:
    """What a transform took, in all and by block (where blocks are learned one by one, of each)."""
    if cost.seconds > WORTH_SAYING:
        note(
            f"learned ({chosen.method}): {cost.seconds:.0f} s, {cost.seconds / blocks:.1f} s a block, "
            f"peak memory {cost.peak_bytes / 2**30:.2f} GiB"
        )
    return {
        **cost.to_dict(),
        "seconds_per_block": cost.seconds / blocks,
        "blocks": [dict(block.notes) for block in chosen.blocks if block.notes],
    }


def observe_and_transform(
    source: Source,
    recipe: Recipe,
    *,
    raw: bool,
    transformed: bool,
    noise: bool,
    plan: PrecisionPlan | None = None,
    rough: bool = False,
) -> Transformed:
    """Sweep the raw model, transform it in place for `plan` (default: all low), sweep again; each sweep only if asked
    for."""
    check_fresh(source)
    observations: list[Observations] = []
    calibration = None
    tokens = None
    if raw or transformed or noise:
        tokens, calibration = calibration_tokens(source, recipe)
    if raw:
        assert tokens is not None
        observations = observe_raw(source, recipe, tokens)
    give_prefix(source, recipe)
    given = plan or make_plan(recipe.with_("policy.name=uniform"), source.map, None)
    chosen, cost = learn(source, recipe, given, rough=rough)
    transform.apply(source.model, source.map, chosen, source.compute, storage_dtype(recipe, source))
    renew_prefix(source, recipe)
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
    return Transformed(source, recipe, chosen, observations, calibration, cost)


def observe_raw(source: Source, recipe: Recipe, tokens: Int[Tensor, "sequences T"]) -> list[Observations]:
    """The model as it came, and (of a recipe with a prefix, which the model is given) behind its prefix."""
    titles = (
        ["raw"] if recipe.prefix.method == "none" or source.prefix is not None else ["raw", "raw, behind the prefix"]
    )
    found = []
    for title in titles:
        if title != "raw":
            give_prefix(source, recipe)
        found.append(
            observe.sweep(
                source.model,
                source.map,
                tokens,
                coordinates=title,
                tokenizer=source.tokenizer,
                device=source.compute,
            )
        )
    return found


def give_prefix(source: Source, recipe: Recipe) -> None:
    """Find the recipe's prefix on the raw model, once, and put it before everything that the model reads from now."""
    part = recipe.prefix
    if part.method == "none" or source.prefix is not None:
        return
    tokens = calibration_tokens(source, recipe)[0] if part.method in ("qfep", "prefixquant") else None
    source.prefix = isolate.find_prefix(source.model, source.map, source.tokenizer, part, tokens, source.compute)
    shown = " ".join(repr(text) for text in source.prefix.texts)
    note(f"prefix ({part.method}): {len(source.prefix.tokens)} tokens, {shown}")
    renew_prefix(source, recipe)


def renew_prefix(source: Source, recipe: Recipe) -> None:
    """Keys and values of the prefix as the model, in its present basis, makes them."""
    if source.prefix is not None:
        states = prefix_states(source.model, source.map, source.prefix.tokens, storage_dtype(recipe, source))
        attach_prefix(source.model, source.map, states)


def seen_of(transformed: "Transformed", recipe: Recipe | None = None) -> Seen | None:
    """What policies look at: the observations, and the sensitivity where the recipe's runs the model."""
    if not transformed.observations:
        return None
    recipe = recipe or transformed.recipe
    ask = _ask(transformed, recipe)
    if ask is None or recipe.policy.score not in RUNS_MODEL:
        return Seen(*transformed.observations)
    found = MEASURES[recipe.policy.score](ask)
    note(f"sensitivity ({found.name}): {found.seconds:.0f} s on {ask.run.tokens.numel()} tokens")
    return Seen(*transformed.observations, sensitivity=found)


def _ask(transformed: "Transformed", recipe: Recipe) -> Ask | None:
    """What a sensitivity is asked of a transformed model; None for policies that ask none."""
    source, policy, low = transformed.source, recipe.policy, recipe.activations.spec()
    if policy.name != "budget" or low is None:
        return None
    tokens, _ = calibration_tokens(source, recipe)
    length = min(tokens.shape[1], policy.tokens)
    runs = Runs(source.model, tokens[: max(1, policy.tokens // length), :length], source.compute)
    seen = Seen(*transformed.observations).at("transformed")
    return Ask(source.map, seen, low, choices(recipe, low), policy.first_token, runs)


def planned(transformed: "Transformed", recipe: Recipe | None = None, seen: Seen | None = None) -> PrecisionPlan:
    """The recipe's plan for a transformed model: by its policy, bettered by swaps, without what QFeM leaves out.
    `seen`: what was measured already."""
    recipe = recipe or transformed.recipe
    seen = seen or seen_of(transformed, recipe)
    plan = make_plan(recipe, transformed.source.map, seen)
    if recipe.policy.name == "budget" and recipe.policy.swaps and seen is not None:
        plan = _swapped(plan, transformed, recipe, seen)
    return with_excluded(plan, transformed)


def _swapped(plan: PrecisionPlan, transformed: "Transformed", recipe: Recipe, seen: Seen) -> PrecisionPlan:
    """The plan, its groups exchanged where the measured KL says so."""
    ask, policy, low = _ask(transformed, recipe), recipe.policy, plan.low
    assert ask is not None and low is not None
    model_map = plan.model
    high = choices(recipe, low)[-1]
    found = sensitivity(recipe, model_map, seen, low)
    top = bits_of(high)
    measure = PlanDivergence(ask)
    grids = {low.bits: low, top: high}

    def measured(bits: Mapping[tuple[int, str], int]) -> float:
        return measure({place: grids[b] if b in grids else plan.spec(*place) for place, b in bits.items()})

    made = better(
        {place: bits_of(plan.spec(*place)) for place in ask.places},
        low.bits,
        top,
        {place: found.gain(place, low.bits, top) for place in ask.places},
        {place: price(policy, model_map, place, low.bits, top) for place in ask.places},
        policy.a8_share * model_map.macs_total,
        measured,
        policy.swaps,
    )
    note(f"swaps: {len(made.exchanged)} of {made.tries} kept, KL {made.before:.4f} → {made.after:.4f} nats a token")
    raised = {place: entry for place, entry in plan.raised.items() if made.bits[place] != low.bits}
    for place, bits in made.bits.items():
        if bits == top and place not in raised:
            raised[place] = Raised(high, "a swap: the model's measured KL fell")
    return replace(plan, raised=raised)


def with_excluded(plan: PrecisionPlan, transformed: "Transformed") -> PrecisionPlan:
    """The plan without the groups that QFeM leaves out of the low grid."""
    part = transformed.recipe.exclude
    if part.method == "none":
        return plan
    ratios = {(g.block, g.group): g.spike_ratio for g in Seen(*transformed.observations).at("transformed").groups}
    if part.alpha is not None:
        found = isolate.exclude(ratios, part.alpha)
    else:
        found = _search_alpha(plan, transformed, ratios)
    spec = QuantSpec(8) if part.bits == 8 else None
    raised = {place: Raised(spec, why) for place, why in found.places.items()}
    how = "searched" if found.searched else "given"
    note(f"qfem: {len(raised)} of {len(ratios)} groups read {part.bits} bits (alpha {found.alpha:.4g}, {how})")
    return replace(plan, raised={**plan.raised, **raised}, alpha=found.alpha)


def _search_alpha(
    plan: PrecisionPlan, transformed: "Transformed", ratios: dict[tuple[int, str], float]
) -> isolate.Excluded:
    """QFeM's search on the transformed model: activations on the plan's grids, weights and KV in 16 bits."""
    source, recipe = transformed.source, transformed.recipe
    model, model_map = source.model, source.map
    tokens, _ = calibration_tokens(source, recipe)
    left = QuantSpec(8) if recipe.exclude.bits == 8 else None
    limit = streamed_perplexity(model, model_map, tokens, source.compute, "16-bit activations")
    limit *= 1 + recipe.exclude.budget
    give_ranges(source, recipe, plan)

    def perplexity(places: frozenset[tuple[int, str]]) -> float:
        chosen = {place: left if place in places else spec for place, spec in plan.activations.items()}
        set_activations(model, model_map, chosen)
        return streamed_perplexity(model, model_map, tokens, source.compute, f"{len(places)} groups left out")

    try:
        return isolate.search_alpha(ratios, perplexity, limit, recipe.exclude.most)
    finally:
        set_activations(model, model_map, dict.fromkeys(plan.activations))


def give_ranges(source: Source, recipe: Recipe, plan: PrecisionPlan) -> None:
    """Calibrate the static grids of a plan: of every group, also of those that another plan may read low."""
    low = plan.low
    if low is None or not low.static:
        return
    tokens, _ = calibration_tokens(source, recipe)
    part = recipe.activations
    grids: dict[tuple[int, str], QuantSpec | None] = {
        place: spec if spec is not None and spec.static else low for place, spec in plan.activations.items()
    }
    observe.calibrate_ranges(
        source.model, source.map, tokens, grids, method=part.calibrate, percent=part.percentile, device=source.compute
    )  # fmt: skip


def storage_dtype(recipe: Recipe, source: Source) -> torch.dtype:
    """The type of what is not quantized."""
    if recipe.storage.dtype != "auto":
        return getattr(torch, recipe.storage.dtype)
    dtype = source.model.get_submodule(source.map.family.embeddings).weight.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def with_learned_clips(plan: PrecisionPlan, chosen: Transform) -> PrecisionPlan:
    """The plan with the clips that were learned for the very bits that it gives."""
    clips = dict(plan.clips)
    for block in plan.model.blocks:
        for group, learned in chosen.block(block).inputs.items():
            spec = plan.spec(block, group)
            if spec is not None and spec.bits == learned.bits and (block, group) not in clips:
                clips[block, group] = float(learned.clip)
    return replace(plan, clips=clips)


def _kv_grids(plan: PrecisionPlan, chosen: Transform, block: int) -> tuple[QuantSpec, QuantSpec]:
    """Grids of keys and values of one block: learned for this plan's bits, or the plan's own."""
    assert plan.kv is not None
    learned = chosen.block(block).kv
    if learned is not None and learned[0].bits == plan.kv.bits:
        return learned
    return plan.kv, plan.kv


@torch.no_grad()
def finish(transformed: Transformed, plan: PrecisionPlan) -> Quantized:
    """Put activations and KV on the plan's grids, round what stays dense to its stored type, quantize weights."""
    source, recipe, chosen = transformed.source, transformed.recipe, transformed.transform
    model, model_map = source.model, source.map
    plan = with_learned_clips(plan, chosen)
    stored = storage_dtype(recipe, source)
    _round_dense(model, stored, but_linears=plan.weights is not None)
    give_ranges(source, recipe, plan)
    set_activations(model, model_map, plan.activations)
    layouts: dict[int, KVLayout] = {}
    if plan.kv is not None:

        def make(block: int) -> KVQuantizer:
            keys, values = _kv_grids(plan, chosen, block)
            made = KVQuantizer.of(keys, values, model_map.shape.d_head, chosen.block(block).qk)
            layouts[block] = made.layout
            return made.to(source.device)

        attach(model, model_map, make)
    weights: dict[str, Any] | None = None
    if plan.weights is not None:
        weights = _quantize_weights(source, recipe, plan.weights, chosen)
    ranks = {group.name: rank for group in model_map.groups if (rank := recipe.lowrank.rank_of(group.name))}
    lowrank = LowRank(ranks, recipe.lowrank.input == "rounded", str(stored).removeprefix("torch.")) if ranks else None
    kind = str(stored).removeprefix("torch.")
    found = source.prefix
    prefix = None if found is None else PrefixLayout(found.tokens, found.method, kind)
    layout = ModelLayout(plan.weights, layouts, plan.activations, _online_layout(model, model_map), lowrank, prefix)
    source.quantized = True
    mark_quantized(model, layout, str(stored).removeprefix("torch."))
    origin = {
        "source": source.origin,
        "model": model_map.describe(),
        "transform": chosen.describe(model_map, plan.kv is not None),
        "calibration": transformed.calibration,
        "a8_share": plan.a8_share,
        "learning": transformed.cost,
        "weights": weights,
        "prefix": source.prefix and source.prefix.to_dict(),
    }
    return Quantized(model, source.tokenizer, model_map, recipe, plan, chosen, transformed.observations, origin)


def _round_dense(model: PreTrainedModel, stored: torch.dtype, *, but_linears: bool) -> None:
    """What stays dense takes its stored type's values; weights that will be codes are left exact until then."""
    left = {id(m.weight_dense) for _, m in quant_linears(model)} if but_linears else set()
    for parameter in model.parameters():
        if id(parameter) not in left:
            parameter.data = parameter.data.to(stored).to(parameter.dtype)


def _quantize_weights(source: Source, recipe: Recipe, spec: QuantSpec, chosen: Transform) -> dict[str, Any]:
    """Codes for every linear; what the manifest says about them."""
    part = recipe.weights
    tokens = None
    if weight.needs_tokens(part, recipe.lowrank):
        tokens = _cut(source, recipe, part.seqlen, part.sequences, "weights")
    with measured(source.compute) as cost:
        told = weight.quantize_weights(
            weight.WeightTask(
                model=source.model,
                map=source.map,
                spec=spec,
                part=part,
                lowrank=recipe.lowrank,
                stored=storage_dtype(recipe, source),
                clips=lambda index: chosen.block(index).weight_clips,
                tokens=tokens,
                device=source.compute,
            )
        )
    digest = None if tokens is None else text.digest(tokens)
    return {
        "method": part.method,
        "lowrank": recipe.lowrank.method,
        "branch_macs": branch_macs(recipe, source.map),
        "tokens_sha256": digest,
        **cost.to_dict(),
        "groups": told,
    }


def branch_macs(recipe: Recipe, model_map: ModelMap) -> int:
    """Multiply-adds a token of all low-rank branches, where the linears of a group share x·Aᵀ."""
    macs = 0
    for group in model_map.groups:
        rank = recipe.lowrank.rank_of(group.name)
        widths = model_map.width_in(group.name) + model_map.width_out(group.name)
        macs += rank * widths * model_map.rows(group.name)
    return macs * model_map.shape.blocks


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


def sees_plan(recipe: Recipe) -> bool:
    """Whether the recipe's transform, its clips or its weights' codes are found for the bits that a plan gives."""
    codes = recipe.weights.bits < 16 and recipe.weights.method == "gptq" and recipe.weights.hessian != "full"
    return transform.METHODS[recipe.transform.method].sees_plan or bool(recipe.learned_clips) or codes


def plan_and_transform(source: Source, recipe: Recipe) -> tuple[Transformed, PrecisionPlan]:
    """The recipe's plan, observing only what its policy needs, and its transform, learned for that plan."""
    name, raw_only = recipe.policy.name, recipe.policy.coordinates == "raw"
    raw = name == "threshold" and raw_only
    after = (name in NEEDS_OBSERVATIONS and not raw) or recipe.exclude.method != "none"
    noise = name in NEEDS_NOISE and recipe.policy.score == "noise"
    if not sees_plan(recipe):
        made = observe_and_transform(source, recipe, raw=raw, transformed=after, noise=noise)
        return made, planned(made)
    # A plan comes before what is learned for it: it is made on a copy, which carries the transform learned at all-low.
    observations: list[Observations] = []
    calibration = None
    if raw:
        check_fresh(source)
        tokens, calibration = calibration_tokens(source, recipe)
        observations = observe_raw(source, recipe, tokens)
    give_prefix(source, recipe)
    draft = None
    if after:
        copied = replace(source, model=copy.deepcopy(source.model))
        draft = observe_and_transform(copied, recipe, raw=False, transformed=True, noise=noise, rough=True)
        observations, calibration = [*observations, *draft.observations], draft.calibration
    if draft is None:
        plan = make_plan(recipe, source.map, Seen(*observations) if observations else None)
    else:
        plan = planned(replace(draft, observations=observations))
    made = observe_and_transform(source, recipe, raw=False, transformed=False, noise=False, plan=plan)
    return replace(made, observations=observations, calibration=calibration), plan


def run(source: Source, recipe: Recipe, plan: PrecisionPlan | None = None) -> Quantized:
    """Everything, observing only what the policy needs. In place on the source's model."""
    if plan is not None:
        check_plan(plan, recipe, source)
        given = observe_and_transform(source, recipe, raw=False, transformed=False, noise=False, plan=plan)
        return finish(given, plan)
    transformed, made = plan_and_transform(source, recipe)
    note(f"plan: {made.policy}, {len(made.raised)} groups raised, A8 share {100 * made.a8_share:.1f} %")
    return finish(transformed, made)


__all__ = [
    "Quantized",
    "Transformed",
    "calibration_tokens",
    "check_plan",
    "finish",
    "give_prefix",
    "learn",
    "observe_and_transform",
    "plan_and_transform",
    "planned",
    "run",
    "seen_of",
    "sees_plan",
    "with_excluded",
]
