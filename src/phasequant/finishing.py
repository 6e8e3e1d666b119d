"""The last leg of the walk: a transformed model and its plan become a quantized model.

    clips and rows of the plan → dense tensors in their stored type → grids of activations and KV → codes → polish

What the polish aims at is taken before the weights become codes. All in place on the source's model.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from phasequant import finetune, fingerprint, streaming, text, transform, weight
from phasequant.arch import ModelMap
from phasequant.checkpoint import mark_quantized, versions
from phasequant.console import note
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
from phasequant.plan import PrecisionPlan
from phasequant.planning import give_ranges, with_rows, with_searched_clips
from phasequant.preparing import Transformed, cut, storage_dtype
from phasequant.quantized import Quantized
from phasequant.recipe import Recipe
from phasequant.source import Source
from phasequant.surroundings import measured
from phasequant.transform import Transform


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
