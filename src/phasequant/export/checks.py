"""What a stock checkpoint cannot hold, found before anything is written.

    refused     maps that run online, low-rank branches, weights that the format has no codes for, experts
    on leave    grid: inputs on another grid of as many bits (clips, zero points, calibrated ranges, single rows)
                prefix: tokens whose keys and values stand before every text
    only told   the KV cache in 16 bits; inputs in more bits; the second scale of NVFP4 inputs

A rotation of keys and queries cancels in their product: without rounding between them it is the identity, so a KV grid
goes with its R3 and nothing else changes.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel

from phasequant.arch import ModelMap, Place
from phasequant.errors import PhaseQuantError, did_you_mean
from phasequant.export.profiles import Profile, finer, same_grid, short
from phasequant.nn import ModelLayout
from phasequant.numerics import QuantSpec
from phasequant.ranges import ranges

LEAVES = ("grid", "prefix")
ONLINE = {"qkv": "a map after the norm", "o": "the mixing of heads", "gate_up": "a map after the norm", "down": "R4"}
CHANGES = {
    "grid": "reads these inputs on compressed-tensors' grid",
    "prefix": "leaves the prefix away (or has the caller put its tokens before every prompt)",
}


@dataclass(frozen=True)
class Problem:
    """One thing that a profile cannot hold; `leave`: the word by which a user lets it go."""

    what: str
    why: str
    leave: str | None = None


def told(places: Iterable[Place], model_map: ModelMap) -> str:
    """Places as a person reads them: by group, the blocks of each."""
    found: dict[str, list[int]] = {group.name: [] for group in model_map.groups}
    for block, group in sorted(places):
        found[group].append(block)
    every = list(model_map.blocks)
    return "; ".join(
        group if blocks == every else f"{group} of block{'s' if len(blocks) > 1 else ''} {ranges(blocks)}"
        for group, blocks in found.items()
        if blocks
    )


def check_experts(model_map: ModelMap) -> None:
    """Refuse mixtures of experts."""
    if model_map.shape.experts:
        raise PhaseQuantError(
            f"a {model_map.family.name} model has experts, and no stock loader's layout of them at these bits was "
            "tested: serve the checkpoint itself (phasequant.load, or the vLLM plugin)"
        )


def check_shared(model: PreTrainedModel, model_map: ModelMap) -> None:
    """Refuse NVFP4 weights whose second scale differs among linears that servers fuse: they keep one of them."""
    for block in model_map.blocks:
        for group in model_map.groups:
            found = set()
            for name in group.linears:
                second = model.get_submodule(f"{model_map.block_name(block)}.{name}").get_buffer("weight_global")
                found.add(float(second))
            if len(found) > 1:
                raise PhaseQuantError(
                    f"the linears of {group.name} in block {block} have {len(found)} second scales, and servers fuse "
                    "them under one: quantize again (--requantize)"
                )


def _weights_problem(spec: QuantSpec | None, base: bool, profile: Profile, width: int) -> str | None:
    """Why the codes of a group do not fit a profile."""
    if spec is None:
        return "the weights are in 16 bits: there are no codes"
    if spec.kind != profile.kind:
        return f"the weights are {spec.kind}, and {profile.name} holds {profile.kind}"
    if not spec.is_int:
        return None
    if spec.bits not in ((4,) if base else (4, 8)):
        return f"the weights have {spec.bits} bits: {profile.name} holds 4, and 8 in groups that a plan raised"
    if not spec.symmetric and profile.bits < 16:
        return "the weights have zero points, which vLLM refuses beside integer inputs"
    if width % (32 // spec.bits):
        return f"{width} inputs do not fill words of {32 // spec.bits} codes"
    return None


def weights_problems(layout: ModelLayout, model_map: ModelMap, profile: Profile) -> list[Problem]:
    """Groups whose weights do not fit."""
    found: dict[str, list[Place]] = {}
    for block in model_map.blocks:
        for group in model_map.groups:
            spec = layout.weights_at(block, group.name)
            base = (block, group.name) not in layout.weights_others
            why = _weights_problem(spec, base, profile, model_map.width_in(group.name))
            if why:
                found.setdefault(why, []).append((block, group.name))
    return [Problem(f"weights of {told(places, model_map)}", why) for why, places in found.items()]


def _input_why(spec: QuantSpec) -> str:
    if spec.mixed:
        return "single rows of them read 8 bits"
    if spec.static:
        return "their range was calibrated, and the profile takes it from every token"
    if not spec.symmetric:
        return "they have a zero point, and the profile has none"
    if spec.granularity != "token":
        return f"they have one scale a {spec.granularity}, and the profile one a token"
    return f"they are clipped at {float(spec.clip):.4g} of the largest magnitude, and the profile at its own"


def input_problems(layout: ModelLayout, model_map: ModelMap, profile: Profile) -> list[Problem]:
    """Groups whose inputs would be read on another grid of as many bits."""
    found: dict[str, list[Place]] = {}
    for place, read in profile.inputs(layout.activations, model_map).items():
        own = layout.activations[place]
        if own is not None and not finer(own, read) and not same_grid(own, read):
            found.setdefault(_input_why(own), []).append(place)
    return [Problem(f"inputs of {told(places, model_map)}", why, "grid") for why, places in found.items()]


def find_problems(layout: ModelLayout, model_map: ModelMap, profile: Profile) -> list[Problem]:
    """Everything that a profile cannot hold of a checkpoint."""
    found = []
    for group in layout.online:
        why = f"{ONLINE[group]} runs there at inference, and stock loaders run nothing"
        found.append(Problem(f"inputs of {group}", why))
    if layout.lowrank is not None:
        found.append(
            Problem(
                f"the low-rank branches of {', '.join(layout.lowrank.ranks)}",
                "the format has no place for 16-bit factors beside codes",
            )
        )
    found += weights_problems(layout, model_map, profile)
    found += input_problems(layout, model_map, profile)
    if layout.prefix is not None:
        tokens = ", ".join(map(str, layout.prefix.tokens))
        why = "servers have no place for keys and values that stand before every text"
        found.append(Problem(f"the prefix (tokens {tokens})", why, "prefix"))
    return found


def notes_of(layout: ModelLayout, model_map: ModelMap, profile: Profile) -> list[str]:
    """What changes without harm, for the user and the page."""
    found = []
    reads = profile.inputs(layout.activations, model_map)
    wider: dict[str, list[Place]] = {}
    for place, read in reads.items():
        own = layout.activations[place]
        if own is not None and finer(own, read):
            change = f"{short(own)} → {short(read)}"
            wider.setdefault(change, []).append(place)
    found += [f"inputs in more bits, {change}: {told(places, model_map)}" for change, places in wider.items()]
    if layout.kv:
        bits = sorted({kv.keys.bits for kv in layout.kv.values()})
        found.append(
            f"the KV cache is in 16 bits (the checkpoint's has {', '.join(map(str, bits))}); no accuracy is lost by "
            "that. vLLM on GPUs has 4 bits of its own, another grid: --kv-cache-dtype int4_per_token_head"
        )
    if profile.kind == "nvfp4":
        found.append("the second scale of NVFP4 inputs is calibrated, one a group; the checkpoint takes one a token")
    return found


def check_leaves(allow: Collection[str]) -> None:
    """Known words only."""
    for word in allow:
        if word not in LEAVES:
            raise PhaseQuantError(f"--allow {word}: {did_you_mean(word, LEAVES)}")


def check_problems(
    problems: list[Problem], profile: Profile, allow: Collection[str], remedy: str | None = "--requantize"
) -> list[str]:
    """Refuse what was not let go; else what was, as notes. `remedy`: what is proposed; None: nothing helps."""
    left = [p for p in problems if p.leave is None or p.leave not in allow]
    if not left:
        return [f"let go ({p.leave}): {p.what}: {p.why}" for p in problems]
    lines = [f"{profile.name} cannot hold this checkpoint:"]
    lines += [f"  {p.what}: {p.why}" for p in left]
    lines.append("what to do:")
    words = sorted({p.leave for p in left if p.leave is not None})
    if words:
        only = "" if all(p.leave for p in left) else " (not enough by itself)"
        lines.append(f"  --allow {','.join(words)}{only}: {'; '.join(CHANGES[word] for word in words)}")
    if remedy:
        lines.append(f"  {remedy}: quantizes the source again, by the same recipe with nothing left online")
    lines.append("  or serve the checkpoint itself: phasequant.load, or the vLLM plugin")
    raise PhaseQuantError("\n".join(lines))
