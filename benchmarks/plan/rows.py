"""Per-token precision against more groups in 8 bits, at equal shares, on the same codes.

    python benchmarks/plan/rows.py --text wiki.test --calib wiki.train --recipe quarot-gptq [-o runs/rows.json]

Rows: all low; a share of single rows in 8 bits (by gsr and by absmax); the same share of multiply-adds in whole groups;
the budget plan; that plan with single rows, and with as much more in groups. One set of codes, every plan read from it.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from phasequant import pipeline, planning
from phasequant import text as texts
from phasequant.evaluate import score
from phasequant.plan import PrecisionPlan
from phasequant.recipe import Recipe
from phasequant.source import open_model


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--recipe", default="quarot-gptq")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.05, help="of rows, or of multiply-adds more")
    parser.add_argument("--a8-share", type=float, default=0.125)
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/rows.json"))
    given = parser.parse_args()
    recipe = Recipe.load(given.recipe, [f"calibration.text={json.dumps(given.calib)}", *given.sets])
    source, original = open_model(given.model), open_model(given.model)
    chunks = texts.cut(texts.find(given.text, "evaluation"), source.tokenizer, 2048, given.chunks)
    made = pipeline.observe_and_transform(source, recipe, raw=False, transformed=True, noise=True)

    def plan(share: float, rows: str) -> PrecisionPlan:
        wanted = recipe.with_(
            "policy.name=budget" if share else "policy.name=uniform",
            policy={"a8_share": share},
            activations={"token_policy": rows, "token_share": given.share},
        )
        return planning.planned(made, wanted)

    base, more = given.a8_share, given.share
    plans = {
        "all low": plan(0, "none"),
        f"{100 * more:g} % of rows, gsr": plan(0, "gsr"),
        f"{100 * more:g} % of rows, absmax": plan(0, "absmax"),
        f"{100 * more:g} % in groups": plan(more, "none"),
        f"{100 * base:g} % in groups": plan(base, "none"),
        f"{100 * base:g} % in groups, {100 * more:g} % of rows, gsr": plan(base, "gsr"),
        f"{100 * base:g} % in groups, {100 * more:g} % of rows, absmax": plan(base, "absmax"),
        f"{100 * (base + more):g} % in groups": plan(base + more, "none"),
    }
    run = pipeline.finish(made, plans["all low"])
    scores, exact = score({n: partial(run.reading, p) for n, p in plans.items()}, chunks, original.model)
    assert exact is not None
    found = {
        "recipe": given.recipe, "sets": given.sets, "chunks": given.chunks, "ppl_16bit": exact.ppl,
        "rows": {n: {"ppl": s.ppl, "kl": s.kl, "a8_share": plans[n].a8_share, "row_share": s.rows,
                     "nll": s.nll_by_chunk} for n, s in scores.items()},
    }  # fmt: skip
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=1))
    print(f"16 bits {exact.ppl:.3f}")
    for name, row in found["rows"].items():
        share = "" if row["row_share"] is None else f", rows {100 * row['row_share']:.1f} %"
        print(f"{name:40} ppl {row['ppl']:8.3f}   KL {row['kl']:.4f}   groups {100 * row['a8_share']:.1f} %{share}")


if __name__ == "__main__":
    main()
