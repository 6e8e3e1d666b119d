"""Zero-shot tasks through lm-evaluation-harness: the papers' six by name, any other of its tasks, or JSONL files.

A task's figure is the papers' metric: acc_norm (the answer with the most likelihood a byte) where the task has it, else
acc, else the task's first; LAMBADA also has a perplexity. Beside it stand the number of questions, the standard error,
a 95 % interval and the value of every question, so that two models are compared question by question.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phasequant.console import note
from phasequant.errors import PhaseQuantError, did_you_mean
from phasequant.evaluate import questions
from phasequant.evaluate.answers import Answers
from phasequant.evaluate.statistics import Interval, compare_answers, interval, perplexity_interval, share

INSTALL = "pip install 'lm-eval>=0.4.13'"
FOLDERS = {"arc_challenge": "arc", "arc_easy": "arc", "lambada_openai": "lambada"}  # of the six, in the harness
PREFERRED = ("acc_norm", "acc", "exact_match")
BATCH = 16
FEWSHOT_SEED = 1234  # the harness's


@dataclass(frozen=True)
class TaskScore:
    """One model on one task. `values`: the metric of each question, in order (of a perplexity its nll);
    `higher_is_better`: of the metric; `others`: the task's other metrics, with theirs."""

    task: str
    metric: str
    value: float
    found: Interval
    values: tuple[float, ...]
    higher_is_better: bool = True
    others: Mapping[str, "TaskScore"] = field(default_factory=dict)

    def to_dict(self, *, values: bool = True) -> dict[str, Any]:
        """Plain values, for JSON."""
        one = self.found
        told: dict[str, Any] = {
            "metric": self.metric, "value": self.value, "error": one.error, "low": one.low, "high": one.high,
            "n": len(self.values), "higher_is_better": self.higher_is_better,
        }  # fmt: skip
        if self.others:
            told["others"] = {name: other.to_dict(values=values) for name, other in self.others.items()}
        return {**told, "values": list(self.values)} if values else told


def require() -> None:
    """Refuse where the harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise PhaseQuantError(
            f"tasks are run by lm-evaluation-harness, which is not installed: `{INSTALL}`, "
            "or `pip install 'phasequant[eval]'`"
        ) from error


@contextmanager
def _hushed() -> Iterator[None]:
    """The harness warns about each model in memory and each data set in memory: both are meant."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    """The harness's own progress bars, which have no switch: ours is shown."""
    found = [(module, module.tqdm) for name, module in list(sys.modules.items())
             if name.startswith("lm_eval") and isinstance(getattr(module, "tqdm", None), type)]  # fmt: skip
    try:
        for module, bar in found:
            setattr(module, "tqdm", partial(_still, bar))  # noqa: B010
        yield
    finally:
        for module, bar in found:
            setattr(module, "tqdm", bar)  # noqa: B010


def _still(bar: Any, *args: Any, **options: Any) -> Any:
    return bar(*args, **{**options, "disable": True})


@cache
def _manager(folder: str | None) -> Any:
    """The harness's index: of one folder of its tasks, or (some 15 seconds) of all 14,000."""
    from lm_eval import tasks as shelf

    if folder is None:
        note("reading the harness's list of tasks")
        return shelf.TaskManager()
    return shelf.TaskManager(include_path=str(Path(str(shelf.__file__)).parent / folder), include_defaults=False)


def _manager_of(name: str) -> Any:
    manager = _manager(FOLDERS.get(name, name) if name in questions.SIX else None)
    if name not in manager.all_tasks:
        raise PhaseQuantError(f"the harness has no task '{name}': {_nearest(name, manager.all_tasks)}")
    return manager


def _nearest(name: str, known: Sequence[str]) -> str:
    close = did_you_mean(name, known)
    return close.partition(" (known:")[0] if close.startswith("did you") else "`lm_eval ls tasks` lists them"


