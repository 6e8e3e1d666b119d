"""The page of a comparison: paired differences by hand, intervals and verdicts, and whatever is missing."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from phasequant.report import write_comparison
from phasequant.report.comparison import context, paired, render

HOSTILE = "</script><b>bold</b> & %{y}"
A8 = {"uniform": 0.0, "paper": 0.133, "budget": 0.125}
Json = dict[str, Any]


def make_row(recipe: str, policy: str, loss: float, chunks: int = 4, levels: tuple[str, ...] = ("16", "4")) -> Json:
    """One row, made up from its mean nll at KV16; the same from run to run."""
    noise = random.Random(f"{recipe} {policy}")
    figures = {}
    for level in levels:
        nll = [loss + (0.06 if level == "4" else 0) + 0.2 * chunk + noise.gauss(0, 0.004) for chunk in range(chunks)]
        figures[level] = {"ppl": math.exp(sum(nll) / chunks), "kl": loss - 3.1, "nll": nll}
    online = {"name": "R4", "place": "input of down", "where": "online", "matrix": "hadamard 1536",
              "rung": "hadamard", "macs": 1_200_000}  # fmt: skip
    folded = {**online, "name": "R1", "place": "residual stream", "where": "folded", "matrix": "random-orthogonal 576",
              "rung": "random-orthogonal", "macs": 0}  # fmt: skip
    return {
        "recipe": recipe, "method": recipe, "policy": policy, "bits": "W4A4", "weights": "rtn", "a8_share": A8[policy],
        "figures": figures, "gsr": 0.3 + (loss - 3.2), "gsr_raw": 0.61,
        "gsr_by_group": dict.fromkeys(("qkv", "o", "gate_up", "down"), 0.4), "seconds": 400 * (3.9 - loss) ** 2,
        "peak_bytes": 2**30, "online_macs": 1_200_000, "macs_total": 106_168_320, "weight_bytes": 167_000_000,
        "kv_bytes_per_token": 6300, "transform": [folded, online], "error": None,
    }  # fmt: skip


def make_result(rows: list[Json], chunks: int = 4, **changes: Any) -> Json:
    """What a comparison would write."""
    return {
        "versions": {"phasequant": "0.1.0", "torch": "2"},
        "model": {"name": "demo", "family": "LLaMA", "blocks": 30, "d_model": 576},
        "evaluation": {"text": "wiki.test", "sha256": "", "chunks": chunks, "seqlen": 2048},
        "calibration": "builtin", "device": "cpu", "original": {"ppl": 24.145, "nll": [3.2] * chunks},
        "rows": rows, "seconds": 812.0, **changes,
    }  # fmt: skip


def full() -> Json:
    """Several recipes and plans, one of them failed."""
    losses = {"quarot": 3.4, "flat": 3.22, "flat+wush": 3.2, "spin": 3.3, "rtn": 4.6, HOSTILE: 3.35}
    less = {"uniform": 0.0, "paper": 0.03, "budget": 0.04}
    rows = [make_row(name, policy, loss - less[policy]) for name, loss in losses.items() for policy in less]
    return make_result([*rows, {"recipe": "frtq", "policy": "paper", "error": "no <b>block</b> to learn", "gsr": None}])


def some(**changes: Any) -> Json:
    """One uniform row."""
    return {**make_row("flat", "uniform", 3.2), **changes}


def plain(html: str) -> str:
    """The page without its bundle and its charts."""
    return re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


def test_files(tmp_path: Path) -> None:
    result = full()
    result["rows"][0]["figures"]["4"]["ppl"] = math.inf
    page = write_comparison(result, tmp_path)
    assert page == tmp_path / "compare.html"
    kept = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert kept["rows"][0]["figures"]["4"]["ppl"] is None
    assert kept["rows"][1] == result["rows"][1]
    html = page.read_text(encoding="utf-8")
    assert "not finite" in plain(html)
    loads = set(re.findall(r"""\b(?:src|href|action)\s*=\s*["']([^"']*)["']""", html))
    assert {load for load in loads if not load.startswith("#")} == {"data:,", "compare.json"}
    assert not re.search(r"https?://(?!www.w3.org/2000/svg)|url\(|@import|<b>bold|<b>block", html)


def test_paired_differences() -> None:
    base, row = some(), some()
    base["figures"]["4"]["nll"], row["figures"]["4"]["nll"] = [3.0, 4.0, 5.0, 6.0], [2.9, 3.9, 4.9, 5.7]
    found = paired(row, base, "4")
    assert found is not None
    assert found["mean"] == pytest.approx(-0.15)
    assert found["error"] == pytest.approx(0.05)  # standard deviation 0.1 over 4 chunks
    assert found["noise"]  # t = 3 with 3 degrees of freedom: within 3.18
    row["figures"]["4"]["nll"] = [2.9, 3.9, 4.9, 5.8]
    found = paired(row, base, "4")
    assert found is not None
    assert not found["noise"]
    single = paired(make_row("a", "paper", 3.0, 1), make_row("b", "paper", 3.1, 1), "16")
    assert single is not None
    assert single["error"] is None
    assert not single["noise"]
    assert paired(row, make_row("b", "uniform", 3.0, 3), "4") is None
    assert paired(row, base, "8") is None


def test_summary_names_winners_and_gains() -> None:
    text = " ".join(context(full())["summary"])
    assert "With a 16-bit KV cache flat+wush (budget) reaches 31.8" in text
    assert "with 12.5 % of the multiply-adds in A8; it leads flat (budget) by 0.0" in text
    assert "Without any 8-bit weight or activation, flat+wush (uniform) is best at KV16" in text
    assert re.search(r"The paper plan \(A8 share 13.3 %\) changes the perplexity of uniform at KV4: .* −3\.\d %", text)
    assert "6 uniform rows the ranks of GSR and of perplexity at KV4 correlate with 1.00" in text
    assert "1 of 19 rows failed" in text


def test_8_bit_and_16_bit_recipes_do_not_win_what_they_may_not() -> None:
    rows = [some(), make_row("w4a8", "uniform", 3.0), make_row("16bit", "uniform", 2.0)]
    rows[1] |= {"bits": "W4A8", "a8_share": 1.0}
    rows[2] |= {"bits": "W16A16", "weights": "none"}
    best, _, low = context(make_result(rows))["summary"][:3]
    assert "w4a8 (uniform)" in best
    assert "flat (uniform)" in low


def test_table_needs_no_script() -> None:
    html = plain(render(full()))
    cells = ["W4A4, rtn", "1.13", "1,200,000", "R1: random-orthogonal 576, residual stream"]
    for text in (*cells, "failed: no &lt;b&gt;block&lt;/b&gt; to learn", "no Hadamard matrix of this width"):
        assert text in html, text
    assert len(re.findall(r"<strong>[\d.]+</strong>", html)) == 2  # the best of each KV column
    assert html.count('data-plan="paper"><th scope="row">frtq') == 1


@pytest.mark.parametrize(
    ("result", "there", "missing"),
    [
        (make_result([]), ["There are no rows."], ['data-chart="', 'id="plans"', 'id="online"']),
        (make_result([{"recipe": "spin", "policy": "paper", "error": "out of memory"}]),
         ["All 1 rows failed", "out of memory"], ['data-chart="', 'data-state="kv"']),
        (make_result([some()]), ['data-chart="ppl"', "flat (uniform) reaches"], ['id="plans"', "it leads", " ± 0"]),
        (make_result([make_row(name, policy, 3.2 - A8[policy], 1) for name in "ab" for policy in A8], chunks=1),
         ["A single chunk was read", "<small>+0.0", 'id="plans"'], [" ± 0", ", noise"]),
        (make_result([some(), make_row("a", "uniform", 3, levels=("16",)), make_row("b", "paper", 3, levels=("4",))]),
         ['data-state="kv"', "With a 16-bit KV cache a (uniform)"], ['id="plans"']),
        (make_result([make_row("a", "uniform", 3.1, levels=("16",))], original={"ppl": None, "nll": []}),
         ["perplexity –"], ['data-state="kv"', "KV4", "the 16-bit model's"]),
        (make_result([some(gsr=None, gsr_raw=None, gsr_by_group=None, seconds=None, peak_bytes=None, transform=None,
                           online_macs=None, weight_bytes=None, a8_share=None, kv_bytes_per_token=None)]),
         ['data-chart="ppl"'], ['data-chart="gsr"', 'data-chart="cost"']),
        (make_result([some(seconds=0.0, figures={"4": {"ppl": None, "kl": None, "nll": [None]}})]),
         ["not finite"], ['data-chart="', "reaches"]),
    ],
    ids=["nothing", "all errors", "one row", "one chunk", "missing columns", "no original", "no costs", "not finite"],
)  # fmt: skip
def test_degrades(result: Json, there: list[str], missing: list[str]) -> None:
    html = plain(render(result))
    assert all(text in html for text in there)
    assert not any(text in html for text in missing)
