"""What isolating spikes is worth: every recipe with and without a prefix and with and without left-out groups.

    python benchmarks/isolate/spikes.py --text wiki.test --calib wiki.train [--rows static …] [-o runs/isolate]

Rows are recipes with overrides, measured on SmolLM2 as `evaluate` measures: perplexity beside 16-bit, with how many
groups were left out, which tokens stand in the prefix, and QFeM's largest ratio and the blocks whose Jump Ratio and
Historical SNR exceed DynamicPTQ's thresholds, behind the prefix. Finished rows are kept in OUTPUT and not repeated;
`--list` prints the rows. About two minutes a row on one core at 4 chunks; rows of `flat` about eight.
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

from phasequant import pipeline
from phasequant import text as texts
from phasequant.evaluate import score
from phasequant.observe import sweep
from phasequant.plan import thresholds
from phasequant.recipe import Recipe
from phasequant.source import open_model

PREFIXES = {"": [], " + bos": ["prefix.method=bos"], " + qfep": ["prefix.method=qfep"],
            " + prefixquant": ["prefix.method=prefixquant"]}  # fmt: skip
QFEM = ["exclude.method=qfem"]
DYNAMIC = ["activations.scales=dynamic"]
A4 = ["activations.bits=4"]
W4 = ["weights.bits=4", "weights.clip=mse"]

ROWS: dict[str, tuple[str, list[str]]] = {}
for side in ("", "smooth-"):
    for name, sets in PREFIXES.items():
        for left, more in (("", []), (" + qfem", QFEM)):
            ROWS[f"{side}static W8A8{name}{left}"] = (f"{side}static-w8a8", [*sets, *more])
    for name in ("", " + qfep"):
        # the planner in QFeM's place: groups that read 16 bits by the noise their grid adds, at the same cost
        more = ["policy.name=budget", "policy.bits=16", "policy.a8_share=0.125"]
        ROWS[f"{side}static W8A8{name} + budget"] = (f"{side}static-w8a8", [*PREFIXES[name], *more])
        ROWS[f"{side}static W8A8{name} + budget by ratio"] = (
            f"{side}static-w8a8", [*PREFIXES[name], *more, "policy.score=ratio"]
        )  # fmt: skip
ROWS["os-plus static W8A8"] = ("os-plus-static-w8a8", [])
ROWS["os-plus static W8A8 + qfep"] = ("os-plus-static-w8a8", PREFIXES[" + qfep"])
for name in ("", " + qfep", " + prefixquant"):
    ROWS[f"dynamic per tensor W8A8{name}"] = ("static-w8a8", [*DYNAMIC, *PREFIXES[name]])
    ROWS[f"static per channel W8A8{name}"] = ("static-w8a8", ["activations.granularity=channel", *PREFIXES[name]])
    ROWS[f"static W4A8{name}"] = ("static-w8a8", [*W4, *PREFIXES[name]])
    ROWS[f"static W4A4{name}"] = ("static-w8a8", [*W4, *A4, *PREFIXES[name]])
    ROWS[f"quarot static W4A4{name}"] = ("static-w8a8", [*W4, *A4, "transform.method=quarot", *PREFIXES[name]])
    for how in ("percentile", "mse"):
        ROWS[f"static W8A8, {how}{name}"] = ("static-w8a8", [f"activations.calibrate={how}", *PREFIXES[name]])
for recipe in ("quarot", "quarot-online", "frtq", "wush", "flat-quick"):
    for name, sets in PREFIXES.items():
        ROWS[f"{recipe} W4A4KV4{name}"] = (recipe, sets)
        ROWS[f"{recipe} W4A4KV4{name}, paper set"] = (recipe, [*sets, "policy.name=paper"])
for name in ("", " + qfep"):
    for bits in (8, 16):
        ROWS[f"quarot W4A4KV4{name} + qfem {bits}"] = (
            "quarot", [*PREFIXES[name], *QFEM, f"exclude.bits={bits}", "exclude.most=0.125", "exclude.budget=0.0"]
        )  # fmt: skip


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", nargs="*", help="names, or beginnings of names")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/isolate"))
    given = parser.parse_args()
    rows = [n for n in ROWS if given.rows is None or any(n == r or n.startswith(r + "*") for r in given.rows)]
    rows = rows or [n for n in ROWS if any(n.startswith(r) for r in given.rows or ())]
    if given.list:
        print("\n".join(f"{name}: {ROWS[name][0]} {' '.join(ROWS[name][1])}" for name in rows))
        return
    given.output.mkdir(parents=True, exist_ok=True)
    for name in rows:
        path = given.output / f"{name.replace(' ', '-').replace(',', '')}.{given.chunks}.json"
        if not path.exists():
            path.write_text(json.dumps(measure(name, given), indent=1))
        print(line(name, json.loads(path.read_text())), flush=True)


def measure(name: str, given: argparse.Namespace) -> dict[str, object]:
    """One row."""
    preset, sets = ROWS[name]
    recipe = Recipe.load(preset, [f"calibration.text={json.dumps(given.calib)}", *sets])
    source = open_model(given.model)
    tokens = texts.cut(texts.find(given.text, "evaluation"), source.tokenizer, 2048, given.chunks)
    work = replace(source, model=copy.deepcopy(source.model))
    calibration, _ = pipeline.calibration_tokens(source, recipe)
    pipeline.give_prefix(work, recipe)
    seen = sweep(work.model, work.map, calibration, tokenizer=work.tokenizer)
    run = pipeline.run(work, recipe)
    scores, original = score({"it": run.model}, tokens, source.model)
    assert original is not None
    tau_jr, tau_snr = thresholds(recipe.policy, seen)
    jr, snr = seen.jump_ratio.without_first, seen.snr["4"].without_first
    return {
        "ppl": scores["it"].ppl, "kl": scores["it"].kl, "ppl_16bit": original.ppl, "a8_share": run.plan.a8_share,
        "prefix": work.prefix and work.prefix.to_dict(), "alpha": run.plan.alpha,
        "left_out": sorted(f"{b}.{g}" for (b, g), entry in run.plan.raised.items() if entry.why.startswith("QFeM")),
        "raised": len(run.plan.raised), "ratio": max(g.spike_ratio for g in seen.groups),
        "absmax": max(seen.residual.absmax), "jr": jr, "snr": snr,
        "jr_all": seen.jump_ratio.all_tokens, "snr_all": seen.snr["4"].all_tokens,
        "jumps": [b for b in work.map.blocks if jr[b] > tau_jr and snr[b] < tau_snr],
    }  # fmt: skip


def line(name: str, row: dict) -> str:
    """A row as a person reads it."""
    prefix = row["prefix"] and " ".join(map(repr, row["prefix"]["texts"]))
    return (
        f"{name:44} {row['ppl']:10.3f} (16-bit {row['ppl_16bit']:.3f}, × {row['ppl'] / row['ppl_16bit']:.3f})  "
        f"left out {len(row['left_out']):3}  A8 {100 * row['a8_share']:5.1f} %  ratio {row['ratio']:8.1f}  "
        f"max|h| {row['absmax']:8.0f}  jumps {row['jumps']}  prefix {prefix}"
    )


if __name__ == "__main__":
    main()
