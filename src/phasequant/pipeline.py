"""The walk: source → observe → isolate → plan → transform → weights → a quantized model in memory.

A prefix is found first, on the raw model: all that is measured or learned later sees it.

A plan is made before what is learned for it: a transform that does not see bits (QuaRot, FRTQ …) is applied first and
the plan made in its coordinates; one that does (FlatQuant, SpinQuant, learned clips) is drafted at all-low on a copy,
the plan made there, and the transform then learned for that plan. Weights come last. Everything else happens in place
on the source's model.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phasequant import finetune, fingerprint, streaming, text, transform, weight
from phasequant.arch import ModelMap
from phasequant.checkpoint import mark_quantized, save, versions
from phasequant.console import note, warn
from phasequant.errors import PhaseQuantError
from phasequant.nn import (
    KVLayout,
    KVQuantizer,
    LowRank,
    ModelLayout,
    PrefixLayout,
    QuantLinear,
    attach,
    set_activations,
)
from phasequant.numerics import QuantSpec
from phasequant.observe import Observations
from phasequant.plan import (
    NEEDS_NOISE,
    NEEDS_OBSERVATIONS,
    PrecisionPlan,
    Seen,
    make_plan,
)
from phasequant.planning import give_ranges, planned, seen_of, with_excluded, with_rows, with_searched_clips
from phasequant.preparing import (
    Transformed,
    calibration_tokens,
    check_fresh,
    cut,
    give_prefix,
    learn,
    observe_and_transform,
    observe_raw,
    storage_dtype,
)
from phasequant.ranks import agreed
from phasequant.recipe import Recipe
from phasequant.source import Source
from phasequant.surroundings import measured
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
    blocks: list[Path] | None = None
    """Of a streamed model: where its finished blocks are. The model then has its structure and no numbers."""

    def save_transform(self, path: str | Path) -> Path:
        """Keep the transform alone: `transform: {method: load, file: …}` finds it again, for another weight method."""
        return transform.save_transform(path, self.transform, self.map)

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint; see `checkpoint.native`."""
        blocks, weights = self.blocks, None
        if blocks is not None:

            def weights(folder: Path) -> None:
                streaming.write_shards(self.model, self.map, blocks, folder)

        return save(path, self.model, self.tokenizer, self.recipe, self.plan, self.origin, weights)

    @contextmanager
    def reading(self, plan: PrecisionPlan) -> Iterator[PreTrainedModel]:
        """The same weights with another plan's activations, for a while: to compare plans without quantizing again."""
        set_activations(self.model, self.map, plan.activations)
        try:
            yield self.model
        finally:
            set_activations(self.model, self.map, self.plan.activations)


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
    spec = plan.kv_at(block)
    assert spec is not None
    learned = chosen.block(block).kv
    if learned is not None and learned[0].bits == spec.bits:
        return learned
    return spec, spec


@torch.no_grad()
def finish(transformed: Transformed, plan: PrecisionPlan, work: Path | None = None) -> Quantized:
    """Put activations and KV on the plan's grids, round what stays dense to its stored type, quantize weights. `work`:
    a directory for finished blocks, from which a run that was stopped goes on."""
    source, recipe, chosen = transformed.source, transformed.recipe, transformed.transform
    model, model_map = source.model, source.map
    plan = with_learned_clips(plan, chosen)
    if not plan.clips:
        plan = with_searched_clips(plan, transformed, recipe)
    plan = with_rows(plan, transformed, recipe)
    stored = storage_dtype(recipe, source)
    streaming.round_model(model, stored, but_linears=plan.weights is not None)
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
    task = _polish_task(source, recipe, chosen)
    lessons = None if task is None else _lessons(task)
    kept = _kept(work, transformed, plan)
    if plan.weights is not None:
        weights = _quantize_weights(source, recipe, plan, chosen, kept)
    told: list[dict[str, Any]] = []
    if task is not None and lessons is not None:
        polished = _polish(task, lessons)
        told = [one.told for one in polished]
        for one in polished:
            plan = replace(plan, clips={**plan.clips, **one.clips})
            for block, (keys, values) in one.kv.items():
                layouts[block] = replace(layouts[block], keys=keys, values=values)
    ranks = {group.name: rank for group in model_map.groups if (rank := recipe.lowrank.rank_of(group.name))}
    lowrank = LowRank(ranks, recipe.lowrank.input == "rounded", str(stored).removeprefix("torch.")) if ranks else None
    kind = str(stored).removeprefix("torch.")
    found = source.prefix
    prefix = None if found is None else PrefixLayout(found.tokens, found.method, kind)
    online = _online_layout(model, model_map)
    layout = ModelLayout(plan.weights, layouts, plan.activations, online, lowrank, prefix, plan.weights_others)
    source.quantized = True
    mark_quantized(model, layout, str(stored).removeprefix("torch."))
    origin = {
        "source": source.origin,
        "model": model_map.describe(),
        "transform": chosen.describe(model_map, plan.kv is not None),
        "calibration": transformed.calibration,
        "a8_share": plan.a8_share,
        "rows": plan.rows and {"by": plan.rows.by, "share": plan.rows.share},
        "learning": transformed.cost,
        "weights": weights,
        "finetune": told,
        "prefix": source.prefix and source.prefix.to_dict(),
    }
    blocks = None
    if source.streamed is not None:
        assert kept is not None
        blocks = weight.keep_blocks(model, model_map, kept, source.compute)
    return Quantized(model, source.tokenizer, model_map, recipe, plan, chosen, transformed.observations, origin, blocks)


