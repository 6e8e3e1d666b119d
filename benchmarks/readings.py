"""What each part of W4A4KV4 costs SmolLM2, alone and together, un-rotated and under QuaRot, beside a prototype.

    python benchmarks/readings.py --text wiki.test --calib wiki.train [--chunks 4] [-o readings.md]

One pass: a model is transformed and quantized once for every (transform, weights), and each row only changes the grids
that are read. The prototype's figures are those of an independent throwaway implementation on the same model, text and
chunks (residual rotation only, another seed); it is there to be checked against, not to be matched to the digit. About
12 minutes on 2 cores.
"""

import argparse
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

from phasequant import pipeline
from phasequant import text as texts
from phasequant.evaluate import score
from phasequant.nn import quant_linears
from phasequant.numerics import QuantSpec
from phasequant.plan import PrecisionPlan, Seen, make_plan
from phasequant.recipe import Recipe
from phasequant.source import open_model

A = {bits: QuantSpec(bits) for bits in (4, 5, 6, 8)}
OFF = ["weights.bits=16", "activations.bits=16", "kv.bits=16"]


def activation_rows(rotated: bool) -> dict[str, tuple[QuantSpec | None, str]]:
    """Row → (grid of every input, the prototype's reading)."""
    if not rotated:
        return {
            "16-bit": (None, "24.15"),
            "W16A8": (A[8], "24.93"),
            "W16A6": (A[6], "37.6"),
            "W16A5": (A[5], "197"),
            "W16A4": (A[4], "6995"),
        }
    clips = {0.9: "43.3", 0.85: "40.8", 0.8: "37.5", 0.75: "37.3"}
    return {
        "16-bit": (None, "24.18"),
        "W16A8": (A[8], "24.18"),
        "W16A6": (A[6], "24.8"),
        "W16A5": (A[5], "27.2"),
        "W16A4": (A[4], "46.7"),
        **{f"W16A4 clip {c}": (QuantSpec(4, clip=c), reading) for c, reading in clips.items()},
    }


def main() -> None:
    """Measure and print one table a transform."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    source = open_model("demo")
    corpus = texts.find(options.text, "evaluation")
    chunks = texts.cut(corpus, source.tokenizer, 2048, options.chunks)
    lines = [f"SmolLM2-135M-Instruct, first {len(chunks)} chunks of 2048 tokens, sha256 {corpus.sha256[:12]}", ""]

    def build(recipe: Recipe, seen: bool = False) -> pipeline.Quantized:
        work = replace(source, model=copy.deepcopy(source.model))
        made = pipeline.observe_and_transform(work, recipe, raw=False, transformed=seen, noise=seen)
        return pipeline.finish(made, make_plan(recipe, source.map, None))

    def measure(title: str, rows: dict[str, tuple[object, str]]) -> None:
        scores, _ = score({name: candidate for name, (candidate, _) in rows.items()}, chunks)
        for name, (_, reading) in rows.items():
            lines.append(f"| {title} | {name} | {scores[name].ppl:.2f} | {reading} |")
            print(lines[-1], flush=True)

    lines += ["| transform | grids | perplexity | prototype |", "|---|---|---|---|"]
    for name, weights in (("none", ("56.1", "61.5", "27.7", "21,008")), ("quarot", ("148", "55.9", "25.5", "190"))):
        method = f"transform.method={name}"
        plain = build(Recipe.load("quarot", [*OFF, method]))
        assert len(quant_linears(plain.model)) == 210

        def with_input(run: pipeline.Quantized, spec: QuantSpec | None) -> partial:
            return partial(run.reading, PrecisionPlan("row", source.map, low=spec))

        rows = activation_rows(name == "quarot")
        measure(name, {row: (with_input(plain, spec), reading) for row, (spec, reading) in rows.items()})
        kv = build(Recipe.load("quarot", [*OFF, method, "kv.bits=4"]))
        measure(name, {"KV4": (kv.model, weights[2])})
        rtn = build(Recipe.load("quarot", [*OFF, method, "weights.bits=4", "weights.clip=none"]))
        measure(name, {"W4A16 RTN, no clip search": (rtn.model, weights[0])})
        w4 = build(Recipe.load("quarot", [*OFF, method, "weights.bits=4"]))
        measure(name, {"W4A16 RTN": (w4.model, weights[1])})
        recipe = Recipe.load("quarot", [method, f"calibration.text={options.calib}"])
        full = build(recipe, seen=name == "quarot")
        together: dict[str, tuple[object, str]] = {
            "W4A4KV4 RTN, clip 1.0": (with_input(full, A[4]), weights[3]),
            "W4A4KV4 RTN, clip 0.9": (full.model, "–"),
            "W4A8KV4 RTN": (with_input(full, A[8]), "–"),
        }
        if name == "quarot":
            seen = Seen(*full.observations)
            for policy in ("paper", "threshold", "budget"):
                share = {"a8_share": 4 / 30} if policy == "budget" else {}
                plan = make_plan(recipe.with_(f"policy.name={policy}", policy=share), source.map, seen)
                label = f"W4A4KV4 RTN, clip 0.9, {policy} ({100 * plan.a8_share:.1f} % A8)"
                together[label] = (partial(full.reading, plan), "–")
        measure(name, together)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
