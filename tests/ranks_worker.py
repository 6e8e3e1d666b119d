"""What `test_ranks` runs in one process and in two: everything that ranks share, on a tiny model; results as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from phasequant import observe, pipeline, ranks
from phasequant.evaluate import score, streamed_perplexity
from phasequant.numerics import product
from phasequant.recipe import Recipe
from phasequant.sensitivity import MEASURES
from phasequant.source import open_model
from phasequant.text import cut, find

SMALL = ["calibration.sequences=5", "calibration.seqlen=24", "weights.sequences=5", "weights.seqlen=24",
         "learning.sequences=4", "learning.seqlen=24", "learning.epochs=1", "learning.batch=2"]  # fmt: skip


def _recipe(name: str, text: str, *more: str) -> Recipe:
    return Recipe.load(name, [f"calibration.text={text}", *SMALL, *more])


def _weights(made: pipeline.Quantized) -> dict[str, list[float]]:
    """A little of every tensor."""
    return {
        name: [float(tensor.float().abs().mean()), float(tensor.float().std())]
        for name, tensor in made.model.state_dict().items()
        if tensor.numel() > 1
    }


def everything(model: str, text: str) -> dict[str, Any]:
    """Name → what was found."""
    found: dict[str, Any] = {}
    recipe = _recipe("quarot", text)
    source = open_model(model, "cpu")
    made = pipeline.observe_and_transform(source, recipe, raw=True, transformed=True, noise=True)
    found["observations"] = [one.to_dict() for one in made.observations]
    tokens, _ = pipeline.calibration_tokens(source, recipe)
    grids = {
        (block, group.name): recipe.activations.spec() for block in source.map.blocks for group in source.map.groups
    }
    found["clips"] = {str(k): v for k, v in observe.search_clips(source.model, source.map, tokens, grids).items()}
    rows = observe.row_thresholds(source.model, source.map, tokens, grids, "absmax", 0.1)
    found["rows"] = {str(k): v for k, v in rows.items()}
    found["perplexity"] = streamed_perplexity(source.model, source.map, tokens, torch.device("cpu"), "text")
    for name in MEASURES:
        if name in ("kl", "kl_alone", "local", "fisher", "gradient"):
            asked = recipe.with_("policy.name=budget", f"policy.score={name}", "policy.tokens=120")
            seen = pipeline.seen_of(made, asked)
            assert seen is not None and seen.sensitivity is not None
            found[name] = {str(place): by for place, by in seen.sensitivity.harm.items()}
    for name, more in (
        ("quarot-gptq", ["weights.order=natural"]),
        ("rtn", ["policy.name=budget"]),
        ("static-w8a8", []),
        ("flat", []),
        ("qfep-w8a8", []),
        ("spin", ["learning.steps=3"]),
        ("rtn", ["finetune.steps=3", "finetune.epochs=1", "finetune.sequences=4", "finetune.seqlen=24"]),
    ):
        quantized = pipeline.run(open_model(model, "cpu"), _recipe(name, text, *more))
        found[f"{name} {more}"] = {"plan": quantized.plan.to_dict(), "weights": _weights(quantized)}
        chunks = cut(find(text, "evaluation"), quantized.tokenizer, 24, 5)
        scored, full = score({"model": quantized.model}, chunks, open_model(model, "cpu").model)
        assert full is not None
        found[f"{name} {more} scores"] = [scored["model"].nll_by_chunk, scored["model"].kl_by_chunk, full.nll_by_chunk]
    return found


if __name__ == "__main__":
    product.multiplies_bfloat16 = lambda device: False  # as in conftest
    place = ranks.start()
    result = everything(sys.argv[1], sys.argv[2])
    Path(f"{sys.argv[3]}.{place.rank}").write_text(json.dumps(result))
    ranks.stop()