def _kept(work: Path | None, transformed: Transformed, plan: PrecisionPlan) -> weight.KeptCodes | None:
    """Where finished blocks go: all of a streamed model, of others those that took data and time."""
    source, recipe = transformed.source, transformed.recipe
    streamed = source.streamed is not None
    if streamed and work is None:
        raise PhaseQuantError("a streamed model is written block by block: give an output")
    if work is None or not (streamed or (plan.weights and weight.needs_tokens(recipe.weights, recipe.lowrank))):
        return None
    stored = storage_dtype(recipe, source)
    common = {
        "recipe": recipe.to_dict(),
        "plan": plan.to_dict(),
        "transform": transform.fingerprint_of(transformed.transform),
        "versions": versions(),
        "code": fingerprint.of_code(),
        "device": source.compute.type,
        "stored": str(stored),
        "source": source.streamed,
    }
    return weight.KeptCodes(work, json.dumps(common, sort_keys=True), stored, rounded=recipe.lowrank.input == "rounded")


def _quantize_weights(
    source: Source, recipe: Recipe, plan: PrecisionPlan, chosen: Transform, kept: weight.KeptCodes | None
) -> dict[str, Any]:
    """Codes for every linear; what the manifest says about them."""
    part, spec = recipe.weights, plan.weights
    assert spec is not None
    tokens = None
    if weight.needs_tokens(part, recipe.lowrank):
        tokens = cut(source, recipe, part.seqlen, part.sequences, "weights")
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
                others=plan.weights_others,
                kept=kept,
            )
        )
    if kept is not None and kept.taken:
        note(f"{kept.taken} of {source.map.shape.blocks} blocks were quantized in an earlier run: {kept.folder}")
    digest = None if tokens is None else text.digest(tokens)
    return {
        "method": part.method,
        "lowrank": recipe.lowrank.method,
        "branch_macs": branch_macs(recipe, source.map),
        "tokens_sha256": digest,
        **cost.to_dict(),
        "groups": told,
    }


def _polish_task(source: Source, recipe: Recipe, chosen: Transform) -> finetune.PolishTask | None:
    """What polishing is given; None where the recipe asks for none."""
    part = recipe.finetune
    if not part.on:
        return None
    return finetune.PolishTask(
        model=source.model,
        map=source.map,
        tokens=cut(source, recipe, part.seqlen, part.sequences, "finetune"),
        part=part,
        stored=storage_dtype(recipe, source),
        seed=recipe.seed,
        device=source.compute,
        qk={index: chosen.block(index).qk for index in source.map.blocks},
    )


_Lessons = tuple[finetune.Aims | None, list[torch.Tensor] | None]


def _lessons(task: finetune.PolishTask) -> _Lessons:
    """What the model gives in 16 bits, taken before its weights become codes."""
    return (
        finetune.aims(task) if task.part.epochs else None,
        finetune.teach(task) if task.part.steps else None,
    )


def _polish(task: finetune.PolishTask, lessons: _Lessons) -> list[finetune.Polished]:
    """Block reconstruction, then distillation: what of them the recipe asks for."""
    targets, teacher = lessons
    found = []
    if targets is not None:
        found.append(finetune.reconstruct(task, targets))
    if teacher is not None:
        found.append(finetune.distill(task, teacher))
    return found


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


def follows_plan(recipe: Recipe) -> bool:
    """Whether a quantized model of this recipe is made for one plan: what is polished is polished for its bits."""
    return sees_plan(recipe) or recipe.finetune.on


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
        drafted = planned(replace(draft, observations=observations))
        plan = replace(drafted, clips={}, rows=None)  # those are of the draft's transform
    made = observe_and_transform(source, recipe, raw=False, transformed=False, noise=False, plan=plan)
    return replace(made, observations=observations, calibration=calibration), plan


def run(source: Source, recipe: Recipe, plan: PrecisionPlan | None = None, work: Path | None = None) -> Quantized:
    """Everything, observing only what the policy needs. In place on the source's model. `work`: see `finish`."""
    if plan is not None:
        check_plan(plan, recipe, source)
        given = observe_and_transform(source, recipe, raw=False, transformed=False, noise=False, plan=plan)
        return finish(given, plan, work)
    transformed, made = plan_and_transform(source, recipe)
    made = agreed(made)
    note(f"plan: {made.policy}, {len(made.raised)} groups raised, A8 share {100 * made.a8_share:.1f} %")
    return finish(transformed, made, work)


__all__ = [
    "Quantized",
    "Transformed",
    "calibration_tokens",
    "check_plan",
    "finish",
    "follows_plan",
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
