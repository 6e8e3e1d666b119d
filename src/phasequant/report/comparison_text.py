"""A comparison as a table for a README (Markdown) or a paper (LaTeX, booktabs): compare.json's figures, a row each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phasequant.report.comparison_rows import kv_levels, listed, number, tidy, verdict_of

Json = dict[str, Any]
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    char: "\\" + char for char in "&%$#_{}"
}
MARKS = {"better": "↓", "worse": "↑", "undecided": "≈", "": ""}
TEX_MARKS = {"better": r"$\downarrow$", "worse": r"$\uparrow$", "undecided": r"$\approx$", "": ""}


def cells(result: Json, marks: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """Column names, and the text of every row's cells."""
    rows = tidy(result["rows"])
    levels = kv_levels(rows)
    others = [one["text"] for one in result.get("texts", [])]
    tasks = list(result.get("tasks", {}).get("names", []))
    metrics = {task: one["metric"] for task, one in (result["original"].get("tasks") or {}).items()}
    seeds = result.get("seeds", 1) > 1
    names = ["recipe", "plan", *(["seed"] if seeds else []), "bits", "A8 %"]
    for level in levels:
        names += [f"ppl KV{level}", *(f"{text} KV{level}" for text in others)]
        names += [f"{task} {metrics.get(task, '')} KV{level}".replace("  ", " ") for task in tasks]
    full = result["original"]
    first = ["16-bit", "", *([""] if seeds else []), "W16A16", ""]
    for level in levels:
        cells_16 = [number(full["ppl"], "ppl"), *(number(_at(full, "texts", text, "ppl"), "ppl") for text in others)]
        cells_16 += [_percent(_at(full, "tasks", task, "value"), metrics.get(task, "")) for task in tasks]
        first += cells_16 if level == "16" else ["–"] * len(cells_16)
    shown = [first]
    for row in rows:
        line = [row["recipe"], row["policy"], *([str(row.get("seed", ""))] if seeds else [])]
        if row["error"]:
            shown.append([*line, "failed", *[""] * (len(names) - len(line) - 1)])
            continue
        line += [row["bits"], number(100 * row["a8_share"], ".1f")]
        for level in levels:
            figure = row["figures"].get(level) or {}
            line.append(_marked(number(figure.get("ppl"), "ppl"), figure.get("against"), marks))
            for text in others:
                one = (figure.get("texts") or {}).get(text) or {}
                line.append(_marked(number(one.get("ppl"), "ppl"), one.get("against"), marks))
            for task in tasks:
                one = (figure.get("tasks") or {}).get(task) or {}
                value = _percent(one.get("value"), one.get("metric", ""))
                flipped = {"better": "worse", "worse": "better"} if one.get("higher_is_better", True) else {}
                line.append(_marked(value, one.get("against"), marks, flipped))
        shown.append(line)
    return names, shown


def _at(of: Json, *path: str) -> float | None:
    found: Any = of
    for key in path:
        found = (found or {}).get(key)
    return found


def _percent(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return number(value, "ppl") if metric == "perplexity" else f"{100 * value:.1f}"


def _marked(text: str, against: Json | None, marks: dict[str, str], flipped: dict[str, str] | None = None) -> str:
    """A figure, and whether it is really below (↓) or above (↑) the baseline's, or may be the same (≈)."""
    says = verdict_of(against)
    mark = marks[(flipped or {}).get(says, says)]
    return f"{text} {mark}".strip()


def _about(result: Json) -> str:
    evaluation = result["evaluation"]
    limit = result.get("tasks", {}).get("limit")
    names = list(result.get("tasks", {}).get("names", []))
    parts = [f"perplexity on {evaluation['text']}, {evaluation['chunks']} chunks of {evaluation['seqlen']} tokens"]
    if names:
        parts.append(f"accuracy in percent on {listed(names)}" + (f" (the first {limit} questions)" if limit else ""))
    marks = f"↓ ↑ ≈: really below, really above, or undecided against {result.get('baseline')} (paired, 95 %)"
    return f"{result['model']['name']}: {'; '.join(parts)}. {marks}."


def markdown(result: Json) -> str:
    """A GitHub table with a line about it."""
    names, rows = cells(result, MARKS)
    lines = [_line(names), _line(["---", *["---:"] * (len(names) - 1)]), *map(_line, rows)]
    return "\n".join([*lines, "", _about(result), ""])


def _line(parts: Sequence[str]) -> str:
    return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"


def latex(result: Json) -> str:
    """A booktabs table with its caption."""
    names, rows = cells(result, {mark: mark for mark in MARKS} | {"": ""})
    body = [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    caption = _tex(_about(result)).replace("↓", TEX_MARKS["better"])
    caption = caption.replace("↑", TEX_MARKS["worse"]).replace("≈", TEX_MARKS["undecided"])
    head = " & ".join(map(_tex, names)) + r" \\"
    return "\n".join([
        "% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}", r"\toprule", head, r"\midrule", body[0], r"\midrule",
        *body[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def _tex(text: str) -> str:
    figure, _, mark = text.rpartition(" ")
    end = ""
    if mark in TEX_MARKS and figure:
        text, end = figure, " " + TEX_MARKS[mark]
    plain = "".join(SPECIAL.get(char, char) for char in text)
    return plain.replace("–", "--").replace("−", "$-$") + end


def write(path: Path, result: Json, form: Callable[[Json], str]) -> None:
    """Write one of the forms to a file."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(form(result), encoding="utf-8")
