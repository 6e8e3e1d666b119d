"""`Quantized`: a quantized model in memory, with all that made it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phasequant import streaming, transform
from phasequant.arch import ModelMap
from phasequant.checkpoint import save
from phasequant.nn import set_activations
from phasequant.observe import Observations
from phasequant.plan import PrecisionPlan
from phasequant.recipe import Recipe
from phasequant.transform import Transform


@dataclass
class Quantized:
    """What `quantize` gives: the model, its plan and transform, and what was seen and done on the way."""

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
