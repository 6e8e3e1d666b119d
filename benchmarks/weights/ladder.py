"""What each ingredient of the weight side is worth: one row an ingredient, each read on several activation grids.

    python benchmarks/weights/ladder.py --text wiki.test --calib wiki.train [--rows gptq tsvd …] [-o runs/ladder]

Every row quantizes a copy of SmolLM2 (QuaRot's rotations unless the row says otherwise) and reads it with 16-bit
activations and KV (W4A16), with A8KV4, and with A4 at clip 0.9, KV in 16 and in 4 bits. Rows whose Hessian is made of
rounded inputs see A4 at clip 0.9 and KV4; FP4 rows have FP4 and FP8 in place of A4 and A8. Calibration: `--sequences` ×
2048 tokens. Finished rows are kept in OUTPUT and not repeated; `--list` prints the rows. About 10 minutes a row on one
core at 16 sequences.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from phasequant import pipeline
from phasequant import text as texts
from phasequant.evaluate import score, weight_bytes
from phasequant.nn import kv_in_16_bits, quant_linears
from phasequant.numerics import QuantSpec
from phasequant.recipe import Recipe
from phasequant.source import open_model

GRIDS = {
    "W4A16": (None, False),
    "W4A8KV4": (QuantSpec(8), True),
    "W4A4": (QuantSpec(4, clip=0.9), False),
    "W4A4KV4": (QuantSpec(4, clip=0.9), True),
}
GPTQ = ["weights.method=gptq"]
PLAIN = [*GPTQ, "weights.rounds=0", "weights.target=weights"]
ROUNDED = [*GPTQ, "weights.hessian=rounded"]
GROUP = [*GPTQ, "weights.granularity=group"]
BLIND = ["lowrank.weighting=none"]
ROWS: dict[str, tuple[str, list[str]]] = {
    "rtn": ("quarot", []),
    "gptq, plain": ("quarot", PLAIN),
    "gptq, plain, natural order": ("quarot", [*PLAIN, "weights.order=natural"]),
    "gptq, plain, no clip search": ("quarot", [*PLAIN, "weights.clip=none"]),
    "gptq, plain, rounded": ("quarot", [*PLAIN, "weights.hessian=rounded"]),
    "gptq, plain, mixed": ("quarot", [*PLAIN, "weights.hessian=mixed"]),
    "gptq, plain + rounds": ("quarot", [*GPTQ, "weights.target=weights"]),
    "gptq, plain + outputs": ("quarot", [*GPTQ, "weights.rounds=0"]),
    "gptq": ("quarot", GPTQ),
    "gptq, 8 rounds": ("quarot", [*GPTQ, "weights.rounds=8"]),
    "gptq, one pass a block": ("quarot", [*GPTQ, "weights.sequential=false"]),
    "gptq, damping 0.001": ("quarot", [*GPTQ, "weights.damping=0.001"]),
    "gptq, damping 0.1": ("quarot", [*GPTQ, "weights.damping=0.1"]),
    "gptq, rounded": ("quarot", ROUNDED),
    "gptq, mixed": ("quarot", [*GPTQ, "weights.hessian=mixed"]),
    "gptq, asymmetric": ("quarot", [*GPTQ, "weights.symmetric=false"]),
    "gptq, group 64": ("quarot", [*GROUP, "weights.group_size=64"]),
    "gptq, group 32": ("quarot", [*GROUP, "weights.group_size=32"]),
    **{
        f"{method} {rank} + {codes}": ("quarot", [*sets, f"lowrank.method={method}", f"lowrank.rank={rank}"])
        for rank in (32, 64)
        for codes, sets in {"gptq": GPTQ, "rtn": [], "rtn, blind": BLIND}.items()
        for method in ("svd", "loftq", "tsvd")
    },
    "tsvd 32 + gptq, branch reads rounded": (
        "quarot",
        [*GPTQ, "lowrank.method=tsvd", "lowrank.rank=32", "lowrank.input=rounded"],
    ),
    "none: gptq": ("rtn", GPTQ),
    "smooth 0.25: gptq": ("smooth", [*GPTQ, "transform.alpha=0.25"]),
    "online: rtn": ("quarot-online", []),
    "online: gptq": ("quarot-online", GPTQ),
    "wush: rtn": ("wush", []),
    "wush: gptq": ("wush", GPTQ),
    "nvfp4": ("nvfp4", []),
    "mxfp4": ("mxfp4", []),
}


@contextmanager
def reading(run: pipeline.Quantized, grid: QuantSpec | None, kv: bool) -> Iterator[object]:
    """The quantized model with other activation grids."""
    kept = [(linear, linear.input_spec) for _, linear in quant_linears(run.model)]
    for linear, _ in kept:
        linear.input_spec = grid
    with nullcontext() if kv else kv_in_16_bits(run.model):
        yield run.model
    for linear, spec in kept:
        linear.input_spec = spec


def main() -> None:
    """Measure the rows that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/ladder"))
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name}: {recipe} {' '.join(sets)}" for name, (recipe, sets) in ROWS.items()))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    source = open_model("demo")
    corpus = texts.find(options.text, "evaluation")
    chunks = texts.cut(corpus, source.tokenizer, 2048, options.chunks)

    def path(name: str) -> Path:
        key = "".join(c if c.isalnum() else "-" for c in name)
        return options.output / f"{key}.{options.sequences}.{options.chunks}.json"

    for name in options.rows:
        if path(name).exists():
            continue
        recipe, sets = ROWS[name]
        overrides = [
            *(
                f"calibration.text={options.calib}",
                f"weights.sequences={options.sequences}",
                "learning.sequences=16",
                "learning.seqlen=512",
            ),
            *sets,
        ]
        wanted = Recipe.load(recipe, overrides)
        run = pipeline.run(replace(source, model=copy.deepcopy(source.model)), wanted)
        grids = GRIDS if wanted.weights.hessian == "full" else {k: v for k, v in GRIDS.items() if "A4" in k}
        if wanted.activations.format != "int":
            own = {"W4A8KV4": "fp8", "W4A4": wanted.activations.format, "W4A4KV4": wanted.activations.format}
            grids = {g: (QuantSpec.floating(own[g]) if g in own else spec, kv) for g, (spec, kv) in grids.items()}
        scores, _ = score({g: partial(reading, run, *grids[g]) for g in grids}, chunks)
        told = run.origin["weights"]
        errors = [entry["error"] for entry in told["groups"] if entry["error"] is not None]
        row = {
            **{g: scores[g].ppl for g in grids},
            "error": fmean(errors) if errors else None,
            "seconds": told["seconds"],
            "peak_bytes": told["peak_bytes"],
            "weight_bytes": weight_bytes(run.model),
        }
        path(name).write_text(json.dumps(row))
    print(f"SmolLM2-135M-Instruct, {len(chunks)} chunks, {options.sequences} x 2048 tokens of calibration\n")
    print("| weights | " + " | ".join(GRIDS) + " | output error | s | MiB |\n|" + "---|" * (len(GRIDS) + 4))
    for name in options.rows:
        row = json.loads(path(name).read_text())
        cells = [f"{row[g]:.2f}" if g in row else "–" for g in GRIDS]
        error = "–" if row["error"] is None else f"{row['error']:.4f}"
        print(f"| {name} | {' | '.join(cells)} | {error} | {row['seconds']:.0f} | {row['weight_bytes'] / 2**20:.1f} |")


if __name__ == "__main__":
    main()
