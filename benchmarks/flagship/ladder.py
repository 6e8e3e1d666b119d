"""The ladder to the presets `phasequant` and `phasequant-fold`: one ingredient a row, each on top of those before.

    python benchmarks/flagship/ladder.py --text wiki.test --calib wiki.train --ladder flat [-o runs/ladder]

Ladders: `flat` (FlatQuant from WUSH's closed form), `wush` (the closed form alone: minutes on a CPU), `fold` (nothing
online but R3 and R4). Every row is quantized anew and measured on the text: perplexity, KL, each chunk's loss. Rows are
kept in OUTPUT, so that an interrupted run goes on; `--set` changes all rows, `--ingredients` takes others, `--last`
runs the last row alone.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import phasequant
from phasequant import text as texts
from phasequant.evaluate import score
from phasequant.presets import override, resolve
from phasequant.recipe import Recipe
from phasequant.source import open_model

STARTS = {
    "flat": {"compose": ["w4", "a4", "kv4", "learned-clips"], "transform": {"method": "flat"},
             "learning": {"start": "wush"}},
    "wush": {"compose": ["w4", "a4", "kv4"], "transform": {"method": "wush"}, "learning": {"sequences": 32}},
    "fold": {"compose": ["w4", "a4", "kv4"], "transform": {"method": "quarot"}, "rotation": {"heads": "apart"}},
}  # fmt: skip
BUDGET = ["policy.name=budget", "policy.score=gradient", "policy.a8_share=0.125"]
INGREDIENTS = {
    "clips": ["activations.clip=searched"],
    "prefix": ["prefix.method=prefixquant"],
    "gptq": ["weights.method=gptq", "weights.sequences=16"],
    "plan": BUDGET,
    "branch": ["lowrank.method=loftq", "lowrank.rank=32"],
    "blocks": ["finetune.epochs=2"],
    "distill": ["finetune.steps=100"],
    "rows": ["activations.token_policy=absmax", "activations.token_share=0.05"],
}
LADDERS = {
    "flat": ["prefix", "gptq", "plan", "branch", "distill", "rows"],
    "wush": ["clips", "prefix", "gptq", "plan", "branch", "distill", "rows"],
    "fold": ["clips", "prefix", "gptq", "plan", "distill", "rows"],
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--ladder", choices=LADDERS, default="wush")
    parser.add_argument("--ingredients", nargs="+", help="others than the ladder's own, in this order")
    parser.add_argument("--last", action="store_true", help="the last row alone")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/ladder"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    original = open_model(given.model)
    chunks = texts.cut(texts.find(given.text, "evaluation"), original.tokenizer, 2048, given.chunks)
    names = given.ingredients or LADDERS[given.ladder]
    steps = [names[:n] for n in range(len(names) + 1)]
    for taken in steps[-1:] if given.last else steps:
        sets = [s for name in taken for s in INGREDIENTS[name]]
        recipe = start(given.ladder, [f"calibration.text={json.dumps(given.calib)}", *sets, *given.sets])
        key = json.dumps([recipe.to_dict(), given.chunks, given.model, given.text], sort_keys=True)
        path = given.output / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            begun = time.monotonic()
            run = phasequant.quantize(given.model, recipe)
            seconds = time.monotonic() - begun
            scores, exact = score({"it": run.model}, chunks, original.model)
            found = scores["it"]
            assert exact is not None
            row = {
                "ladder": given.ladder, "ingredients": taken, "sets": given.sets, "seconds": seconds,
                "ppl": found.ppl, "kl": found.kl, "ppl_16bit": exact.ppl, "row_share": found.rows,
                "a8_share": run.plan.a8_share, "nll": found.nll_by_chunk, "finetune": run.origin["finetune"],
            }  # fmt: skip
            path.write_text(json.dumps(row, indent=1))
        row = json.loads(path.read_text())
        label = f"{given.ladder} {' + '.join(['', *taken])}"
        times = f"{row['ppl'] / row['ppl_16bit']:.3f} ×"
        share = f"A8 {100 * row['a8_share']:4.1f} %"
        print(f"{label:70} ppl {row['ppl']:8.3f} ({times})   KL {row['kl']:.4f}   {share}   {row['seconds']:5.0f} s",
              flush=True)  # fmt: skip


def start(ladder: str, sets: list[str]) -> Recipe:
    """The ladder's first row, changed by `sets`."""
    values = resolve(dict(STARTS[ladder]))
    for text in sets:
        override(values, text)
    return Recipe.from_dict(values)


if __name__ == "__main__":
    main()
