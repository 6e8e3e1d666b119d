"""The Python API: what the command line does, in as few lines.

import phasequant

run = phasequant.quantize("demo", "quarot", overrides=["policy.name=budget"])
run.save("smollm2-w4a4kv4")
model = phasequant.load("smollm2-w4a4kv4")
print(phasequant.evaluate("smollm2-w4a4kv4", text="wiki.txt", chunks=4)["ppl"])
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from phasequant import pipeline
from phasequant import text as texts
from phasequant.arch import ModelMap
from phasequant.bench import time_linears
from phasequant.checkpoint import check_target, manifest, new_folder, read_plan, versions
from phasequant.console import note, warn
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import Score, score, weight_bytes
from phasequant.evaluate import tasks as zero_shot
from phasequant.evaluate.answers import name_of
from phasequant.evaluate.statistics import compare_nll, perplexity_interval
from phasequant.nn import kv_bytes_per_token, prefix_length, prefix_tokens, quant_linears
from phasequant.numerics import QuantSpec
from phasequant.observe import Observations
from phasequant.plan import POLICIES, PrecisionPlan, Seen, make_plan, thresholds
from phasequant.plan.prices import NOISE
from phasequant.predict import Prediction
from phasequant.predict import predict as predict_run
from phasequant.ranks import leads, wait
from phasequant.recipe import Recipe
from phasequant.report import is_report, what_runs, write_page
from phasequant.source import Source, open_model, open_streamed, wrap
from phasequant.streaming import Work, should_stream
from phasequant.streaming.opening import NotStreamable
from phasequant.transform import Transform


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


@dataclass
class Analysis:
    """What `analyze` found. `report` is what report.json holds."""

    report: dict[str, Any]
    plan: PrecisionPlan
    plans: dict[str, PrecisionPlan]
    observations: list[Observations]

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.html, plan.json and recipe.yaml; the page's path."""
        target = Path(folder).expanduser()
        with new_folder(target, is_report) as partial:
            recipe = Recipe.from_dict(self.report["recipe"])
            (partial / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            (partial / "plan.json").write_text(self.plan.to_json(), encoding="utf-8")
            write_page(self.report, partial)
        return target / "report.html"


def plans_of(recipe: Recipe, model_map: ModelMap, seen: Seen) -> dict[str, PrecisionPlan]:
    """The plan of every policy under one recipe."""
    return {name: make_plan(recipe.with_(f"policy.name={name}"), model_map, seen) for name in POLICIES}


def describe(
    source: Source,
    recipe: Recipe,
    transform: Transform,
    observations: list[Observations],
    calibration: Any,
    cost: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The parts of a report that a run's observations give."""
    raw, *isolated, transformed = observations
    policy = recipe.policy
    seen = Seen(*observations)
    tau_jr, tau_snr = thresholds(policy, seen.at(policy.coordinates))
    return {
        "versions": versions(),
        "model": {"name": source.name, **source.map.describe()},
        "recipe": recipe.to_dict(),
        "calibration": calibration,
        "transform": transform.describe(source.map, recipe.kv.bits < 16),
        "learning": cost,
        "thresholds": {
            "jr": tau_jr,
            "snr": tau_snr,
            "coordinates": policy.coordinates,
            "first_token": policy.first_token,
            "given": policy.tau_jr is not None and policy.tau_snr is not None,
        },
        "prefix": source.prefix and source.prefix.to_dict(),
        "observations": {
            "raw": raw.to_dict(),
            **({"isolated": isolated[0].to_dict()} if isolated else {}),
            "transformed": transformed.to_dict(),
        },
    }


def analyze(
    model: Model,
    recipe: Recipe | str | Path = "quarot",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
    device: str = "auto",
) -> Analysis:
    """Observe MODEL before and after the recipe's transform and plan its bits; no weight is quantized.

    A recipe without a policy is given `budget`. A `Source` or Transformers model is transformed in place.
    """
    start = time.monotonic()
    wanted = as_recipe(recipe, overrides)
    if wanted.activations.bits == 16:
        raise PhaseQuantError("analyze plans which activations stay low: set activations.bits below 16")
    if wanted.policy.name == "uniform":
        wanted = wanted.with_("policy.name=budget")
    if output is not None:
        check_target(Path(output), is_report)
    source = as_source(model, device, tokenizer, stream=True)
    made = pipeline.observe_and_transform(source, wanted, raw=True, transformed=True, noise=True)
    seen = pipeline.seen_of(made, wanted.with_("policy.name=budget"))
    assert seen is not None
    plans = plans_of(wanted, source.map, seen)
    plan = plans[wanted.policy.name] = pipeline.planned(made, wanted, seen)
    report = {
        **describe(source, wanted, made.transform, made.observations, made.calibration, made.cost),
        "plan": plan.to_dict(),
        "plans": {name: p.to_dict() for name, p in plans.items()},
        "sensitivity": seen.sensitivity and seen.sensitivity.to_dict(),
        "runs": what_runs(source.map, plan, source.compute, source.model.dtype),
        "results": [],
        "evaluation": None,
        "seconds": round(time.monotonic() - start, 1),
    }
    analysis = Analysis(report, plan, plans, made.observations)
    if output is not None and leads():
        analysis.save(output)
    return analysis


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


@torch.no_grad()
def chat(
    model: Model,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stream: bool = False,
    device: str = "auto",
) -> str:
    """Greedy answer to one prompt, through the model's chat template where it has one; `stream` also prints it as it
    comes."""
    if not prompt.strip():
        raise PhaseQuantError("the prompt is empty: write something to answer")
    source = as_source(model, device, tokenizer)
    words = source.tokenizer
    content = prompt
    if words.chat_template:
        messages = [{"role": "user", "content": prompt}]
        content = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = words(content, return_tensors="pt", add_special_tokens=not words.chat_template)
    inputs = {key: value.to(source.device) for key, value in inputs.items() if key != "token_type_ids"}
    first = inputs["input_ids"][0, 0]
    if (
        int(first) == words.bos_token_id
        and int(first) in prefix_tokens(source.model)
        and inputs["input_ids"].shape[1] > 1
    ):
        inputs = {key: value[:, 1:] for key, value in inputs.items()}  # the prefix has begun the text already
    pad = words.pad_token_id if words.pad_token_id is not None else words.eos_token_id
    printer = TextStreamer(words, skip_prompt=True, skip_special_tokens=True) if stream else None
    output = source.model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, streamer=printer
    )
    return words.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def bench_linears(
    model: Model,
    recipe: Recipe | str | Path = "quarot",
    *,
    overrides: Iterable[str] = (),
    tokens: int = 2048,
    bits: Iterable[int] = (4, 8, 16),
    device: str = "auto",
) -> dict[str, Any]:
    """Microseconds of every group's linears on this device, by the bits of their input; and what to make of them."""
    source = as_source(model, device)
    wanted = as_recipe(recipe, overrides)
    low = wanted.activations.spec() or QuantSpec()
    widths = sorted(set(bits))
    wrong = [width for width in widths if width != 16 and not 2 <= width <= 8]
    if wrong or not widths:
        raise PhaseQuantError(f"inputs have 2 to 8 bits, or 16: not {wrong[0] if wrong else 'none'}")
    if not low.is_int:
        raise PhaseQuantError(f"inputs of {low.kind} have no other number of bits: bench an integer recipe")
    grids = [None if width == 16 else replace(low.dynamic, bits=width, clip=1.0) for width in widths]
    found = time_linears(source.map, wanted.weights.spec(), grids, source.compute, tokens)
    by_bits = {width: sum(one.microseconds for one in found if one.bits == width) for width in widths}
    says = "; ".join(f"a block's linears at {width} bits: {total:,.0f} µs" for width, total in by_bits.items())
    if {4, 8} <= set(widths) and by_bits[8] <= (1 + NOISE) * by_bits[4]:
        says += ". 8-bit inputs cost nothing over 4-bit ones on this device: W4A8 is free here (activations.bits=8)"
    return {
        "model": source.name,
        "device": str(source.compute),
        "tokens": tokens,
        "linears": [one.to_dict() for one in found],
        "says": says,
        "versions": versions(),
    }
