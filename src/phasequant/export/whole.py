"""`export`: a checkpoint becomes a directory that stock loaders read; see the package's docstring for its parts.

Codes and scales are carried over; rotations that were folded are in them already. What the format has no place for is
refused (`checks`), let go by name (`allow`), or quantized away (`requantize`). Then both sides are measured.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from phasequant import api
from phasequant import text as texts
from phasequant.arch import ModelMap
from phasequant.checkpoint import check_target, is_checkpoint, manifest, new_folder
from phasequant.console import note
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import weight_bytes
from phasequant.export.card import page
from phasequant.export.checks import (
    check_experts,
    check_leaves,
    check_problems,
    check_shared,
    find_problems,
    notes_of,
    told,
)
from phasequant.export.config import by_pair, quantization_config
from phasequant.export.folder import CARD, is_export, scales_told, state_dict, write_manifest, write_model
from phasequant.export.measure import Peaks, as_profile, check_agreement, open_stock, peaks_of, ppl
from phasequant.export.profiles import Profile, find_profile, short
from phasequant.export.requantize import folded
from phasequant.nn import Activations, ModelLayout
from phasequant.preparing import calibration_tokens
from phasequant.recipe import Recipe
from phasequant.source import Source, open_model

SLACK = 64 * 2**20


@dataclass(frozen=True)
class Exported:
    """What `export` wrote. `figures`: perplexities, empty where none were measured; `notes`: what is other than in the
    checkpoint; `groups`: a line on each config group."""

    folder: Path
    profile: str
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class _Work:
    """A quantized model, and how its export computes."""

    source: Source
    layout: ModelLayout
    recipe: Recipe
    profile: Profile
    inputs: Activations
    peaks: Peaks | None
    stored: torch.dtype

    @property
    def map(self) -> ModelMap:
        return self.source.map


def _work(source: Source, recipe: Recipe, profile: Profile) -> _Work:
    config: Any = source.model.config.quantization_config
    layout = ModelLayout.from_dict(config.layout, source.map)
    inputs = profile.inputs(layout.activations, source.map)
    if profile.low is not None and profile.low not in inputs.values():
        raise PhaseQuantError(
            f"no group of this checkpoint reads what {profile.name} is named for ({profile.low}): "
            "export ct-w4a8 or ct-w4a16"
        )
    peaks = None
    if profile.kind == "nvfp4":
        check_shared(source.model, source.map)
        seen = peaks_of(source.model, source.map, calibration_tokens(source, recipe)[0])
        peaks = {place: seen[place] for place, spec in inputs.items() if spec is not None}
    return _Work(source, layout, recipe, profile, inputs, peaks, getattr(torch, config.dtype))


def _requantized(source: Source, recipe: Recipe, model: str | None, device: str) -> Source:
    """The checkpoint's source, quantized again."""
    found = model if model is not None else manifest.read(Path(source.name).expanduser()).get("source")
    if found is None:
        raise PhaseQuantError(f"the manifest of '{source.name}' names no source: name the 16-bit model (--model)")
    note(f"quantizing {found} again ({recipe.transform.method}, nothing online)")
    dense = api.as_source(found, device, stream=True)
    if dense.map.fingerprint() != source.map.fingerprint():
        raise PhaseQuantError(
            f"'{found}' has another architecture or size than the checkpoint: name the model it was made from (--model)"
        )
    made = api.quantize(dense, recipe, device=device)
    return Source(str(found), made.model, made.tokenizer, made.map, quantized=True)


def _groups(work: _Work) -> list[str]:
    """A line on each config group."""
    return [
        f"weights {short(weights)} per {weights.granularity}"
        + (f" of {weights.group_size}" if weights.group_size else "")
        + f", inputs {short(read)}: {told(places, work.map)}"
        for (weights, read), places in by_pair(work.layout, work.inputs, work.map).items()
    ]


def _measured(work: _Work, chunks: Int[Tensor, "chunks T"]) -> dict[str, float]:
    """The profile, by this package."""
    model, every = work.source.model, work.map
    with as_profile(model, every, work.inputs, work.peaks):
        found = {"profile": ppl(model, chunks)}
    if work.profile.bits < 16:
        with as_profile(model, every, dict.fromkeys(work.inputs)):
            found["weights_alone"] = ppl(model, chunks)
    return found


def _expected(work: _Work, chunks: Int[Tensor, "chunks T"], measured: float) -> float:
    """What stock Transformers should give: FP4 weights it rounds once more."""
    if work.profile.kind == "int":
        return measured
    with as_profile(work.source.model, work.map, work.inputs, work.peaks, rounded=True):
        return ppl(work.source.model, chunks)


