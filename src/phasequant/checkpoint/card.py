"""The model card (`README.md`) of a checkpoint, from the run's own figures and nothing else.

Front matter for the Hub: the source and its licence where they are known (a Hub id, the demo model, a directory whose
own card tells), and nothing where they are not. Perplexity stands in it where the run measured one before saving
(`phasequant.evaluate(run)`). No path of the machine that made it is told.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.evaluate.size import weight_bytes
from phasequant.nn import kv_bytes_per_token
from phasequant.numerics import QuantSpec
from phasequant.plan import PrecisionPlan
from phasequant.recipe import Recipe

DEMO = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
TOLD = ("license", "license_name", "license_link", "language")


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a card; empty where there is no card, or none that can be read."""
    try:
        found = FRONT.match(card.read_text(encoding="utf-8"))
        values = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def known_of(source: str) -> dict[str, Any]:
    """`base_model`, `license` and the like of a source, as far as they are known here."""
    if source == "demo":
        return dict(DEMO)
    path = Path(source).expanduser()
    if path.exists():
        told = front_matter((path if path.is_dir() else path.parent) / "README.md")
        return {key: told[key] for key in TOLD if key in told}
    return {"base_model": source} if HUB_ID.fullmatch(source) else {}


def short_name(plan: PrecisionPlan) -> str:
    """The bits in one word, as in W4A4KV4."""

    def bits(spec: QuantSpec | None) -> int:
        return 16 if spec is None else spec.bits

    return f"W{bits(plan.weights)}A{bits(plan.low)}KV{bits(plan.kv)}"


def _said(spec: QuantSpec | None) -> str:
    return "16-bit" if spec is None else str(spec)


def _figures(model: PreTrainedModel, plan: PrecisionPlan, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    model_map = ModelMap.from_config(model.config)
    rows = [
        ("weights", _said(plan.weights)),
        ("activations", _said(plan.low)),
        ("KV cache", _said(plan.kv)),
        (
            "multiply-adds that read 8-bit activations",
            f"{100 * plan.a8_share:.1f} % ({len(plan.raised)} groups raised)",
        ),
        ("plan", plan.policy),
        ("weights in all", f"{weight_bytes(model) / 2**20:.1f} MiB"),
        ("KV a token", f"{kv_bytes_per_token(model, model_map):,} bytes"),
    ]
    if plan.weights_raised or plan.kv_raised:
        rows.append(("more bits", f"weights of {len(plan.weights_raised)} groups, KV of {len(plan.kv_raised)} blocks"))
    if content.get("prefix"):
        rows.append(("prefix", f"{len(content['prefix']['tokens'])} tokens with 16-bit keys and values"))
    seen = content.get("evaluation")
    if seen:
        text = f"{seen['chunks']} chunks of {seen['seqlen']} tokens, {Path(str(seen['text'])).name}"
        rows.append((f"perplexity ({text})", f"{seen['ppl']:.3f}"))
        if seen.get("ppl_16bit") is not None:
            rows.append(("perplexity of the 16-bit model there", f"{seen['ppl_16bit']:.3f}"))
    return rows


def model_card(model: PreTrainedModel, recipe: Recipe, plan: PrecisionPlan, content: Mapping[str, Any]) -> str:
    """The card's text; `content` is what the manifest says."""
    source = str(content.get("source") or "a model")
    word = short_name(plan)
    known = known_of(source)
    base = known.get("base_model")
    front = {
        **known,
        **({"base_model_relation": "quantized"} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["phasequant", "quantized", word.lower()],
    }
    name = base or Path(source).name
    table = "\n".join(f"| {key} | {value} |" for key, value in _figures(model, plan, content))
    versions = ", ".join(f"{library} {content['versions'][library]}" for library in ("phasequant", "transformers"))
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---

# {name} at {word}

{name}, quantized by PhaseQuant with transform `{recipe.transform.method}` and weights by `{recipe.weights.method}`.
`recipe.yaml` is the whole recipe, `plan.json` which group reads which bits and why, `manifest.json` what made it, with
the hash of every file.

| | |
|---|---|
{table}

## Load

`pip install phasequant`, then, with `.` for this folder or its id on the Hub:

```python
import phasequant
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

The first line matters: it makes Transformers know the format, which it else refuses with an error of mismatched sizes.
`trust_remote_code=True` does the same without it. `phasequant.load(folder)` compares every file with the manifest.

## Serve

```
phasequant serve .
```

Made with {versions}.
"""
