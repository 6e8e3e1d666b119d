"""The report page: everything in one file, hostile text stays text, and every number stands in a table, too."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from phasequant.report import write_page
from phasequant.report.charts import build
from phasequant.report.figures import table
from phasequant.report.findings import blocks_text, summary
from phasequant.report.page import render

BLOCKS, GROUPS = 3, ("qkv", "o", "gate_up", "down")
HOSTILE = ["</script><b>bold</b>", "\n\n", '"it\'s" & <!-- ', "<img src=x onerror=boom()>", "%{y}", " the"]
Json = dict[str, Any]


def observations(coordinates: str, scale: float, blocks: int = BLOCKS, copies: int = 1) -> Json:
    """One sweep, made up."""
    curve = {"all_tokens": ([9.0, 0.3, 0.8] * blocks)[:blocks], "without_first": ([8.0, 0.2, 0.7] * blocks)[:blocks]}
    depth = [1.0, *([40.0, 900.0, 30.0] * blocks)[:blocks]]
    tokens = HOSTILE * copies
    outlier = {"sequence": 0, "position": 0, "token": HOSTILE[0], "channel": 5, "times": 1200.0}
    phase = {"channel": 5, "first_token": True, "appears": 0, "last": 1, "written_by": [1], "taken_back_by": [2],
             "peak": -900.0, "times": 1200.0,
             "massive": True, "tokens": [[text, 1 + i] for i, text in enumerate(HOSTILE)]}  # fmt: skip
    return {
        "coordinates": coordinates, "blocks": blocks, "sequences": 2, "length": 8, "jump_ratio": curve,
        "snr": {"4": curve, "8": curve},
        "residual": {"norm": {"all_tokens": depth, "without_first": depth}, "absmax": [v * scale for v in depth],
                     "absmax_channel": [5] * len(depth), "update_absmax": ([40.0, 900.0, 0.0] * blocks)[:blocks]},
        "groups": [{"block": b, "group": g, "gsr": scale + b, "gsr_p99": 2 + b, "gsr_weight": 0.5, "absmax": 3.0,
                    "spike_ratio": 2.0, "noise": {"low": 0.0 if b else 1e-3} if scale < 1 else {}}
                   for b in range(blocks) for g in GROUPS],
        "outliers": [{**outlier, "block": 0, "value": 100.0}, {**outlier, "block": 1, "value": -900.0}],
        "phases": [phase, {**phase, "channel": 6, "massive": False, "last": 2, "first_token": False}],
        "token_map": {"tokens": tokens, "places": [[0, i] for i in range(len(tokens))],
                      "absmax": [[v + i for i in range(len(tokens))] for v in depth]},
        "spikes": {"tokens": tokens, "places": [[0, i] for i in range(len(tokens))],
                   "rows": [{"block": b, "group": g, "channel": 7, "times": [1.5 + b, 1.0, 0.5, 3.0, 0.0, 2.0] * copies}
                            for b in range(blocks) for g in GROUPS]},
    }  # fmt: skip


def make_report(**changes: Any) -> Json:
    """What a demo run would write."""
    low = {"bits": 4, "symmetric": True, "granularity": "token", "group_size": None, "clip": 0.9}
    raised = {"0.down": {**low, "bits": 8, "why": "<i>rank 1</i>"}, "2.qkv": {"bits": 16, "why": "set by hand"}}
    plan = {"policy": "budget", "model": {}, "a8_share": 0.1, "weights": low, "kv": low, "low": low, "raised": raised}
    row = {"ppl": 12.5, "kl": 0.0, "a8_share": 0.0, "weight_bytes": 2**20, "kv_bytes_per_token": 64}
    return {
        "versions": {"phasequant": "0.1.0", "torch": "2"},
        "model": {"name": "tiny <model>", "family": "LLaMA", "blocks": BLOCKS, "d_model": 64, "d_ffn": 96, "heads": 4,
                  "kv_heads": 2, "d_head": 16, "vocab": 300, "notes": []},
        "recipe": {"transform": {"method": "quarot"}, "seed": 0, "calibration": {"text": "builtin"}},
        "calibration": {"text": "builtin", "sha256": "", "tokens_sha256": "", "sequences": 2, "seqlen": 8},
        "transform": [{"name": "R4", "place": "input of down", "where": "online", "matrix": "random-orthogonal 96",
                       "rung": "random-orthogonal", "macs": 27648}],
        "thresholds": {"jr": 0.5, "snr": 10.0, "coordinates": "transformed", "first_token": False, "given": False},
        "observations": {"raw": observations("raw", 1.0), "transformed": observations("after quarot", 0.3)},
        "plan": plan,
        "plans": {"uniform": {**plan, "policy": "uniform", "raised": {}}, "+ budget, same share": plan},
        "results": [{"name": "16-bit", **row}, {"name": "W4A4KV4", **row, "ppl": 20.0, "kl": None}],
        "evaluation": {"text": "wiki.txt", "sha256": "", "chunks": 2, "seqlen": 8},
        "seconds": 1.5,
        **changes,
    }  # fmt: skip


def as_large_as_smollm2() -> Json:
    """30 blocks, 48 tokens, three coordinates: what `analyze` writes for the demo model, and a prefix."""
    report = make_report()
    names = {"raw": 1.0, "isolated": 0.8, "transformed": 0.3}
    report["observations"] = {name: observations(name, scale, 30, 8) for name, scale in names.items()}
    return {**report, "model": {**report["model"], "blocks": 30}}


def untransformed() -> Json:
    """`analyze` on a recipe without transform: nothing evaluated either."""
    report = make_report(transform=[], results=[], evaluation=None, calibration=None)
    raw = {**report["observations"]["raw"], "phases": [], "outliers": []}
    report["observations"] = {"raw": raw, "transformed": {**raw, "coordinates": "after none"}}
    return report


def test_json_is_the_report(tmp_path: Path) -> None:
    report = make_report()
    page = write_page(report, tmp_path)
    assert page == tmp_path / "report.html"
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == report
    assert text.endswith("}\n")


def test_page_is_one_small_file(tmp_path: Path) -> None:
    html = write_page(make_report(), tmp_path).read_text(encoding="utf-8")
    assert len(html.encode()) < 2e5
    assert len(render(as_large_as_smollm2()).encode()) < 1e6
    loads = set(re.findall(r"""\b(?:src|href|action)\s*=\s*["']([^"']*)["']""", html))
    assert {load for load in loads if not load.startswith("#")} == {"data:,", "report.json"}
    assert not re.search(r"https?://(?!www.w3.org/2000/svg)|url\(|@import", html)  # that one is a name


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    html = write_page(make_report(), tmp_path).read_text(encoding="utf-8")
    for tag in ("<b>bold", "<img", "<i>rank", "<!-- ", "<model>"):
        assert tag not in html
    assert "&lt;/script&gt;&lt;b&gt;bold" in html
    assert html.count("</script>") == html.count("<script")
    blob = html.split('id="figures">')[1].split("</script>")[0]
    figures = json.loads(blob)["figures"]
    assert figures["tokens"]["panels"][0]["marks"][0]["columns"][0] == repr(HOSTILE[0]) + " at 0:0"
    assert figures["tokens"]["x"]["ticks"][1] == [1, r"'\n\n'"]


def test_tables_need_no_script(tmp_path: Path) -> None:
    html = write_page(make_report(), tmp_path).read_text(encoding="utf-8")
    for text in ("12.50", "W4A4KV4", "–", "random-orthogonal 96", "no Hadamard matrix", "set by hand", "-900", "0.1.0"):
        assert text in html
    assert '<section data-policy="+ budget, same share"' in html


def test_summary_tells_what_happened() -> None:
    sentences = " ".join(summary(make_report()))
    assert "Channel 5 of the residual stream reaches -900 on the first token of a sequence, 1,200 times" in sentences
    assert "written by block 1, taken back by block 2. Channel 6 stands out too" in sentences
    assert "Blocks 0, 2 rewrite the stream, block 0 most (8 times its norm)" in sentences
    assert "in the raw model and 1.30 after quarot" in sentences
    assert "2 of 12 groups read 8 or 16 bits; the others stay at 4" in sentences
    assert "Perplexity is 12.50 for 16-bit" in sentences
    quiet = " ".join(summary(untransformed()))
    assert "No value of the residual stream stands out" in quiet
    assert "after none" not in quiet


def test_blocks_text() -> None:
    assert blocks_text([0, 1, 3, 4, 5, 29]) == "Blocks 0-1, 3-5, 29"
    assert blocks_text([0, 1, 2]) == "Blocks 0-2"


def test_charts_hold_plain_values() -> None:
    report = make_report()
    report["observations"]["raw"]["residual"]["absmax"][1] = float("nan")
    charts = build(report)
    assert set(charts) == {
        "norm", "absmax", "update", "jump", "snr", "gsr", "spikes", "spiking", "tokens", "noise", "budget", "plan",
    }  # fmt: skip
    bits = charts["plan"]["panels"][0]["marks"][1]
    assert [row[0] for row in bits["values"]] == [4, 4, 4, 8]
    assert bits["texts"][0] == ["", "", "16"]
    assert bits["notes"][3][0] == "<i>rank 1</i>" and bits["notes"][0][2] == "set by hand"
    assert "noise" not in build(untransformed()) and "budget" not in build(untransformed())


def test_what_learning_took_is_said(tmp_path):
    blocks = [{"loss_before": 0.5, "loss_after": 0.1, "seconds": 7.0, "peak_bytes": 2.0**30}] * BLOCKS
    cost = {"seconds": 21.7, "peak_bytes": 3 * 2**30, "seconds_per_block": 7.23, "blocks": blocks}
    page = write_page(make_report(learning=cost), tmp_path).read_text()
    assert "took 21.7 s, 7.23 s a block, with 3.00 GiB" in page and "20 %" in page
    assert "took" not in write_page(make_report(), tmp_path).read_text()


def test_how_weights_were_rounded_is_said(tmp_path):
    entry = {"rung": "gptq", "why": None, "error": 0.004, "dead": 0, "notes": {"rank": 32.0}}
    groups = [{"block": b, "group": g, **entry} for b in range(BLOCKS) for g in ("qkv", "down")]
    groups[3] |= {"rung": "rtn", "why": "the Hessian is not finite", "error": None, "dead": 2}
    weights = {"method": "gptq", "lowrank": "tsvd", "branch_macs": 12345, "seconds": 8.0, "peak_bytes": 2**30,
               "groups": groups}  # fmt: skip
    page = write_page(make_report(weights=weights), tmp_path).read_text()
    assert "Method gptq + tsvd: 8.0 s, at most 1.00 GiB" in page and "12,345 multiply-adds" in page
    assert "0.400 %" in page and "block 1, down: rtn, because the Hessian is not finite" in page
    assert "How the weights were rounded" not in write_page(make_report(), tmp_path).read_text()


def test_more_bits_beside_the_groups_are_told(tmp_path):
    report = make_report()
    plan = {
        **report["plan"],
        "rows": {"by": "absmax", "share": 0.05, "above": {}},
        "weights_raised": {"1.down": {"bits": 8, "why": "its weights drown the rest"}},
        "kv_raised": {"2": {"bits": 8, "why": "its keys matter"}},
    }
    report = {**report, "plan": plan, "plans": {**report["plans"], plan["policy"]: plan}}
    sentences = " ".join(summary(report))
    assert "the 5 % of the tokens with the largest absmax on the calibration text read 8 bits" in sentences
    assert "the weights of 1 groups" in sentences and "the keys and values of 1 blocks" in sentences
    html = write_page(report, tmp_path).read_text(encoding="utf-8")
    assert "weights of down" in html and "its keys matter" in html


class Tags(HTMLParser):
    """Opened and closed in order, ids once, and labels that lead somewhere."""

    VOID = frozenset(("meta", "link", "input", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.ids += [str(given["id"])] if "id" in given else []
        self.targets += [
            str(given[key]).removeprefix("#") for key in ("aria-describedby", "data-filters") if key in given
        ]
        if str(given.get("href", "")).startswith("#"):
            self.targets.append(str(given["href"])[1:])

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:], self.getpos())
        self.open.pop()


@pytest.mark.parametrize("made", [make_report, untransformed])
def test_html_is_well_formed(made: Any) -> None:
    tags = Tags()
    tags.feed(render(made()))
    assert not tags.open
    assert len(tags.ids) == len(set(tags.ids))
    assert set(tags.targets) <= set(tags.ids)


def test_every_chart_has_its_numbers_in_a_table() -> None:
    report = make_report()
    html = render(report)
    for name, figure in build(report).items():
        made = table(figure)
        assert made["rows"], name
        assert {len(row) for row in made["rows"]} == {len(made["head"])}, name
        shown = html.split(f'id="chart-{name}"')[1].split("</figure>")[0]
        assert shown.count("<td>") == len(made["rows"]) * len(made["head"]), name
    norm = table(build(report)["norm"])
    assert norm == {
        "head": ["after block", "all tokens", "without the first token"],
        "rows": [["emb", "1", "1"], ["0", "40", "40"], ["1", "900", "900"], ["2", "30", "30"]],
    }
    jumps = table(build(report)["jump"])["head"]
    assert jumps == ["block", "raw, all but first tokens", "raw, all tokens"]
