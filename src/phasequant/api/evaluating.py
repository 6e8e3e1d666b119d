"""Measure a model beside its 16-bit original: perplexity, KL, accuracy on tasks, sizes."""

import copy
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phasequant import pipeline
from phasequant import text as texts
from phasequant.api.arguments import Model, as_plan, as_recipe, as_source
from phasequant.arch import ModelMap
from phasequant.checkpoint import manifest, read_plan, versions
from phasequant.console import note, warn
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import Score, score, weight_bytes
from phasequant.evaluate import tasks as zero_shot
from phasequant.evaluate.answers import name_of
from phasequant.evaluate.statistics import compare_nll, perplexity_interval
from phasequant.nn import kv_bytes_per_token, prefix_length, prefix_tokens, quant_linears
from phasequant.plan import PrecisionPlan
from phasequant.recipe import Recipe
from phasequant.source import Source


def kernels_used(model: PreTrainedModel) -> dict[str, int]:
    """How many linears each kernel runs."""
    like = next(model.parameters())
    return dict(Counter(module.kernel(like.device, like.dtype).name for _, module in quant_linears(model)))


def figures(model: PreTrainedModel, model_map: ModelMap, found: Score | None, a8_share: float) -> dict[str, Any]:
    """One candidate's row: accuracy (None where no text was read) and size."""
    return {
        "ppl": found and found.ppl,
        "interval": perplexity_interval(found.nll_by_chunk).to_dict() if found and math.isfinite(found.ppl) else None,
        "kl": found and found.kl,
        "a8_share": a8_share,
        "row_share": found and found.rows,
        "weight_bytes": weight_bytes(model),
        "kv_bytes_per_token": kv_bytes_per_token(model, model_map),
    }


def _teacher(source: Source, found_in: str | None, original: Model | None, device: str) -> Source | None:
    """The 16-bit original of a quantized model: the one given, or the one its manifest names."""
    name = original if original is not None else found_in
    if name is None:
        return None
    try:
        teacher = as_source(name, device)
    except PhaseQuantError as error:
        if original is not None:
            raise
        warn(f"the 16-bit original cannot be opened, so ppl_16bit and kl are null ({error}); name it with --original")
        return None
    if teacher.quantized:
        raise PhaseQuantError(f"the original '{teacher.name}' is quantized itself: name the 16-bit model (--original)")
    if teacher.map.fingerprint() != source.map.fingerprint():
        raise PhaseQuantError(
            f"the original '{teacher.name}' has another architecture or size than '{source.name}': "
            "name the model it was made from (--original)"
        )
    return teacher


