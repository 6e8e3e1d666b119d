"""From a transformed model to its plan: sensitivities, policies, swaps, exclusions; and the ranges of static grids."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

from phasequant import isolate, observe
from phasequant.arch import Place
from phasequant.bench import time_linears
from phasequant.console import note
from phasequant.evaluate import streamed_perplexity
from phasequant.nn import (
    set_activations,
)
from phasequant.numerics import QuantSpec
from phasequant.plan import (
    PrecisionPlan,
    Raised,
    Rows,
    Seen,
    Terms,
    allowed,
    better,
    choices,
    make_plan,
    prices,
    sensitivity,
)
from phasequant.preparing import Transformed, calibration_tokens
from phasequant.ranks import agreed
from phasequant.recipe import Recipe
from phasequant.sensitivity import (
    MEASURES,
    RUNS_MODEL,
    Ask,
    PlanDivergence,
    Runs,
    bits_of,
    measured_gains,
)
from phasequant.source import Source

CLIP_TOKENS = 2048


def seen_of(transformed: Transformed, recipe: Recipe | None = None) -> Seen | None:
    """What policies look at: the observations, and the sensitivity where the recipe's runs the model."""
    if not transformed.observations:
        return None
    recipe = recipe or transformed.recipe
    timings = _timings(transformed, recipe)
    ask = _ask(transformed, recipe) if recipe.policy.score in RUNS_MODEL else None
    if ask is None:
        return Seen(*transformed.observations, timings=timings)
    found = MEASURES[recipe.policy.score](ask)
    note(f"sensitivity ({found.name}): {found.seconds:.0f} s on {ask.run.tokens.numel()} tokens")
    return Seen(*transformed.observations, sensitivity=found, timings=timings)


def _timings(transformed: Transformed, recipe: Recipe) -> Mapping[str, Mapping[int, float]] | None:
    """Group → bits → microseconds on this device, where the recipe prices by time."""
    policy, low = recipe.policy, recipe.activations.spec()
    if policy.name != "budget" or policy.price != "microseconds" or low is None:
        return None
    grids = (low.dynamic, *(spec and spec.dynamic for spec in choices(recipe, low)))
    source = transformed.source
    found: dict[str, dict[int, float]] = {}
    for one in agreed(time_linears(source.map, recipe.weights.spec(), grids, source.compute)):
        found.setdefault(one.group, {})[one.bits] = one.microseconds
        note(f"price: {one.group} at {one.bits} bits takes {one.microseconds:.0f} µs ({one.kernel}, {one.tokens} rows)")
    return found


