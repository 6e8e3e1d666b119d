"""Seconds and memory that a recipe takes for blocks of a model's shape, on random weights and random text.

The whole pipeline runs on as many blocks as are asked for; what depends on their number is then known by block. Random
weights say nothing of accuracy.
"""

import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from phasequant import pipeline
from phasequant.bench.timing import name_of
from phasequant.recipe import Recipe
from phasequant.source import wrap

LETTERS = "abcdefghijklmnopqrstuvwxyz ,."


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def time_quantizing(
    config: PretrainedConfig, recipe: Recipe, device: torch.device, sets: Sequence[str] = ()
) -> dict[str, Any]:
    """Of the pipeline on `config`'s blocks: seconds in all, of weights and of learning, with their peak memory."""
    config.vocab_size = 256
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device.type == "cuda" else None)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "random.txt"
        most = max(part.sequences * part.seqlen for part in (recipe.weights, recipe.calibration, recipe.learning))
        text.write_text("".join(random.Random(0).choices(LETTERS, k=most + 4096)))
        recipe = recipe.with_(f"calibration.text={json.dumps(str(text))}", *sets)
        source = replace(wrap("random", model, byte_tokenizer()), name=f"{config.num_hidden_layers} random blocks")
        begun = time.monotonic()
        run = pipeline.run(source, recipe)
        seconds = time.monotonic() - begun
    weights, learning = run.origin["weights"] or {}, run.origin["learning"] or {}
    return {
        "device": name_of(device), "blocks": config.num_hidden_layers, "seconds": seconds,
        **{f"{part}_{key}": told.get(key) for part, told in (("weights", weights), ("learning", learning))
           for key in ("seconds", "peak_bytes")},
    }  # fmt: skip