def evaluate(
    model: Model | pipeline.Quantized,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | Path | None = None,
    chunks: int | None = None,
    seqlen: int = 2048,
    recipe: Recipe | str | Path | None = None,
    overrides: Iterable[str] = (),
    plan: PrecisionPlan | str | Path | None = None,
    original: Model | None = None,
    tasks: Iterable[str] = (),
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    batch: int = zero_shot.BATCH,
    device: str = "auto",
) -> dict[str, Any]:
    """Perplexity and KL to the 16-bit original on `text`, sizes, accuracy on zero-shot tasks; with 95 % intervals.

    - MODEL a PhaseQuant checkpoint or what `quantize` returned: it is measured; its original is the one it was made
      from, or `original`.
    - MODEL anything else: the 16-bit model; with `recipe`, `overrides` or `plan` a copy is quantized in memory first.

    `text` None: the built-in one, or none where there are `tasks`: names of lm-evaluation-harness, whose questions come
    from the Hub, or from NAME.jsonl in `tasks_dir` (see `evaluate.questions`); the first `limit` of each, `batch`
    requests at a time. Answers are kept, and a run that was stopped goes on from them.

    KL is in nats a token; bytes count dense numbers at 16 bits.
    """
    start = time.monotonic()
    overrides = list(overrides)
    quantizes = recipe is not None or bool(overrides) or plan is not None
    base = recipe if recipe is not None else ("quarot" if plan is not None else "16bit")
    wanted = as_recipe(base, overrides) if quantizes else None
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if names:
        zero_shot.check(names, tasks_dir, limit)
    corpus = None if text is None and names else texts.find(str(text or texts.BUILTIN), "evaluation")
    made = model if isinstance(model, pipeline.Quantized) else None
    if made is not None:
        source = Source("in memory", made.model, made.tokenizer, made.map, quantized=True)
    else:
        source = as_source(model, device, tokenizer)
    if source.quantized and quantizes:
        raise PhaseQuantError(f"'{source.name}' is quantized already: evaluate it as it is, or name its original")
    if original is not None and not source.quantized:
        raise PhaseQuantError(f"--original goes with a quantized MODEL, and '{source.name}' is not quantized")
    tokens = None if corpus is None else _chunks(corpus, source, seqlen, chunks)

    candidate: PreTrainedModel | None = None
    a8_share = 0.0
    teacher: Source | None = source
    if source.quantized:
        candidate = source.model
        if made is not None:
            a8_share, found_in = made.plan.a8_share, made.origin.get("source")
        else:
            folder = Path(source.name).expanduser()
            a8_share, found_in = read_plan(folder, source.map).a8_share, manifest.read(folder).get("source")
        teacher = _teacher(source, found_in, original, device)
    elif wanted is not None:
        run = pipeline.run(replace(source, model=copy.deepcopy(source.model)), wanted, as_plan(plan, source.map))
        a8_share, candidate = run.plan.a8_share, run.model
    scores: dict[str, Score] = {}
    full: Score | None = None
    if tokens is not None:
        scores, full = score({"model": candidate} if candidate else {}, tokens, teacher.model if teacher else None)
    ours = scores.get("model") if candidate else full and replace(full, kl=0.0)
    row = figures(candidate or source.model, source.map, ours, a8_share)
    asked = _asked(names, candidate, source, teacher, folder=tasks_dir, limit=limit, batch=batch)
    measured = {
        "model": source.name,
        **row,
        **_intervals(ours, full),
        "ppl_16bit": full.ppl if full else None,
        "weight_bytes_16bit": weight_bytes(teacher.model) if teacher else None,
        "kv_bytes_per_token_16bit": kv_bytes_per_token(teacher.model, teacher.map) if teacher else None,
        "chunks": 0 if tokens is None else len(tokens),
        "seqlen": seqlen,
        "text": corpus and corpus.source,
        "text_sha256": corpus and corpus.sha256,
        **asked,
        "kernels": kernels_used(candidate) if candidate else {},
        "seconds": round(time.monotonic() - start, 1),
    }
    if made is not None and corpus is not None:  # its manifest and model card tell it
        told = ("ppl", "ppl_16bit", "kl", "text", "text_sha256", "chunks", "seqlen")
        made.origin["evaluation"] = {key: measured[key] for key in told}
    return measured


def _intervals(ours: Score | None, full: Score | None) -> dict[str, Any]:
    """95 % intervals of perplexities, and of the difference of nll to the original's, paired by chunk."""
    told: dict[str, Any] = {"interval": None, "interval_16bit": None, "difference": None}
    if ours is not None and math.isfinite(ours.ppl):
        told["interval"] = perplexity_interval(ours.nll_by_chunk).to_dict()
    if full is not None and math.isfinite(full.ppl):
        told["interval_16bit"] = perplexity_interval(full.nll_by_chunk).to_dict()
    if told["interval"] and told["interval_16bit"] and ours is not None and full is not None:
        told["difference"] = compare_nll(ours.nll_by_chunk, full.nll_by_chunk)
    return {**told, "nll": ours and list(ours.nll_by_chunk), "nll_16bit": full and list(full.nll_by_chunk)}


def _asked(
    names: list[str],
    candidate: PreTrainedModel | None,
    source: Source,
    teacher: Source | None,
    **options: Any,
) -> dict[str, Any]:
    """Accuracies of the model, and of its original on the same questions."""
    if not names:
        return {"tasks": {}, "average": None, "average_16bit": None}

    def run(model: PreTrainedModel, of: Source, title: str) -> dict[str, zero_shot.TaskScore]:
        return zero_shot.run(
            model, of.tokenizer, names, name_of(model, versions()), prefix=prefix_tokens(model),
            prefix_length=prefix_length(model, of.map), title=title, **options,
        )  # fmt: skip

    full = None if teacher is None else run(teacher.model, teacher, "tasks, 16-bit")
    ours = full if candidate is None else run(candidate, source, "tasks")
    assert ours is not None
    return {
        "tasks": zero_shot.beside(ours, full),
        "average": zero_shot.average(ours),
        "average_16bit": zero_shot.average(full) if full is not None else None,
    }


def _chunks(corpus: texts.Corpus, source: Source, seqlen: int, most: int | None) -> Int[Tensor, "chunks T"]:
    """The text's chunks; say where they are fewer or longer than the model or the caller expects."""
    tokens = texts.cut(corpus, source.tokenizer, seqlen, most)
    if most is not None and len(tokens) < most:
        note(f"the text {corpus.source} holds {len(tokens)} chunks of {seqlen}: all are used")
    longest = getattr(source.model.config, "max_position_embeddings", None)
    if longest is not None and seqlen > longest:
        warn(f"chunks of {seqlen} tokens are longer than the {longest} that '{source.name}' was made for")
    return tokens
