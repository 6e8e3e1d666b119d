"""What a run will take, before it is started: peak memory, seconds, bytes of output, from the run's own first blocks.

The model is opened as the run would open it, cut to its first blocks (one where blocks are large, else two), and taken
through the whole pipeline into a directory that is removed again. So nothing is guessed of the machine, of the recipe
or of what the libraries allocate; only the depth is extrapolated:

    seconds   what is told block by block (`console.progress`), times blocks; other steps that count something, by
              multiply-adds of the model, head included; the rest once
    memory    streamed: the peak of the trial, which holds one block as the run does. In memory: that peak with the
              blocks that were cut off in it, once more where a plan is drafted on a copy; or the peak of loading
    output    the trial's files and the bytes of a block for every further one

It costs what two blocks cost, and the reading and writing of embeddings and head.
"""

import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from phasequant import pipeline
from phasequant.arch import ModelMap
from phasequant.console import Phase, watched_phases
from phasequant.plan import NEEDS_NOISE, NEEDS_OBSERVATIONS
from phasequant.recipe import Recipe
from phasequant.source import Source
from phasequant.streaming.memory import give_back, resident_bytes
from phasequant.surroundings import measured

LARGE = 50_000_000  # weights of a block that is tried alone


@dataclass(frozen=True)
class Prediction:
    """`peak_bytes`: of the process, or of the CUDA device where it computes on one; `tried_s`: what this took."""

    peak_bytes: int
    seconds: float
    output_bytes: int
    streamed: bool
    blocks: int
    blocks_tried: int
    tried_s: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        clock = f"{self.seconds / 60:.1f} minutes" if self.seconds > 120 else f"{self.seconds:.0f} s"
        how = "streamed" if self.streamed else "in memory"
        return (
            f"predicted ({how}, from {self.blocks_tried} of {self.blocks} blocks, tried in {self.tried_s:.0f} s): "
            f"peak memory {self.peak_bytes / 2**30:.2f} GiB, {clock}, output {self.output_bytes / 2**20:.0f} MiB"
        )


def _cut(source: Source, blocks: int) -> None:
    """Leave a source its first blocks."""
    config, path = source.model.config, source.map.family.blocks
    parent, _, leaf = path.rpartition(".")
    kept = source.model.get_submodule(path)[:blocks]
    setattr(source.model.get_submodule(parent), leaf, nn.ModuleList(kept))
    config.num_hidden_layers = blocks
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = list(kinds)[:blocks]
    source.map = ModelMap.from_config(config)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _block_bytes(made: pipeline.Quantized) -> int:
    """Of the first block, as it is stored."""
    block = made.model.get_submodule(made.map.block_name(0))
    weights = {name for name, _ in block.named_parameters()}
    wide = 4 if made.recipe.storage.dtype == "float32" else 2
    return sum(t.numel() * (wide if n in weights else t.element_size()) for n, t in block.state_dict().items())


def _extrapolated(phases: Iterable[Phase], model_map: ModelMap, blocks: int) -> tuple[float, float]:
    """(seconds of all phases here, seconds of them at full depth)."""
    here = there = 0.0
    tried, head = model_map.shape.blocks, model_map.shape.d_model * model_map.shape.vocab
    macs = model_map.macs_total // tried
    for phase in phases:
        whole = (blocks * macs + head) / (tried * macs + head)
        here += phase.seconds
        there += phase.seconds * (blocks / tried if phase.total == tried else whole)
    return here, there


def predict(open_source: Any, recipe: Recipe, beside: Path) -> Prediction:
    """What a run of `recipe` on the source that `open_source()` gives will take; trial files go beside `beside`."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.trial-", dir=beside.parent) as name:
        folder = Path(name)
        (folder / "work").mkdir()
        opening = time.monotonic()
        source: Source = open_source()
        with measured(source.compute) as cost:
            pass
        full, loading = resident_bytes(), cost.peak_bytes
        blocks = source.map.shape.blocks
        weights = source.map.macs_total // blocks
        tried = min(blocks, 1 if weights > LARGE else 2)
        _cut(source, tried)
        give_back()
        before = resident_bytes()
        with measured(source.compute) as cost, watched_phases() as phases:
            made = pipeline.run(source, recipe, work=folder / "work")
            made.save(folder / "out")
        spent = time.monotonic() - opening
        here, there = _extrapolated(phases, source.map, blocks)
        peak = cost.peak_bytes
        if source.streamed is None and source.compute.type == "cpu":
            others = full - before
            copied = others if _drafts(recipe) else 0
            peak = max(loading, peak + others + copied)
        written = _bytes_of(folder / "out") + (blocks - tried) * _block_bytes(made)
        return Prediction(
            peak_bytes=peak,
            seconds=round(spent - here + there, 1),
            output_bytes=written,
            streamed=source.streamed is not None,
            blocks=blocks,
            blocks_tried=tried,
            tried_s=round(time.monotonic() - start, 1),
        )


def _drafts(recipe: Recipe) -> bool:
    """Whether the plan is made on a copy of the model."""
    name = recipe.policy.name
    looks = name in NEEDS_OBSERVATIONS or name in NEEDS_NOISE or recipe.exclude.method != "none"
    return looks and pipeline.sees_plan(recipe)
