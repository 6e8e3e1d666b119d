"""The Python API: what the command line does, in as few lines.

import phasequant

run = phasequant.quantize("demo", "quarot", overrides=["policy.name=budget"])
run.save("smollm2-w4a4kv4")
model = phasequant.load("smollm2-w4a4kv4")
print(phasequant.evaluate("smollm2-w4a4kv4", text="wiki.txt", chunks=4)["ppl"])
"""

import copy
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from phasequant import pipeline
from phasequant import text as texts
from phasequant.arch import ModelMap
from phasequant.checkpoint import check_target, manifest, new_folder, read_plan, versions
from phasequant.console import note, warn
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import Score, score, weight_bytes
from phasequant.nn import kv_bytes_per_token, quant_linears
from phasequant.observe import Observations
from phasequant.plan import POLICIES, PrecisionPlan, Seen, make_plan, thresholds
from phasequant.recipe import Recipe
from phasequant.report import write_page
from phasequant.source import Source, open_model
from phasequant.transform import Transform

REPORT = "report.json"


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


def as_source(model: str | Path | Source, device: str = "auto") -> Source:
    """MODEL: `demo`, a directory, a Hub id, a GGUF file, a checkpoint; or one that is open already."""
    return model if isinstance(model, Source) else open_model(model, device)


