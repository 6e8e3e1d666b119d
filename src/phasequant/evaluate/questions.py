"""Questions of a task from a JSONL file, as the harness's own task reads them.

`--tasks-dir DIR` holds NAME.jsonl for each task, a question a line, in one of these forms:

    {"query", "choices", "gold"}                    multiple choice: the query before "\\nAnswer:"; gold counts from 0
    {"context", "continuation"}                     the last word of a passage (LAMBADA)
    {"context_options", "continuation", "gold"}     the same end after each of several beginnings (WinoGrande)
    the columns of the harness's data set           taken as they are

The first three are turned back into the columns of the harness's data set, and the harness's own task (prompt, metrics,
normalization) reads those: only where the questions come from differs. Any other name with one of the first two forms
becomes a task of its own, the query being the whole prompt.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from phasequant.errors import PhaseQuantError

Row = dict[str, Any]
SIX = ("arc_challenge", "arc_easy", "hellaswag", "lambada_openai", "piqa", "winogrande")
"""The zero-shot tasks of the papers."""

ACCURACIES = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
LAST_WORD = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, ACCURACIES[0]]


def read(folder: Path, name: str, limit: int | None = None) -> list[Row]:
    """The first `limit` lines of a task's file (all, if None)."""
    path = Path(folder).expanduser() / f"{name}.jsonl"
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in path.parent.glob("*.jsonl"))) or "none"
        raise PhaseQuantError(f"there is no {path}: a tasks directory holds NAME.jsonl for each task (here: {found})")
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PhaseQuantError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise PhaseQuantError(f"{path}, line {number}, is not an object with the columns of a question")
        rows.append(row)
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        raise PhaseQuantError(f"{path} holds no question")
    return rows


def digest(rows: Sequence[Row]) -> str:
    """A hash of questions."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _question(row: Row) -> str:
    return str(row["query"]).removeprefix("Question: ").removesuffix("\n").removesuffix("\nAnswer:")


def _arc(row: Row) -> Row:
    labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": labels}
    return {"question": _question(row), "choices": choices, "answerKey": labels[row["gold"]]}


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": _question(row), "sol1": first, "sol2": second, "label": row["gold"]}


def _hellaswag(row: Row) -> Row:
    return {"query": row["query"], "choices": row["choices"], "label": row["gold"]}


def _winogrande(row: Row) -> Row:
    first, second = row["context_options"]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    start = first[: first.rfind(" ", 0, same) + 1]
    options = [option[len(start) :] for option in (first, second)]
    sentence = f"{start}_ {row['continuation'].strip()}"
    return {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(row["gold"] + 1)}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['context']} {row['continuation'].strip()}"}


FORMS: dict[str, tuple[Callable[[Row], Row], frozenset[str]]] = {
    "arc_challenge": (_arc, frozenset({"question", "choices", "answerKey"})),
    "arc_easy": (_arc, frozenset({"question", "choices", "answerKey"})),
    "hellaswag": (_hellaswag, frozenset({"ctx_a", "ctx_b", "activity_label", "endings", "label"})),
    "lambada_openai": (_lambada, frozenset({"text"})),
    "piqa": (_piqa, frozenset({"goal", "sol1", "sol2", "label"})),
    "winogrande": (_winogrande, frozenset({"sentence", "option1", "option2", "answer"})),
}
"""Task → how a row becomes the harness's, and the columns of a row that is already."""


def as_columns(name: str, rows: Sequence[Row]) -> tuple[list[Row], bool]:
    """Rows with the columns that the harness's task `name` (one of the six) reads; whether they were so already."""
    form, own = FORMS[name]
    if all(own <= row.keys() for row in rows):
        return list(rows), True
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(form(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise PhaseQuantError(
                f"question {number} of '{name}' has the columns {', '.join(sorted(row))} ({type(error).__name__}: "
                f"{error}): give query, choices, gold (or context, continuation), or the harness's "
                f"{', '.join(sorted(own))}"
            ) from error
    return found, False


def own_task(name: str, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The config of a task that the harness does not have; None where the rows are in none of our forms."""
    columns = set.intersection(*(set(row) for row in rows))
    if {"query", "choices", "gold"} <= columns:
        return {
            "task": name, "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "choices",
            "doc_to_target": "{{gold}}", "metric_list": ACCURACIES,
        }  # fmt: skip
    if {"context", "continuation"} <= columns:
        return {
            "task": name, "output_type": "loglikelihood", "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + continuation}}", "metric_list": LAST_WORD,
        }  # fmt: skip
    return None


def on_rows(config: Mapping[str, Any], rows: Sequence[Row], *, processed: bool) -> dict[str, Any]:
    """A harness task's config on rows in memory, without examples before the question. `processed`: the rows are as the
    task's own `process_docs` would make them."""
    from datasets import Dataset

    held = Dataset.from_list(list(rows))
    splits: dict[str, Any] = dict.fromkeys(("training_split", "validation_split", "fewshot_split"))
    left_out = {"dataset_path", "dataset_name", "dataset_kwargs", "tag", "group"}
    more: dict[str, Any] = {"process_docs": None} if processed else {}
    return {
        **{key: value for key, value in config.items() if key not in left_out},
        **splits, **more, "test_split": "test", "num_fewshot": 0, "custom_dataset": lambda **_: {"test": held},
    }  # fmt: skip