def _ask(transformed: Transformed, recipe: Recipe) -> Ask | None:
    """What a sensitivity is asked of a transformed model; None for policies that ask none."""
    source, policy, low = transformed.source, recipe.policy, recipe.activations.spec()
    if policy.name != "budget" or low is None:
        return None
    tokens, _ = calibration_tokens(source, recipe)
    length = min(tokens.shape[1], policy.tokens)
    runs = Runs(source.model, tokens[: max(1, policy.tokens // length), :length], source.compute)
    seen = Seen(*transformed.observations).at("transformed")
    return Ask(
        source.map,
        seen,
        low,
        choices(recipe, low),
        policy.first_token,
        runs,
        clips_of(transformed, recipe),
        weights=allowed(recipe, "weights", recipe.weights.spec()),
        kv=allowed(recipe, "kv", recipe.kv.spec(source.map.shape.d_head)),
        qk={block: transformed.transform.block(block).qk for block in source.map.blocks},
    )


def clips_of(transformed: Transformed, recipe: Recipe) -> Mapping[Place, float]:
    """The clips of the low grid of every group: as they were learned, or searched, once (also while what will be
    learned is still a draft); none where the recipe gives one for all."""
    low = recipe.activations.spec()
    if recipe.activations.clip not in ("searched", "learned") or low is None:
        return {}
    if transformed.clips is None and recipe.activations.clip == "learned":
        blocks = [(index, transformed.transform.block(index).inputs) for index in transformed.source.map.blocks]
        learned = {
            (index, group): float(spec.clip)
            for index, inputs in blocks
            for group, spec in inputs.items()
            if spec.bits == low.bits
        }
        transformed.clips = learned or None
    if transformed.clips is None:
        source = transformed.source
        tokens, _ = calibration_tokens(source, recipe)
        length = min(tokens.shape[1], CLIP_TOKENS)
        rows = tokens[: max(1, CLIP_TOKENS // length), :length]
        grids = {(block, group.name): low for block in source.map.blocks for group in source.map.groups}
        transformed.clips = observe.search_clips(source.model, source.map, rows, grids, source.compute)
        note(f"clips of activations: {fmean(transformed.clips.values()):.2f} on average")
    return transformed.clips


def with_searched_clips(plan: PrecisionPlan, transformed: Transformed, recipe: Recipe) -> PrecisionPlan:
    """The plan with the searched clips of the groups that read the low grid."""
    found = clips_of(transformed, recipe)
    return replace(plan, clips={**plan.clips, **{p: c for p, c in found.items() if p not in plan.raised}})


def planned(transformed: Transformed, recipe: Recipe | None = None, seen: Seen | None = None) -> PrecisionPlan:
    """The recipe's plan for a transformed model: by its policy, bettered by swaps, without what QFeM leaves out.
    `seen`: what was measured already."""
    recipe = recipe or transformed.recipe
    seen = seen or seen_of(transformed, recipe)
    plan = make_plan(recipe, transformed.source.map, seen)
    if recipe.policy.name == "budget" and recipe.policy.check and recipe.policy.score in RUNS_MODEL:
        plan = _or_paper(plan, transformed, recipe, seen)
    if recipe.policy.name == "budget" and recipe.policy.swaps and seen is not None:
        plan = _swapped(plan, transformed, recipe, seen)
    plan = with_searched_clips(with_excluded(plan, transformed), transformed, recipe)
    if recipe.policy.name == "budget" and recipe.policy.measured:
        plan = with_measured_gains(plan, transformed, recipe)
    return with_rows(plan, transformed, recipe)


def with_measured_gains(plan: PrecisionPlan, transformed: Transformed, recipe: Recipe) -> PrecisionPlan:
    """The plan, every raised group with the KL that it saves there: by how much the model's would rise without it."""
    ask = _ask(transformed, recipe)
    if ask is None or not plan.raised:
        return plan
    total, gains = measured_gains(ask, plan.activations, tuple(plan.raised))
    note(f"plan: KL {total:.4f} nats a token on {ask.run.tokens.numel()} tokens, of which activations are the cause")
    raised = {
        place: replace(entry, why=f"{entry.why}; measured in this plan: {gains[place]:.3g} nats a token of KL")
        for place, entry in plan.raised.items()
    }
    return replace(plan, raised=raised)


def _or_paper(plan: PrecisionPlan, transformed: Transformed, recipe: Recipe, seen: Seen | None) -> PrecisionPlan:
    """The plan, or DynamicPTQ's fixed set where that keeps to the budget too and measures lower."""
    ask, low = _ask(transformed, recipe), plan.low
    assert ask is not None and low is not None and seen is not None
    rival = make_plan(recipe.with_("policy.name=paper"), plan.model, None)
    price = prices(recipe, plan.model, seen, low)
    spent = sum(price.of(place, bits_of(entry.spec)) for place, entry in rival.raised.items())
    if recipe.policy.allow or not rival.raised or spent > price.budget * (1 + 1e-9):
        return plan
    measure = PlanDivergence(ask)
    ours, theirs = (measure(with_searched_clips(one, transformed, recipe).activations) for one in (plan, rival))
    note(f"plan: KL {ours:.4f} nats a token by {recipe.policy.score}, {theirs:.4f} by DynamicPTQ's fixed set")
    if ours <= theirs:
        return plan
    raised = {
        place: Raised(e.spec, f"{e.why}: its KL is below that by {recipe.policy.score}")
        for place, e in rival.raised.items()
    }
    return replace(plan, raised=raised)


def _swapped(plan: PrecisionPlan, transformed: Transformed, recipe: Recipe, seen: Seen) -> PrecisionPlan:
    """The plan, its groups exchanged where the measured KL says so."""
    ask, policy, low = _ask(transformed, recipe), recipe.policy, plan.low
    assert ask is not None and low is not None
    model_map = plan.model
    high = choices(recipe, low)[-1]
    found = sensitivity(recipe, model_map, seen, low)
    top = bits_of(high)
    measure = PlanDivergence(ask)
    grids = {low.bits: low, top: high}

    def measured(bits: Mapping[Place, int]) -> float:
        return measure({p: ask.at(p, grids[b]) if b in grids else plan.spec(*p) for p, b in bits.items()})

    begin = {place: bits_of(plan.spec(*place)) for place in ask.places}
    price = prices(recipe, model_map, seen, low)
    others = sum(price.of(p, b) for p, b in begin.items() if b not in grids)
    terms = Terms(
        low.bits,
        top,
        gain={place: found.gain(place, low.bits, top) for place in ask.places},
        price={place: price.of(place, top) for place in ask.places},
        budget=price.budget - others,
    )
    made = better(begin, terms, measured, policy.swaps)
    note(f"swaps: {len(made.exchanged)} of {made.tries} kept, KL {made.before:.4f} → {made.after:.4f} nats a token")
    raised = {place: entry for place, entry in plan.raised.items() if made.bits[place] != low.bits}
    for place, bits in made.bits.items():
        if bits == top and place not in raised:
            raised[place] = Raised(high, "a swap: the model's measured KL fell")
    return replace(plan, raised=raised)


def with_excluded(plan: PrecisionPlan, transformed: Transformed) -> PrecisionPlan:
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


def with_rows(plan: PrecisionPlan, transformed: Transformed, recipe: Recipe) -> PrecisionPlan:
    """The plan with the rows that read 8 bits in groups that read the low grid."""
    part, low = recipe.activations, plan.low
    if part.token_policy == "none" or low is None or plan.rows is not None:
        return plan
    source = transformed.source
    tokens, _ = calibration_tokens(source, recipe)
    grids = {place: None if place in plan.raised else low for place in plan.activations}
    found = observe.row_thresholds(
        source.model, source.map, tokens, grids, part.token_policy, part.token_share, source.compute
    )
    return replace(plan, rows=Rows(part.token_policy, part.token_share, found))


def _search_alpha(plan: PrecisionPlan, transformed: Transformed, ratios: dict[Place, float]) -> isolate.Excluded:
    """QFeM's search on the transformed model: activations on the plan's grids, weights and KV in 16 bits."""
    source, recipe = transformed.source, transformed.recipe
    model, model_map = source.model, source.map
    tokens, _ = calibration_tokens(source, recipe)
    left = QuantSpec(8) if recipe.exclude.bits == 8 else None
    limit = streamed_perplexity(model, model_map, tokens, source.compute, "16-bit activations")
    limit *= 1 + recipe.exclude.budget
    give_ranges(source, recipe, plan)
    clipped = with_searched_clips(plan, transformed, recipe)

    def perplexity(places: frozenset[Place]) -> float:
        chosen = {place: left if place in places else spec for place, spec in clipped.activations.items()}
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
    grids: dict[Place, QuantSpec | None] = {
        place: spec if spec is not None and spec.static else low for place, spec in plan.activations.items()
    }
    observe.calibrate_ranges(
        source.model, source.map, tokens, grids, method=part.calibrate, percent=part.percentile, device=source.compute
    )  # fmt: skip
