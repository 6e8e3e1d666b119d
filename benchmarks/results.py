"""RESULTS.md from the committed runs: `python benchmarks/results.py` writes it, `--check` says whether it is as made.

results.yaml beside this file names every run's JSON and the command that makes it again. Intervals are computed here,
of the negative log-likelihoods in the JSON; what did not work is every paragraph of LOG.md whose head says "(negative)"
or "(open)". No model is run.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from phasequant.evaluate.statistics import paired, perplexity_interval

ROOT = Path(__file__).resolve().parents[1]
INDEX = Path(__file__).with_suffix(".yaml")
Json = dict[str, Any]

HEAD = """# Results

Made by `python benchmarks/results.py` from the JSON of runs in `benchmarks/`; not written by hand. Above every table is
the command that makes its figures again. A 4-bit model's figures differ by a few percent between processors (LOG.md, "A
4-bit model is chaotic"), times by more. Figures without committed JSON are in README.md and LOG.md.

"× 16-bit" has the interval of the paired difference on the same chunks: it tells rows apart far better than the
interval of a perplexity, most of which is how much chunks differ. Intervals are of this text; over draws of signs and
calibration text see `phasequant compare --seeds`.
"""

PAPERS = """## Papers' tables beside ours

What is known of each paper's setting and what is inferred: [benchmarks/papers](benchmarks/papers/README.md).

"""
RANKS = """## Several processes

One command in one process and under torchrun, nothing learned before.

"""
SPEED = """## Speed on a GPU

LLaMA-3-8B's shape with random weights, baselines in the same run, losses included; read and discussed in
[benchmarks/gpu](benchmarks/gpu/README.md). "× 16-bit" is times as fast.

"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def load(folder: str, name: str) -> Json:
    found: Json = json.loads((ROOT / folder / name).read_text(encoding="utf-8"))
    return found