def _write(
    work: _Work, target: Path, origin: str, chunks: Tensor | None, figures: dict[str, Any], notes: list[str]
) -> Exported:
    """Everything into a new directory; it appears once stock Transformers has computed what was measured."""
    model = work.source.model
    groups = _groups(work)
    with new_folder(target, is_export, weight_bytes(model) + SLACK) as folder:
        tensors = state_dict(model, work.map, work.stored, work.peaks)
        if (scales := scales_told(tensors, work.stored)) is not None:
            notes = [*notes, scales]
        config = quantization_config(work.layout, work.inputs, work.map, work.profile)
        write_model(folder, model, work.source.tokenizer, tensors, config, work.stored)
        del tensors
        if chunks is not None:
            figures["stock"] = ppl(open_stock(folder, model, work.profile.kind), chunks)
            check_agreement(_expected(work, chunks, figures["profile"]), figures["stock"])
        name = target.expanduser().resolve().name
        grouped = work.layout.weights is not None and work.layout.weights.granularity == "group"
        prefix = () if work.layout.prefix is None else work.layout.prefix.tokens
        text = page(work.profile, name, origin, figures, notes, groups, grouped, prefix)
        (folder / CARD).write_text(text, encoding="utf-8")
        (folder / "recipe.yaml").write_text(work.recipe.to_yaml(), encoding="utf-8")
        write_manifest(folder, {"profile": work.profile.name, "source": origin, "figures": figures, "notes": notes})
    return Exported(target, work.profile.name, figures, notes, groups)


def export(
    checkpoint: str | Path,
    output: str | Path,
    profile: str = "ct-w4a16",
    *,
    allow: Iterable[str] = (),
    requantize: bool = False,
    model: str | None = None,
    recipe: Recipe | str | Path | None = None,
    overrides: Iterable[str] = (),
    text: str | Path = texts.BUILTIN,
    chunks: int = 2,
    seqlen: int = 2048,
    device: str = "auto",
) -> Exported:
    """Write a PhaseQuant checkpoint as a stock compressed-tensors one.

    - `profile`: of `PROFILES`.
    - `allow`: what may be let go: `grid`, `prefix` (see `export.checks`).
    - `requantize`: quantize the checkpoint's source again (or `model`) by its recipe (or `recipe`, `overrides`), with
      nothing left online and on the profile's grids.
    - `text`, `chunks`, `seqlen`: what perplexity is measured on; 0 chunks: not at all.

    Raises `PhaseQuantError` where the profile cannot hold the checkpoint; nothing is written then.
    """
    folder, target, own = Path(checkpoint).expanduser(), Path(output), find_profile(profile)
    permitted, changes = list(allow), list(overrides)
    check_leaves(permitted)
    if not requantize and (model is not None or recipe is not None or changes):
        raise PhaseQuantError("--model, --recipe and --set say how to quantize again: they go with --requantize")
    if not (folder.is_dir() and is_checkpoint(folder)):
        raise PhaseQuantError(f"{folder} is not a PhaseQuant checkpoint: make one with `phasequant quantize`")
    check_target(target, is_export)
    source = open_model(folder, device)
    check_experts(source.map)
    wanted = Recipe.load(folder / "recipe.yaml")
    work = None
    if requantize:
        base = wanted if recipe is None else api.as_recipe(recipe)
        wanted = folded(base.with_(*changes), own, source.map)
        notes = ["quantized again from the source, with nothing left online"]
    else:
        layout = ModelLayout.from_dict(source.model.config.quantization_config.layout, source.map)
        notes = check_problems(find_problems(layout, source.map, own), own, permitted)
        notes += notes_of(layout, source.map, own)
        work = _work(source, wanted, own)
    tokens, figures = None, {}
    if chunks:
        corpus = texts.find(str(text), "evaluation")
        tokens = texts.cut(corpus, source.tokenizer, seqlen, chunks)
        figures = {"text": corpus.source, "chunks": len(tokens), "seqlen": seqlen}
        figures["checkpoint"] = ppl(source.model, tokens)
    if work is None:
        work = _work(_requantized(source, wanted, model, device), wanted, own)
        check_problems(find_problems(work.layout, work.map, own), own, (), remedy=None)
        notes += notes_of(work.layout, work.map, own)
    if tokens is not None:
        figures |= _measured(work, tokens)
    return _write(work, target, _origin(folder), tokens, figures, notes)


def _origin(folder: Path) -> str:
    """The name of the 16-bit model without the directory it lay in."""
    found = str(manifest.read(folder).get("source") or folder.name)
    return Path(found).name if Path(found).is_absolute() else found