def quantize(
    model: str | Path | Source,
    recipe: Recipe | str | Path = "quarot",
    *,
    overrides: Iterable[str] = (),
    plan: PrecisionPlan | str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
) -> pipeline.Quantized:
    """Quantize MODEL by a recipe; save it where `output` is given. A `Source` is changed in place."""
    wanted = as_recipe(recipe, overrides)
    if output is not None:
        check_target(Path(output).expanduser(), manifest.NAME)
    source = as_source(model, device)
    result = pipeline.run(source, wanted, as_plan(plan, source.map))
    if output is not None:
        result.save(output)
    return result


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
        with new_folder(target, REPORT) as partial:
            recipe = Recipe.from_dict(self.report["recipe"])
            (partial / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            (partial / "plan.json").write_text(self.plan.to_json(), encoding="utf-8")
            write_page(self.report, partial)
        return target / "report.html"


def plans_of(recipe: Recipe, model_map: ModelMap, seen: Seen) -> dict[str, PrecisionPlan]:
    """The plan of every policy under one recipe."""
    return {name: make_plan(recipe.with_(f"policy.name={name}"), model_map, seen) for name in POLICIES}


def describe(
    source: Source, recipe: Recipe, transform: Transform, observations: list[Observations], calibration: Any
) -> dict[str, Any]:
    """The parts of a report that a run's observations give."""
    raw, transformed = observations
    policy = recipe.policy
    seen = Seen(*observations)
    tau_jr, tau_snr = thresholds(policy, seen.at(policy.coordinates))
    return {
        "versions": versions(),
        "model": {"name": source.name, **source.map.describe()},
        "recipe": recipe.to_dict(),
        "calibration": calibration,
        "transform": transform.describe(source.map),
        "thresholds": {
            "jr": tau_jr,
            "snr": tau_snr,
            "coordinates": policy.coordinates,
            "first_token": policy.first_token,
            "given": policy.tau_jr is not None and policy.tau_snr is not None,
        },
        "observations": {"raw": raw.to_dict(), "transformed": transformed.to_dict()},
    }


def analyze(
    model: str | Path | Source,
    recipe: Recipe | str | Path = "quarot",
    *,
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
    device: str = "auto",
) -> Analysis:
    """Observe MODEL before and after the recipe's transform and plan its bits; no weight is quantized.

    A recipe without a policy is given `budget`. A `Source` is transformed in place.
    """
    start = time.monotonic()
    wanted = as_recipe(recipe, overrides)
    if wanted.activations.bits == 16:
        raise PhaseQuantError("analyze plans which activations stay low: set activations.bits below 16")
    if wanted.policy.name == "uniform":
        wanted = wanted.with_("policy.name=budget")
    if output is not None:
        check_target(Path(output).expanduser(), REPORT)
    source = as_source(model, device)
    made = pipeline.observe_and_transform(source, wanted, raw=True, transformed=True, noise=True)
    plans = plans_of(wanted, source.map, Seen(*made.observations))
    plan = plans[wanted.policy.name]
    report = {
        **describe(source, wanted, made.transform, made.observations, made.calibration),
        "plan": plan.to_dict(),
        "plans": {name: p.to_dict() for name, p in plans.items()},
        "results": [],
        "evaluation": None,
        "seconds": round(time.monotonic() - start, 1),
    }
    analysis = Analysis(report, plan, plans, made.observations)
    if output is not None:
        analysis.save(output)
    return analysis


def kernels_used(model: PreTrainedModel) -> dict[str, int]:
    """How many linears each kernel runs."""
    device = next(model.parameters()).device
    return dict(Counter(module.kernel(device).name for _, module in quant_linears(model)))


def figures(model: PreTrainedModel, model_map: ModelMap, found: Score, a8_share: float) -> dict[str, Any]:
    """One candidate's row: accuracy and size."""
    return {
        "ppl": found.ppl,
        "kl": found.kl,
        "a8_share": a8_share,
        "weight_bytes": weight_bytes(model),
        "kv_bytes_per_token": kv_bytes_per_token(model, model_map),
    }


def _original_of(source: Source, original: str | Path | Source | None, device: str) -> Source | None:
    name = original
    if name is None:
        name = manifest.read(Path(source.name).expanduser()).get("source")
    if name is None:
        return None
    try:
        return as_source(name, device)
    except PhaseQuantError as error:
        if original is not None:
            raise
        warn(f"the 16-bit original cannot be opened, so ppl_16bit and kl are null ({error}); name it with --original")
        return None


def evaluate(
    model: str | Path | Source,
    *,
    text: str | Path = texts.BUILTIN,
    chunks: int | None = None,
    seqlen: int = 2048,
    recipe: Recipe | str | Path | None = None,
    overrides: Iterable[str] = (),
    plan: PrecisionPlan | str | Path | None = None,
    original: str | Path | Source | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Perplexity and KL to the 16-bit original on `text`, with sizes.

    - MODEL a PhaseQuant checkpoint: it is measured; its original is the one its manifest names, or `original`.
    - MODEL anything else: the 16-bit model; with `recipe`, `overrides` or `plan` it is quantized in memory first.

    KL is in nats a token; bytes count dense numbers at 16 bits.
    """
    start = time.monotonic()
    overrides = list(overrides)
    quantizes = recipe is not None or bool(overrides) or plan is not None
    base = recipe if recipe is not None else ("quarot" if plan is not None else "16bit")
    wanted = as_recipe(base, overrides) if quantizes else None
    corpus = texts.find(str(text), "evaluation")
    source = as_source(model, device)
    if source.quantized and quantizes:
        raise PhaseQuantError(f"'{source.name}' is quantized already: evaluate it as it is, or name its original")
    tokens = texts.cut(corpus, source.tokenizer, seqlen, chunks)
    if chunks is not None and len(tokens) < chunks:
        note(f"the text {corpus.source} holds {len(tokens)} chunks of {seqlen}: all are used")

    if source.quantized:
        teacher = _original_of(source, original, device)
        a8_share = read_plan(Path(source.name).expanduser(), source.map).a8_share
        candidate: PreTrainedModel | None = source.model
    elif wanted is not None:
        teacher = source
        run = pipeline.run(replace(source, model=copy.deepcopy(source.model)), wanted, as_plan(plan, source.map))
        a8_share, candidate = run.plan.a8_share, run.model
    else:
        teacher, candidate, a8_share = source, None, 0.0
    scores, teacher_score = score({"model": candidate} if candidate else {}, tokens, teacher.model if teacher else None)
    if candidate is None:
        assert teacher_score is not None
        row = figures(source.model, source.map, replace(teacher_score, kl=0.0), 0.0)
    else:
        row = figures(candidate, source.map, scores["model"], a8_share)
    return {
        "model": source.name,
        **row,
        "ppl_16bit": teacher_score.ppl if teacher_score else None,
        "weight_bytes_16bit": weight_bytes(teacher.model) if teacher else None,
        "kv_bytes_per_token_16bit": kv_bytes_per_token(teacher.model, teacher.map) if teacher else None,
        "chunks": len(tokens),
        "seqlen": seqlen,
        "text": corpus.source,
        "text_sha256": corpus.sha256,
        "kernels": kernels_used(candidate) if candidate else {},
        "seconds": round(time.monotonic() - start, 1),
    }


@torch.no_grad()
def chat(model: str | Path | Source, prompt: str, *, max_new_tokens: int = 64, device: str = "auto") -> str:
    """Greedy answer to one prompt, through the model's chat template where it has one."""
    if not prompt.strip():
        raise PhaseQuantError("the prompt is empty: write something to answer")
    source = as_source(model, device)
    tokenizer = source.tokenizer
    content = prompt
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        content = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(content, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    inputs = {key: value.to(source.device) for key, value in inputs.items() if key != "token_type_ids"}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = source.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
