"""The papers' tables beside ours: published figure, our figure, difference, for a model directory that you have.

    python benchmarks/papers/run.py MODEL --paper dynamicptq --table 1 --text wiki.test --calib wiki.train -o t1.json
    python benchmarks/papers/run.py MODEL --list             papers, tables, rows, recipes, and what MODEL is

Rows are measured by `phasequant compare`, in a folder beside the output (`t1.work`): a run that was stopped goes on
there. MODEL is known by its config.json; `--as llama-2-7b` says what it is. Where it is none of the table's models
(SmolLM2, `demo`), the published figures of `--beside` stand there with what they are of their own 16 bits: the two
columns of ratios can be compared, the figures cannot.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from papers import Paper, Row, Table, matching, models, papers, read

from phasequant import PhaseQuantError
from phasequant.compare import compare
from phasequant.evaluate.statistics import paired

Json = dict[str, Any]


def chosen(table: Table, names: Sequence[str] | None) -> list[Row]:
    """The rows whose names hold one of `names` (None: all), and the 16-bit model's."""
    asked = [name.lower() for name in names] if names else [""]
    unknown = [name for name in asked if not any(name in row.name.lower() for row in table.rows)]
    if unknown:
        raise PhaseQuantError(f"no row is called '{unknown[0]}': there are {'; '.join(r.name for r in table.rows)}")
    return [row for row in table.rows if row is table.full or any(name in row.name.lower() for name in asked)]


def measure(paper: Paper, table: Table, rows: Sequence[Row], asked: argparse.Namespace, work: Path) -> Json:
    """Every row's metrics: name → metric → {figure, interval, error}; the 16-bit model under `full`."""
    texts = {name: getattr(asked, name) for name in ("wikitext2", "c4") if getattr(asked, name)}
    tasks = table.tasks if asked.tasks and "accuracy" in table.metrics.values() else ()
    quantized = [row for row in rows if row.policy is not None]
    if not quantized:
        raise PhaseQuantError("only the 16-bit row is asked for: name others with --rows")
    policies = {name: tuple(r.policy for r in quantized if r.recipe == name) for name in {r.recipe for r in quantized}}
    sets = (*([f"calibration.text={asked.calib}"] if asked.calib else []), *asked.set)
    files = {}
    (work / "recipes").mkdir(parents=True, exist_ok=True)
    for name in policies:
        more = [f"transform={{method: load, file: {json.dumps(asked.rotations)}}}"] if asked.rotations else []
        spins = paper.recipe(name, table, sets).transform.method == "spin"
        files[name] = work / "recipes" / f"{name}.yaml"
        files[name].write_text(paper.recipe(name, table, (*sets, *(more if spins else ()))).to_yaml(), encoding="utf-8")
    found: Json = {"full": {}, "rows": {}}
    for group in sorted(set(policies.values())):
        names = [row.recipe for row in quantized if policies[row.recipe] == group]
        result, _ = compare(
            asked.model, list(dict.fromkeys(str(files[name]) for name in names)), output=work / "compare",
            policies=list(dict.fromkeys(group)), text=list(texts.values()), chunks=asked.chunks, seqlen=asked.seqlen,
            tasks=tasks, tasks_dir=asked.tasks_dir, limit=asked.limit, device=asked.device,
        )  # fmt: skip
        found |= {key: result[key] for key in ("versions", "model", "evaluation", "texts", "device")}
        found["full"] = _figures(result["original"], texts) | _accuracy(result["original"], tasks)
        made = {(one["recipe"], one["policy"]): one for one in result["rows"]}
        for row in quantized:
            if (key := (str(files[row.recipe]), row.policy)) in made:
                found["rows"][row.name] = _of_row(made[key], texts, tasks)
    return found


def _figures(figure: Json, texts: Json) -> Json:
    """Perplexities by metric, of a row's figure or of the original."""
    first, *others = texts
    found = {first: figure} | {name: figure["texts"][str(texts[name])] for name in others}
    return {
        name: {"figure": one["ppl"], "interval": one.get("interval"), "nll": one["nll"]} for name, one in found.items()
    }


def _accuracy(figure: Json, tasks: Sequence[str]) -> Json:
    values = [one["value"] for name, one in (figure.get("tasks") or {}).items() if name in tasks]
    return {"zero-shot": {"figure": 100 * fmean(values)}} if values else {}


