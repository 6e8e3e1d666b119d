"""Tables of `demo`, `eval` and `compare`, as a person reads them in a terminal."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from phasequant.report.comparison_rows import number, verdict_of


def _empty(title: str, *names: str) -> Table:
    shown = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        shown.add_column(name, no_wrap=True)
    return shown


def between(found: dict[str, Any] | None, kind: str, factor: float = 1.0) -> str:
    """An interval, as in 23.1 … 25.2."""
    if found is None or found.get("low") is None or found.get("high") is None:
        return "–"
    return f"{number(factor * found['low'], kind)} … {number(factor * found['high'], kind)}"


def figures_table(rows: list[dict[str, Any]], evaluation: dict[str, Any]) -> Table:
    """Rows of figures as a person reads them."""
    title = f"{evaluation['chunks']} chunks of {evaluation['seqlen']} tokens, {evaluation['text']}"
    shown = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for column in ("ppl", "KL nats", "A8 %", "weights MiB", "KV B/token"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            escape(row["name"]),
            f"{row['ppl']:.3f}" if row["ppl"] is not None else "–",
            f"{row['kl']:.4f}" if row["kl"] is not None else "–",
            f"{100 * row['a8_share']:.1f}"
            + (f" + {100 * single:.1f} of rows" if (single := row.get("row_share")) else ""),
            f"{row['weight_bytes'] / 2**20:.1f}",
            f"{row['kv_bytes_per_token']:,}",
        )
    return shown


def tasks_table(tasks: dict[str, Any], result: dict[str, Any]) -> Table:
    """Accuracies in percent ± standard error, beside the 16-bit original's, and the difference question by question."""
    beside = any(one["16bit"] is not None and one["difference"] is not None for one in tasks.values())
    shown = _empty("zero-shot tasks, ± standard error", "task", "metric")
    columns = ["n", "", "95 % interval", *(["16-bit", "difference", "95 % interval"] if beside else [])]
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    if beside:
        shown.add_column("against 16-bit", no_wrap=True)
    for task, first in tasks.items():
        metrics = {first["metric"]: first, **first["others"]}
        for row, (metric, one) in enumerate(metrics.items()):
            factor, kind = (1.0, ",.3f") if metric == "perplexity" else (100.0, ".2f")
            cells = [escape(task) if row == 0 else "", escape(metric), str(one["n"]), _figure(one, factor, kind),
                     between(one, kind, factor)]  # fmt: skip
            if beside:
                cells += [_figure(one["16bit"], factor, kind), *_difference(one["difference"], metric)]
            shown.add_row(*cells)
    if result["average"] is not None and len(tasks) > 1:
        full = result["average_16bit"]
        cells = ["average", "", "", f"{100 * result['average']:.2f}", ""]
        shown.add_row(*cells, *([f"{100 * full:.2f}" if full is not None else "–"] if beside else []))
    return shown


def _figure(one: dict[str, Any] | None, factor: float, kind: str) -> str:
    if one is None:
        return "–"
    error = "" if one["error"] is None else f" ± {factor * one['error']:{kind}}"
    return f"{factor * one['value']:{kind}}{error}"


def _difference(found: dict[str, Any] | None, metric: str) -> tuple[str, str, str]:
    """Points of accuracy, or nats of nll for a perplexity."""
    if found is None:
        return "–", "–", "–"
    factor, kind = (1.0, "+.4f") if metric == "perplexity" else (100.0, "+.2f")
    told = found["verdict"] + (f" (McNemar p {found['p']:.2g})" if found["p"] is not None else "")
    return number(factor * found["mean"], kind), between(found, kind, factor), told


def comparison_table(result: dict[str, Any]) -> Table:
    """Rows of a comparison."""
    evaluation = result["evaluation"]
    full = result["original"]["ppl"]
    title = f"{evaluation['chunks']} chunks of {evaluation['seqlen']} tokens, {evaluation['text']}"
    title += f"; 16-bit {full:.3f}" if full is not None else ""
    kinds = sorted({int(bits) for row in result["rows"] for bits in row.get("figures") or {}}, reverse=True)
    shown = _empty(title, "recipe", "plan")
    names = ["A8 %", *(f"{what} KV{bits}" for bits in kinds for what in ("ppl", "KL"))]
    for column in (*names, "GSR", "online %", "s", "MiB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        name = escape(row["recipe"]) + (f" seed {row['seed']}" if result.get("seeds", 1) > 1 else "")
        if row["error"]:
            shown.add_row(name, row["policy"], "failed:", escape(row["error"].splitlines()[0]))
            continue
        figures = []
        for bits in kinds:
            one = row["figures"].get(str(bits))
            figures += [f"{one['ppl']:.3f}", f"{one['kl']:.3f}"] if one and one["ppl"] is not None else ["–", "–"]
        shown.add_row(
            name, row["policy"], f"{100 * row['a8_share']:.1f}", *figures, f"{row['gsr']:.3f}",
            f"{100 * row['online_macs'] / row['macs_total']:.1f}", f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        )  # fmt: skip
    return shown


def verdicts_table(result: dict[str, Any]) -> Table:
    """Intervals of a comparison's rows, and their differences to the baseline."""
    shown = _empty(f"against {result['baseline']}, nats a token, paired by chunk", "recipe", "plan", "KV", "text")
    for column in ("ppl", "95 % interval", "difference", "95 % interval"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for row in result["rows"]:
        name = escape(row["recipe"]) + (f" seed {row['seed']}" if result["seeds"] > 1 else "")
        for bits, figure in (row.get("figures") or {}).items():
            for text, one in {result["evaluation"]["text"]: figure, **figure["texts"]}.items():
                against = one["against"]
                shown.add_row(
                    name, row["policy"], bits, escape(text.rsplit("/", 1)[-1]), number(one["ppl"], "ppl"),
                    between(one["interval"], ".2f"), number(against and against["mean"], "+.4f"),
                    between(against, "+.4f"), verdict_of(against) or "baseline",
                )  # fmt: skip
    return shown


def compared_tasks(result: dict[str, Any]) -> Table:
    """Accuracies of a comparison's rows, with verdicts against the baseline."""
    full = result["original"]["tasks"]
    limit = result["tasks"]["limit"]
    title = "zero-shot tasks, ± standard error" + (f", the first {limit} questions" if limit else "")
    shown = _empty(title, "recipe", "plan", "KV")
    for task, one in full.items():
        shown.add_column(f"{task} ({one['metric']})", justify="right", no_wrap=True)

    def cell(one: dict[str, Any] | None) -> str:
        if one is None:
            return "–"
        factor, kind = (1.0, ",.3f") if one["metric"] == "perplexity" else (100.0, ".2f")
        says = verdict_of(one.get("against"))
        return _figure(one, factor, kind) + (f", {says}" if says else "")

    shown.add_row("16-bit", "", "16", *(cell(one) for one in full.values()))
    for row in result["rows"]:
        for bits, figure in (row.get("figures") or {}).items():
            shown.add_row(escape(row["recipe"]), row["policy"], bits, *(cell(figure["tasks"].get(t)) for t in full))
    return shown
