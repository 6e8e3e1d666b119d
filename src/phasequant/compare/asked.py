"""What a comparison is to do: its recipes by seed, the plans of each, and the work on which all rows are measured."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from phasequant import text as texts
from phasequant.api import Model, as_source
from phasequant.checkpoint import versions
from phasequant.compare.kept import Rows
from phasequant.compare.measure import FULL, Comparison, Work
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import tasks as zero_shot
from phasequant.fingerprint import of_module
from phasequant.recipe import Recipe
from phasequant.source import check_finite
from phasequant.weight import needs_tokens

EXACT = ("none", "load")  # transforms that neither draw at random nor read calibration text


@dataclass(frozen=True)
class Asked:
    """What a comparison is to do, as plain values: workers are given it too. `recipes`: (name, recipe) by seed."""

    model: Model
    recipes: tuple[tuple[str, Recipe], ...]
    policies: tuple[str, ...]
    a8_share: float
    texts: tuple[str, ...]
    chunks: int | None
    seqlen: int
    tasks: tuple[str, ...]
    tasks_dir: Path | None
    limit: int | None
    batch: int
    output: Path
    device: str

    def wanted(self, recipe: Recipe) -> list[Recipe]:
        """A recipe under each policy; one of 16-bit activations has nothing to plan."""
        if recipe.activations.bits == FULL:
            return [recipe.with_("policy.name=uniform")]
        return [recipe.with_(policy={"name": policy, "a8_share": self.a8_share}) for policy in self.policies]

    def open(self) -> Comparison:
        """The model, and the work on which its rows are measured."""
        corpora = {name: texts.find(name, "evaluation") for name in self.texts}
        source = as_source(self.model, self.device)
        if source.quantized:
            raise PhaseQuantError(f"'{source.name}' is quantized already: compare recipes on its 16-bit original")
        check_finite(source.model)
        cuts = {name: texts.cut(one, source.tokenizer, self.seqlen, self.chunks) for name, one in corpora.items()}
        work = Work(cuts, self.tasks, self.tasks_dir, self.limit, self.batch)
        stamp = {
            "model": of_module(source.model),
            "texts": [texts.digest(tokens) for tokens in cuts.values()],
            "tasks": zero_shot.check(self.tasks, self.tasks_dir, self.limit) if self.tasks else None,
            "versions": versions(),
            "device": source.compute.type,
            "format": 3,
        }
        return Comparison(source, work, Rows(self.output, stamp))


def is_random(recipe: Recipe, policies: Iterable[str]) -> bool:
    """Whether another seed gives another model: other signs, or other calibration text where any is read."""
    reads = recipe.activations
    calibrated = reads.bits < FULL and (
        reads.clip == "searched" or reads.scales == "static" or reads.token_policy != "none"
        or recipe.exclude.method != "none" or bool({"threshold", "budget"} & set(policies))
    )  # fmt: skip
    return (
        recipe.transform.method not in EXACT
        or bool(recipe.learned_clips)
        or recipe.finetune.on
        or recipe.prefix.method in ("qfep", "prefixquant")
        or (recipe.weights.bits < FULL and needs_tokens(recipe.weights, recipe.lowrank))
        or calibrated
    )


def seeded(name: str, recipe: Recipe, seeds: int, policies: Iterable[str]) -> Iterator[tuple[str, Recipe]]:
    """A recipe for each seed, from its own on; once where nothing is random."""
    for step in range(seeds if is_random(recipe, policies) else 1):
        yield name, recipe.with_(f"seed={recipe.seed + step}")
