"""Prefill and decode of whole models of one shape with random weights: 16 bits and quantized, tokens a second, memory.

Every row is the same `runtime.Runner`: one CUDA graph a token on both sides; the 16-bit side attends by flash attention
over its whole cache. Prefill is timed as it runs (launches included), decode by replaying its graph from the context.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import PretrainedConfig

from phasequant.bench.random_model import Style, nbytes, random_model
from phasequant.bench.timing import name_of
from phasequant.runtime import Decoder, Runner
from phasequant.runtime.runner import describe

ROWS: dict[str, dict[str, Any]] = {
    "16-bit": {"style": "16-bit"},
    "W4A4KV4": {"style": "quarot"},
    "W4A4KV4, paper's blocks A8": {"style": "quarot", "eight": "paper"},
    "W4A8KV4": {"style": "quarot", "eight": "all"},
    "W4A4KV4, flat": {"style": "flat"},
}


@dataclass(frozen=True)
class Load:
    """`batch` rows of `context` tokens, then `new` tokens each."""

    batch: int
    context: int
    new: int = 256


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def time_whole(
    config: PretrainedConfig, loads: Sequence[Load], device: torch.device, rows: Sequence[str] = tuple(ROWS),
    *, repeats: int = 3, prefill_tokens: int = 2**14,
) -> dict[str, Any]:  # fmt: skip
    """Of every row and load: seconds of a prefill of `context` tokens (of as many rows of the batch as hold
    `prefill_tokens`), of a decoded token; peak memory. Loads that do not fit are told so."""
    found = []
    for name in rows:
        style: Style = ROWS[name]["style"]
        model = random_model(config, device, style, eight=ROWS[name].get("eight", "none"))
        decoder = Decoder(model, release=True)
        weights = torch.cuda.memory_allocated(device) if device.type == "cuda" else nbytes(model)
        for load in loads:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            row: dict[str, Any] = {"row": name, **vars(load), "weight_bytes": weights}
            try:
                row |= _one(decoder, load, repeats, prefill_tokens)
            except torch.cuda.OutOfMemoryError as error:
                row["failed"] = str(error).splitlines()[0]
            if device.type == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            found.append(row)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del model, decoder
        gc.collect()
    base = {(row["batch"], row["context"]): row for row in found if row["row"] == "16-bit"}
    for row in found:
        other = base.get((row["batch"], row["context"]), {})
        both = [kind for kind in ("prefill_seconds", "token_seconds") if kind in row and kind in other]
        row["ratio"] = {kind: other[kind] / row[kind] for kind in both}
    return {"device": name_of(device), "blocks": config.num_hidden_layers, "rows": found}


def _one(decoder: Decoder, load: Load, repeats: int, prefill_tokens: int) -> dict[str, Any]:
    device = decoder.device
    few = max(1, min(load.batch, prefill_tokens // load.context))
    capacity = -(-(load.context + load.new) // 256) * 256
    tokens = torch.randint(0, decoder.map.shape.vocab, (few, load.context), device=device)
    runner = Runner(decoder, few, capacity, flash=True)
    times = []
    for turn in range(repeats + 1):
        _synchronize(device)
        begun = time.perf_counter()
        runner.prefill(tokens)
        _synchronize(device)
        if turn:
            times.append(time.perf_counter() - begun)
    told: dict[str, Any] = {"prefill_rows": few, "prefill_seconds": median(times), "runs": describe(runner)}
    if few < load.batch:
        del runner
        gc.collect()
        runner = Runner(decoder, load.batch, capacity, flash=True)
        runner.cache.set_lengths(torch.full((load.batch,), load.context, device=device))
    runner.tokens.zero_()
    runner.decode()
    _synchronize(device)
    times = []
    for _ in range(repeats):
        runner.cache.set_lengths(torch.full((load.batch,), load.context, device=device))
        _synchronize(device)
        begun = time.perf_counter()
        for _ in range(load.new):
            runner.decode()
        _synchronize(device)
        times.append((time.perf_counter() - begun) / load.new)
    told["token_seconds"] = median(times)
    told["prefill_tokens_per_second"] = few * load.context / told["prefill_seconds"]
    told["decode_tokens_per_second"] = load.batch / told["token_seconds"]
    told["cache_bytes"] = runner.cache.nbytes
    return told