def _config(name: str) -> dict[str, Any]:
    """A harness task's config, whole."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = _manager_of(name).task_index[name]
    if entry.yaml_path is None or entry.kind.name != "TASK":
        raise PhaseQuantError(f"'{name}' is no single task of the harness: name its tasks one by one")
    found: dict[str, Any] = load_yaml(entry.yaml_path, resolve_func=True, recursive=True)
    return found


def offline_task(name: str, folder: Path, limit: int | None = None) -> dict[str, Any]:
    """The config of a task whose questions come from a file."""
    rows = questions.read(folder, name, limit)
    if name in questions.FORMS:
        columns, own = questions.as_columns(name, rows)
        return questions.on_rows(_config(name), columns, processed=not own)
    config = questions.own_task(name, rows)
    return questions.on_rows(config or _config(name), rows, processed=config is not None)


def _load(names: Sequence[str], folder: Path | None, limit: int | None) -> dict[str, Any]:
    """Fresh task objects by name (a group's name gives several)."""
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = {}
    for name in names:
        try:
            if folder is not None:
                plain = TaskManager(include_defaults=False)
                loaded = plain.load([offline_task(name, folder, limit)])
            else:
                loaded = _manager_of(name).load([name])
        except PhaseQuantError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            where = "" if folder is not None else "; without network give its questions as files, with --tasks-dir"
            raise PhaseQuantError(
                f"the task '{name}' could not be loaded ({type(error).__name__}: {first}){where}"
            ) from error
        found |= loaded["tasks"]
    for task in found.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return found


def check(names: Sequence[str], folder: str | Path | None, limit: int | None) -> str:
    """Refuse what cannot be asked, before any model is opened; a hash of what will be."""
    if not names:
        raise PhaseQuantError("no task is named: as in --tasks arc_easy,piqa")
    if limit is not None and limit < 1:
        raise PhaseQuantError(f"at least 1 question is needed, not {limit}")
    require()
    if folder is None:
        for name in names:
            _manager_of(name)
        return questions.digest([{"tasks": list(names), "limit": limit}])
    rows = {name: questions.digest(questions.read(Path(folder), name, limit)) for name in names}
    return questions.digest([rows])


def _score(task: str, metric: str, value: float, values: list[float], better: bool) -> TaskScore | None:
    """A metric's figure with its interval; None where a question has no single value of it."""
    if not all(isinstance(v, (bool, int, float)) for v in values) or not values:
        return None
    plain = [float(v) for v in values]
    if metric == "perplexity":
        nll = [-v for v in plain]
        return TaskScore(task, metric, value, perplexity_interval(nll), tuple(nll), False)
    if {*plain} <= {0.0, 1.0}:
        return TaskScore(task, metric, value, share(int(sum(plain)), len(plain)), tuple(plain), better)
    return TaskScore(task, metric, value, interval(plain), tuple(plain), better)


def _scores(task: str, results: Mapping[str, Any], samples: Sequence[Any], better: Mapping[str, bool]) -> TaskScore:
    """What the harness found for one task, the papers' metric first."""
    kinds = [key for key in results if "," in key and "_stderr" not in key]
    found: dict[str, TaskScore] = {}
    for key in kinds:
        metric, _, kept = key.partition(",")
        values = [sample[metric] for sample in samples if sample["filter"] == kept and metric in sample]
        name = metric if metric not in found else key
        one = _score(task, metric, float(results[key]), values, better.get(metric, True))
        if one is not None:
            found[name] = one
    if not found:
        raise PhaseQuantError(f"the task '{task}' has no metric of single questions: name another task")
    first = next((name for name in PREFERRED if name in found), next(iter(found)))
    others = {name: one for name, one in found.items() if name != first}
    return replace(found[first], others=others)


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    name_of_model: str,
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    batch: int = BATCH,
    prefix: Sequence[int] = (),
    prefix_length: int = 0,
    title: str = "tasks",
) -> dict[str, TaskScore]:
    """A model's scores by task. Answers are kept under `name_of_model` (see `answers.name_of`)."""
    if batch < 1:
        raise PhaseQuantError(f"a batch holds at least 1 request, not {batch}")
    check(names, folder, limit)
    with _hushed():
        from lm_eval import evaluator

        from phasequant.evaluate.harness import KeptLM

        loaded = _load(names, None if folder is None else Path(folder), limit)
        lm = KeptLM(model, tokenizer, Answers(name_of_model), batch=batch, prefix=prefix, prefix_length=prefix_length,
                    title=title)  # fmt: skip
        with _without_bars():
            told = evaluator.evaluate(
                lm=lm, task_dict={"tasks": loaded, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0,
                log_samples=True,
            )  # fmt: skip
    assert told is not None
    samples: Mapping[str, Any] = told["samples"]
    better = told.get("higher_is_better") or {}
    found = {}
    for name in loaded:
        ups = {metric: up is not False for metric, up in better.get(name, {}).items()}
        found[name] = _scores(name, told["results"][name], samples[name], ups)
    return found


def versus(ours: TaskScore, theirs: TaskScore) -> dict[str, Any]:
    """One model against another on the same questions."""
    return compare_answers(ours.values, theirs.values, higher_is_better=ours.higher_is_better)


def beside(ours: Mapping[str, TaskScore], full: Mapping[str, TaskScore] | None) -> dict[str, Any]:
    """What `eval` tells of tasks: task → figures, the 16-bit original's, and the paired difference to those; a task's
    other metrics stand below, as in {"arc_easy": {…, "others": {"acc": {…}}}}."""

    def told(one: TaskScore, other: TaskScore | None) -> dict[str, Any]:
        both: dict[str, Any] = {**one.to_dict(values=False), "others": {}}
        both["16bit"] = None if other is None else {**other.to_dict(values=False), "others": None}
        both["difference"] = None if other is None or other is one else versus(one, other)
        for name, more in one.others.items():
            both["others"][name] = told(more, None if other is None else other.others.get(name))
        return both

    return {task: told(one, None if full is None else full.get(task)) for task, one in ours.items()}


def average(scores: Mapping[str, TaskScore]) -> float | None:
    """The papers' average: the mean over tasks of their accuracies."""
    known = [one.value for one in scores.values() if one.higher_is_better]
    return sum(known) / len(known) if known else None
