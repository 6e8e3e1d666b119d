"""What callers name: a model, a recipe, a plan, each as an object, by its name or by its file."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.plan import PrecisionPlan
from phasequant.recipe import Recipe
from phasequant.source import Source, open_model, wrap


def as_recipe(recipe: Recipe | str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A `Recipe`, a preset's name, or a YAML file, with `a.b=c` overrides."""
    if isinstance(recipe, Recipe):
        return recipe.with_(*overrides)
    return Recipe.load(recipe, overrides)


def as_plan(plan: PrecisionPlan | str | Path | None, model_map: ModelMap) -> PrecisionPlan | None:
    """A plan, or the file of one."""
    if plan is None or isinstance(plan, PrecisionPlan):
        return plan
    try:
        content = Path(plan).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PhaseQuantError(f"the plan {plan} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return PrecisionPlan.from_json(content, model_map)


Model = str | Path | Source | PreTrainedModel
"""What is accepted as MODEL: a name (see `open_model`), an open `Source`, or a Transformers model with `tokenizer=`."""


def as_source(
    model: Model, device: str = "auto", tokenizer: PreTrainedTokenizerBase | None = None, *, stream: bool = False
) -> Source:
    """MODEL as a `Source`. A Transformers model stays where it is and is not copied; for `stream` see `open_model`."""
    if isinstance(model, Source):
        return model
    if isinstance(model, (str, Path)):
        return open_model(model, device, stream=stream)
    if not isinstance(model, PreTrainedModel):
        raise PhaseQuantError(f"MODEL is a name, a path or a Transformers model, not a {type(model).__name__}")
    if tokenizer is None:
        raise PhaseQuantError("a Transformers model needs its tokenizer: pass tokenizer=…")
    return wrap(model.config._name_or_path or type(model).__name__, model, tokenizer)