def _of_row(row: Json, texts: Json, tasks: Sequence[str]) -> Json:
    if row["error"]:
        return {"error": row["error"]}
    figure = row["figures"][min(row["figures"], key=int)]  # with the KV cache in its own bits
    told = _figures(figure, texts) | _accuracy(figure, tasks)
    told["gsr"] = {"figure": row["gsr"]}
    return told | {"a8_share": row["a8_share"], "error": None}


def beside(table: Table, rows: Sequence[Row], found: Json, model: str | None, same: bool) -> list[Json]:
    """One entry for each row and metric: published and ours, each also against its own 16 bits."""
    told = []
    for row in rows:
        ours = found["full"] if row.policy is None else found["rows"].get(row.name, {})
        for metric in table.measured:
            kind = table.metrics[metric]
            stated = row.published.get(model or "", {}).get(metric)
            full = table.full.published.get(model or "", {}).get(metric) if table.full else None
            mine, whole = ours.get(metric, {}), found["full"].get(metric, {})
            got = mine.get("figure")
            if stated is None and got is None:
                continue
            told.append({
                "row": row.name, "metric": metric, "published": stated, "published_to_16bit": _to(stated, full, kind),
                "ours": got, "interval": mine.get("interval"), "ours_to_16bit": _to(got, whole.get("figure"), kind),
                "ours_to_16bit_interval": _paired(mine, whole) if row.policy else None,
                "difference": got - stated if same and got is not None and stated is not None else None,
                "error": ours.get("error"),
            })  # fmt: skip
    return told


def _to(figure: float | None, full: float | None, kind: str) -> float | None:
    """A perplexity in units of its 16 bits', an accuracy in points from them."""
    if figure is None or full is None or kind == "ratio":
        return None
    return figure - full if kind == "accuracy" else figure / full


def _paired(ours: Json, whole: Json) -> list[float] | None:
    """The 95 % interval of a perplexity in units of 16 bits', paired by chunk."""
    if not ours.get("nll") or len(ours["nll"]) < 2 or not whole.get("nll"):
        return None
    found = paired(ours["nll"], whole["nll"])
    return None if found.low is None or found.high is None else [math.exp(found.low), math.exp(found.high)]


def claims(rows: Sequence[Row], found: Json) -> list[Json]:
    """What rows are stated to change against others, and how much they do here."""
    told = []
    for row in rows:
        for claim in row.claims:
            other = next((one for one in rows if one.method == claim["against"]), None)
            figures = [found["rows"].get(r.name, {}).get(claim["metric"], {}).get("figure") for r in (row, other) if r]
            ours = None
            if len(figures) == 2 and None not in figures:
                got, base = figures
                ours = 100 * (got / base - 1) if "percent" in claim else got - base
            told.append({"row": row.name, **claim, "ours": ours})
    return told