def span(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f" ({low:{form}} to {high:{form}})"


def perplexity(figure: Json, original: Json) -> list[str]:
    """Perplexity, times 16 bits with the interval of the paired difference, KL."""
    against = paired(figure["nll"], original["nll"])
    ends = against.low, against.high
    own, form = perplexity_interval(figure["nll"]), ".1f" if figure["ppl"] >= 100 else ".2f"
    return [
        f"{figure['ppl']:{form}}{span(own.low, own.high, form)}",
        f"{math.exp(against.mean):.3f}{span(*(None if x is None else math.exp(x) for x in ends), '.3f')}",
        f"{figure['kl']:.3f}",
    ]


def comparison(made: Json) -> str:
    """The rows of `phasequant compare`, of one folder."""
    text = f"## {made['title']}\n\n{made['about']}\n\n"
    for name, options in made["runs"].items():
        found = load(made["folder"], name)
        original, read = found["original"], found["evaluation"]
        full = perplexity_interval(original["nll"])
        text += (
            f"`{made['common']} {options}`\n\n16-bit {original['ppl']:.2f}{span(full.low, full.high, '.2f')}, "
            f"{read['chunks']} × {read['seqlen']} tokens; [{name}]({made['folder']}/{name})\n\n"
        )
        head = ["recipe", "plan", "bits", "KV", "A8, %", "perplexity (95 %)", "× 16-bit (95 %, paired)", "KL, nats"]
        rows = []
        for row in found["rows"]:
            for bits, figure in sorted(row["figures"].items(), key=lambda pair: -int(pair[0])):
                about = [f"`{row['recipe']}`", row["policy"], row["bits"], bits, f"{100 * row['a8_share']:.1f}"]
                rows.append([*about, *perplexity(figure, original)])
        text += table(head, rows) + "\n"
    return text


def paper(folder: str, name: str, command: str) -> str:
    """A paper's table beside ours, as benchmarks/papers/run.py wrote it."""
    found = load(folder, name)
    other = found["published_of"]
    same = "" if found["same_model"] or other is None else f"; the published figures are of {other}"
    read = found["evaluation"]
    text = (
        f"### {found['paper']}, table {found['table']}: {found['title']}\n\n`{command}`\n\n"
        f"{read['chunks']} × {read['seqlen']} tokens on {found['device']}{same}; [{name}]({folder}/{name})\n\n"
    )
    rows = []
    for one in found["rows"]:
        if one["ours"] is not None or one["error"]:
            form = ".3f" if one["metric"] == "gsr" else ".2f"
            ends = one["ours_to_16bit_interval"] or [None, None]
            ours = one["error"] or f"{one['ours']:{form}}"
            ratio = number(one["ours_to_16bit"], ".3f") + span(*ends, ".3f")
            cells = [number(one["published"], form), number(one["published_to_16bit"], ".3f"), ours, ratio]
            cells.append(number(one["difference"], "+.2f"))
            rows.append([one["row"], one["metric"], *cells])
    text += table(["", "metric", "published", "to its 16 bits", "ours", "to its 16 bits (95 %)", "difference"], rows)
    for one in found["claims"]:
        unit = "%" if "percent" in one else "points"
        stated = one.get("percent", one.get("points"))
        text += (
            f"\n{one['row']}, {one['metric']} against {one['against']}: stated {stated:+.2f} {unit} ({one['model']}), "
            f"ours {number(one['ours'], '+.2f')} {unit}.\n"
        )
    return text + "\n"


def number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def runtime(found: Json) -> str:
    """Prefill and decode of whole models."""
    head = ["", "batch × context", "prefill, tokens/s", "× 16-bit", "decode, tokens/s", "× 16-bit"]
    head += ["weights, GiB", "KV, GiB"]
    return table(head, ([
        row["row"], f"{row['batch']} × {row['context']}", f"{row['prefill_tokens_per_second']:,.0f}",
        f"{row['ratio']['prefill_seconds']:.2f}", f"{row['decode_tokens_per_second']:,.0f}",
        f"{row['ratio']['token_seconds']:.2f}", f"{row['weight_bytes'] / 2**30:.2f}",
        f"{row['cache_bytes'] / 2**30:.2f}",
    ] for row in found["rows"]))  # fmt: skip


def linears(found: Json) -> str:
    kernels = list(found["linears"][0]["microseconds"])
    head = ["", "rows", *(f"{kernel}, µs (× bf16)" for kernel in kernels), "roofline, µs"]
    return table(head, ([
        f"{one['group']} {one['in']}→{one['out']}", str(one["rows"]),
        *(f"{one['microseconds'][k]:.1f} ({one['ratio'][k]:.2f})" for k in kernels),
        f"{one['roofline']:.1f}",
    ] for one in found["linears"]))  # fmt: skip


def attention(found: Json) -> str:
    head = ["batch", "context", "bfloat16, flash, µs", "KV4, µs", "times as fast", "bytes, times fewer"]
    return table(head, ([
        str(one["batch"]), f"{one['context']:,}", f"{one['bf16']:.1f}", f"{one['kv4']:.1f}", f"{one['ratio']:.2f}",
        f"{one['bytes_ratio']:.2f}",
    ] for one in found["attention"]))  # fmt: skip


def entrances(found: Json) -> str:
    kinds = list(found["entrances"][0]["microseconds"])
    head = ["", "width", "rows", *(f"{kind}, µs" for kind in kinds)]
    return table(head, ([
        one["entrance"], str(one["width"]), str(one["rows"]), *(f"{one['microseconds'][k]:.1f}" for k in kinds),
    ] for one in found["entrances"]))  # fmt: skip


SHOWN = {"rows": runtime, "linears": linears, "attention": attention, "entrances": entrances}


def speed(made: Json) -> str:
    """`phasequant bench`, of one folder."""
    text = ""
    for name, command in made["runs"].items():
        found = load(made["folder"], name)
        show = next(show for key, show in SHOWN.items() if key in found)
        text += f"`{command}`\n\n{found['device']}; [{name}]({made['folder']}/{name})\n\n{show(found)}\n"
    return text


def ranks(made: Json) -> str:
    """`benchmarks/ranks/measure.py`: seconds of one process and of several."""
    text = ""
    for name, command in made["runs"].items():
        found = load(made["folder"], name)
        one, several = found["one"], found["several"]
        pairs = [("whole `quantize`", one["seconds"], several["seconds"])]
        pairs += [(f"of it, {part}", one["steps"][part], several["steps"][part]) for part in ("learning", "weights")]
        pairs += [("whole `eval`", one["eval_seconds"], several["eval_seconds"])]
        rows = [[what, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}"] for what, a, b in pairs if a >= 1]
        head = ["seconds", "1 process", f"{found['processes']} processes", "times as fast"]
        text += f"`{command}`\n\n{made['about'][name]} [{name}]({made['folder']}/{name})\n\n{table(head, rows)}\n"
        plans = "The same plan" if found["same_plan"] else "ANOTHER PLAN"
        text += f"{plans}; KL to the 16-bit model {one['kl']:.4f} and {several['kl']:.4f} nats a token.\n\n"
    return text


def failures() -> list[tuple[str, str, str]]:
    """(heading, head, text) of every paragraph of LOG.md that says it did not work, or is not settled."""
    found, heading = [], ""
    for paragraph in re.split(r"\n\s*\n", (ROOT / "LOG.md").read_text(encoding="utf-8")):
        if paragraph.startswith("## "):
            heading = paragraph.removeprefix("## ").strip()
        if match := re.match(r"\*\*(.+?\((?:negative|open)\b[^)]*\))\.?\*\*\.?\s*(.*)", paragraph, re.DOTALL):
            found.append((heading, match[1], " ".join(match[2].split())))
    return found


def build() -> str:
    """The whole page."""
    index = yaml.safe_load(INDEX.read_text(encoding="utf-8"))
    text = HEAD + "\n"
    for made in index["comparisons"]:
        text += comparison(made)
    if index["papers"]:
        text += PAPERS
        for made in index["papers"]:
            for name, command in made["runs"].items():
                text += paper(made["folder"], name, command)
    text += SPEED
    for made in index["gpu"]:
        text += speed(made)
    text += RANKS
    for made in index["ranks"]:
        text += ranks(made)
    text += "## What did not work\n\nFrom LOG.md, which has the settings.\n\n"
    for heading, head, said in failures():
        text += f"- **{head}** ({heading}) {said}\n"
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="RESULTS.md from the committed runs.")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where RESULTS.md is another")
    page = ROOT / "RESULTS.md"
    if parser.parse_args().check:
        sys.exit(page.read_text(encoding="utf-8") != build())
    page.write_text(build(), encoding="utf-8")
