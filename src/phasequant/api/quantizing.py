"""Quantize a model, in memory or streamed; or predict what that will take."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from phasequant import pipeline
from phasequant.api.arguments import Model, as_plan, as_recipe, as_source
from phasequant.checkpoint import check_target, manifest
from phasequant.console import note
from phasequant.errors import PhaseQuantError
from phasequant.plan import PrecisionPlan
from phasequant.predict import Prediction
from phasequant.predict import predict as predict_run
from phasequant.ranks import leads, wait
from phasequant.recipe import Recipe
from phasequant.source import Source, open_streamed
from phasequant.streaming import Work, should_stream
from phasequant.streaming.opening import NotStreamable


def quantize(
    model: Model,
    recipe: Recipe | str | Path = "quarot",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overrides: Iterable[str] = (),
    plan: PrecisionPlan | str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    stream: bool | None = None,
) -> pipeline.Quantized:
    """Quantize MODEL by a recipe; save it where `output` is given. A `Source` or Transformers model is changed in
    place. With an `output` finished blocks are kept beside it, and a run that was stopped goes on from them.

    `stream`: read and write MODEL block by block, never all of it in memory; None: where it would not fit. It needs an
    `output`, and the model that comes back has no weights: `load(output)` has."""
    wanted = as_recipe(recipe, overrides)
    if output is not None:
        check_target(Path(output), manifest.is_ours)
    if output is None:
        if stream:
            raise PhaseQuantError("a streamed model is written block by block: give an output")
        source = as_source(model, device, tokenizer, stream=True)
        result = pipeline.run(source, wanted, as_plan(plan, source.map))
    else:
        with Work.beside(Path(output)) as work:
            work.tell()
            source = _to_quantize(model, wanted, device, tokenizer, stream)
            result = pipeline.run(source, wanted, as_plan(plan, source.map), work.folder)
            if leads():
                result.save(output)
            wait()
    if source.streamed is None:
        result.model.to(source.compute)
    return result


def predict(
    model: str | Path,
    recipe: Recipe | str | Path = "quarot",
    *,
    overrides: Iterable[str] = (),
    output: str | Path,
    device: str = "auto",
    stream: bool | None = None,
) -> Prediction:
    """What `quantize` with these arguments will take in memory, seconds and bytes of output: see `predict`."""
    wanted = as_recipe(recipe, overrides)
    target = check_target(Path(output), manifest.is_ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    return predict_run(lambda: _to_quantize(model, wanted, device, None, stream), wanted, target)


def _to_quantize(
    model: Model, recipe: Recipe, device: str, tokenizer: PreTrainedTokenizerBase | None, stream: bool | None
) -> Source:
    """MODEL, in memory or to be streamed."""
    if not isinstance(model, (str, Path)):
        if stream:
            raise PhaseQuantError("a model in memory cannot be streamed: give its directory")
        return as_source(model, device, tokenizer, stream=True)
    folder = should_stream(str(model), recipe, stream)
    if folder is None:
        return as_source(model, device, tokenizer, stream=True)
    try:
        return open_streamed(folder, device)
    except NotStreamable as error:
        if stream:
            raise PhaseQuantError(f"'{model}' cannot be streamed: {error}; leave --stream away") from error
        note(f"'{model}' cannot be streamed: {error}")
        return as_source(model, device, tokenizer, stream=True)