def markdown(result: Json) -> str:
    """The result as a table."""
    of = result["published_of"] or "no model"
    lines = [
        f"{result['paper']}, table {result['table']}: {result['title']}", "",
        f"| | metric | published ({of}) | to its 16 bits | ours | to its 16 bits (95 %) | difference |",
        "|---" * 7 + "|",
    ]  # fmt: skip
    for one in result["rows"]:
        sign = "+.2f" if result["metrics"][one["metric"]] == "accuracy" else ".3f"
        ends = one["ours_to_16bit_interval"]
        span = "" if not ends else f" ({ends[0]:.3f} to {ends[1]:.3f})"
        cells = [
            _number(one["published"], ".2f"), _number(one["published_to_16bit"], sign),
            one["error"] or _number(one["ours"], ".3f" if one["metric"] == "gsr" else ".2f"),
            _number(one["ours_to_16bit"], sign) + span, _number(one["difference"], "+.2f"),
        ]  # fmt: skip
        lines.append(f"| {one['row']} | {one['metric']} | {' | '.join(cells)} |")
    for one in result["claims"]:
        unit = "%" if "percent" in one else "points"
        stated = one.get("percent", one.get("points"))
        lines.append(
            f"\n{one['row']}, {one['metric']} against {one['against']}: stated {stated:+.2f} {unit} ({one['model']}), "
            f"ours {_number(one['ours'], '+.2f')} {unit}."
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def published(paper: Paper, table: Table, model: str) -> str:
    """A table that is not measured here, as it was published."""
    lines = [f"{table.title}. {table.note}"]
    for row in table.rows:
        figures = ", ".join(f"{metric} {value:g}" for metric, value in row.published.get(model, {}).items())
        lines.append(f"- {row.name}: {figures or 'nothing published'}")
    return "\n".join(lines) + "\n"


def listing(model: str) -> str:
    """Papers, tables and rows, and which of their models MODEL is."""
    found = matching(model)
    lines = [f"{model}: {', '.join(found) or 'none of the models of the papers'}"]
    for name in papers():
        paper = read(name)
        lines.append(f"\n{name}: {paper.title} ({paper.source})")
        for key, table in paper.tables.items():
            lines.append(f"  table {key}: {table.title} [{', '.join(table.models) or 'no figures'}]")
            for row in table.rows:
                made = paper.recipes[row.recipe]
                sets = "".join(f" --set {one}" for one in [*made.get("set", []), *table.overrides])
                policy = "" if row.policy is None else f" --set policy.name={row.policy}"
                lines.append(f"    {row.name}: --recipe {made['preset']}{sets}{policy}")
    return "\n".join(lines) + "\n"


def run(asked: argparse.Namespace) -> Json | None:
    """Print what was asked for; the result, which is written to `-o`, where something is measured."""
    if asked.list:
        print(listing(asked.model), end="")
        return None
    paper = read(asked.paper)
    if asked.table not in paper.tables:
        raise PhaseQuantError(f"{asked.paper} has no table '{asked.table}': there are {', '.join(paper.tables)}")
    table = paper.tables[asked.table]
    known = [asked.as_model] if asked.as_model else matching(asked.model)
    if unknown := [name for name in (asked.as_model, asked.beside) if name and name not in models()]:
        raise PhaseQuantError(f"there is no model '{unknown[0]}': there are {', '.join(models())}")
    itself = next((name for name in known if name in table.models), None)
    model = itself or asked.beside or next(iter(table.models), None)
    if not table.measured:
        print(published(paper, table, model or ""), end="")
        return None
    if not asked.wikitext2:
        raise PhaseQuantError("rows are measured on a text: give --text (a file, or wikitext2)")
    rows = chosen(table, asked.rows)
    found = measure(paper, table, rows, asked, asked.output.with_suffix(".work"))
    for one in (found["evaluation"], *found["texts"]):
        one["text"] = Path(one["text"]).name
    result = {
        "paper": asked.paper, "source": paper.source, "table": asked.table, "title": table.title,
        "metrics": dict(table.metrics), "published_of": model, "same_model": itself is not None,
        "model": found["model"], "device": found["device"], "versions": found["versions"],
        "evaluation": found["evaluation"], "texts": found["texts"], "set": list(asked.set),
        "recipes": {row.recipe: paper.recipes[row.recipe] for row in rows}, "note": table.note,
        "rows": beside(table, rows, found, model, itself is not None), "claims": claims(rows, found),
    }  # fmt: skip
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(markdown(result), end="")
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="A paper's table beside ours.")
    add = made.add_argument
    add("model", help="a model's directory, a Hub id, a GGUF file, or demo")
    add("--list", action="store_true", help="papers, tables, rows and their recipes")
    add("--paper", default="dynamicptq", help=", ".join(papers()))
    add("--table", default="1")
    add("--text", dest="wikitext2", help="WikiText-2 test: a file, or wikitext2 (from the Hub)")
    add("--c4", help="C4 validation: a file, or c4 (from the Hub)")
    add("--calib", help="text to calibrate on; the papers': WikiText-2 train")
    add("--tasks", action="store_true", help="zero-shot tasks too, where the table has them")
    add("--tasks-dir", help="folder with NAME.jsonl of each task; else the Hub")
    add("--limit", type=int, help="the first so many questions of each task")
    add("--chunks", type=int, help="the first so many chunks; the papers': all")
    add("--seqlen", type=int, default=2048)
    add("--rows", nargs="+", help="rows whose names hold one of these, as in --rows QuaRot 'FlatQuant, RTN'")
    add("--as", dest="as_model", help="which of the papers' models MODEL is")
    add("--beside", help="whose published figures stand beside a model that the table does not have")
    add("--rotations", help="SpinQuant's released rotations (.bin), instead of learning them")
    add("--set", action="append", default=[], help="override a recipe key in every row, as a.b=c")
    add("--device", default="auto")
    add("-o", "--output", type=Path, default=Path("papers.json"))
    return made


if __name__ == "__main__":
    try:
        run(parser().parse_args())
    except PhaseQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
