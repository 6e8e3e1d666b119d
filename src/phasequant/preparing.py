"""From a source to a transformed model: its prefix, its observations, its transform, in place; no code is made yet.

A prefix is found first, on the raw model: all that is measured or learned later sees it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from phasequant import isolate, observe, text, transform
from phasequant.arch import Place
from phasequant.console import note
from phasequant.demo_model import cache_folder
from phasequant.errors import PhaseQuantError
from phasequant.nn import (
    attach_prefix,
    prefix_states,
    quant_linears,
)
from phasequant.numerics import multiplies_bfloat16
from phasequant.observe import Observations
from phasequant.plan import (
    LOW,
    PrecisionPlan,
    make_plan,
)
from phasequant.ranks import agreed
from phasequant.recipe import Recipe
from phasequant.source import Source
from phasequant.surroundings import Cost, measured
from phasequant.transform import Transform

WORTH_SAYING = 2.0  # seconds


def calibration_tokens(source: Source, recipe: Recipe) -> tuple[Int[Tensor, "sequences T"], dict[str, Any]]:
    """The recipe's calibration sequences, which its seed chooses, and their origin for the manifest."""
    wanted = recipe.calibration
    corpus = text.find(wanted.text, "calibration")
    key = corpus.sha256, wanted.seqlen, wanted.sequences, recipe.seed
    if key not in source.cuts:
        found = text.cut(corpus, source.tokenizer, wanted.seqlen, wanted.sequences, recipe.seed)
        if len(found) < wanted.sequences:
            note(f"calibration text {corpus.source} holds {len(found)} sequences of {wanted.seqlen}: all are used")
        source.cuts[key] = found
    tokens = source.cuts[key]
    return tokens, {
        "text": corpus.source,
        "sha256": corpus.sha256,
        "tokens_sha256": text.digest(tokens),
        "sequences": len(tokens),
        "seqlen": wanted.seqlen,
        "seed": recipe.seed,
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
    clips: dict[Place, float] | None = None  # of the low grid, once they were searched


def check_fresh(source: Source) -> None:
    """A transform starts from a 16-bit model that carries none."""
    if source.quantized:
        raise PhaseQuantError(f"'{source.name}' is quantized already: start from its 16-bit original")
    if quant_linears(source.model):
        raise PhaseQuantError(f"'{source.name}' was transformed already (by an earlier analyze?): open the model anew")


def cut(source: Source, recipe: Recipe, seqlen: int, most: int, use: str) -> Int[Tensor, "sequences T"]:
    """The recipe's calibration text in other sequences, by its seed; said where there are fewer."""
    corpus = text.find(recipe.calibration.text, "calibration")
    longest = getattr(source.model.config, "max_position_embeddings", None)
    before = 0 if source.prefix is None else len(source.prefix.tokens)
    if isinstance(longest, int) and seqlen + before > longest:
        behind = f", {before} of them the prefix's" if before else ""
        note(f"{use}: sequences of {longest - before} tokens, not {seqlen}: the model has {longest} positions{behind}")
        seqlen = longest - before
    tokens = text.cut(corpus, source.tokenizer, seqlen, most, recipe.seed)
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
        tokens=cut(source, recipe, recipe.learning.seqlen, recipe.learning.sequences, "learning")
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
    if task.tokens is not None and multiplies_bfloat16(source.compute):
        note("learning: products in bfloat16, which this device has units for; what is measured is not")
    with measured(source.compute) as cost:
        chosen = (method.rough if rough and method.rough else method.learn)(task)
        if clips and not method.learns_clips and not all(block.inputs or block.weight_clips for block in chosen.blocks):
            chosen = transform.learn_clips(task, chosen)
        chosen = agreed(chosen)
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
    found = isolate.find_prefix(source.model, source.map, source.tokenizer, part, tokens, source.compute)
    source.prefix = agreed(found)
    shown = " ".join(repr(text) for text in source.prefix.texts)
    note(f"prefix ({part.method}): {len(source.prefix.tokens)} tokens, {shown}")
    renew_prefix(source, recipe)


def renew_prefix(source: Source, recipe: Recipe) -> None:
    """Keys and values of the prefix as the model, in its present basis, makes them."""
    if source.prefix is not None:
        stored, tokens = storage_dtype(recipe, source), source.prefix.tokens
        states = prefix_states(source.model, source.map, tokens, stored, source.compute)
        attach_prefix(source.model, source.map, states)


def storage_dtype(recipe: Recipe, source: Source) -> torch.dtype:
    """The type of what is not quantized."""
    if recipe.storage.dtype != "auto":
        return getattr(torch, recipe.storage.dtype)
    dtype = source.model.get_submodule(source.map.family.embeddings).weight.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
