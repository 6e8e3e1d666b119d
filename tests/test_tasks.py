"""Zero-shot tasks: the harness's own figures on the same questions, with the KV grid and the prefix in force."""

import importlib.util
import json
import math

import pytest
import torch

import phasequant
from phasequant.errors import PhaseQuantError
from phasequant.evaluate import questions, tasks
from phasequant.evaluate.answers import Answers, name_of
from phasequant.nn import prefix_length, prefix_tokens

harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

ARC = [
    {"query": f"Question: What is {a} plus {b}?", "choices": [str(a + b), "nothing", str(a * b + 20), "ten"], "gold": g}
    for g, (a, b) in enumerate([(1, 2), (3, 4), (5, 6), (2, 7)])
]  # fmt: skip
PIQA = [{"query": f"Question: open the {x}\n", "choices": [f"pull the {x}", "wait for it"], "gold": i % 2}
        for i, x in enumerate(("door", "box", "window", "can", "book"))]  # fmt: skip
LAMBADA = [{"context": f"the {x} saw the {y}, and the {x} went to the", "continuation": y}
           for x, y in (("cat", "dog"), ("boy", "sea"), ("king", "queen"))]  # fmt: skip
WINO = [{"context_options": ["The cup fits not in the bag as the cup", "The cup fits not in the bag as the bag"],
         "continuation": "is too large.", "gold": 0}]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PHASEQUANT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "qa"
    found.mkdir()
    files = {"arc_easy": ARC, "piqa": PIQA, "lambada_openai": LAMBADA, "winogrande": WINO, "mine": ARC}
    for name, rows in files.items():
        (found / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return found


def likelihood(model, tokenizer, before: str, after: str) -> float:
    """log p(after | before) of one text alone."""
    start, whole = tokenizer(before)["input_ids"], tokenizer(before + after)["input_ids"]
    logits = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
    return float(sum(logits[i - 1, whole[i]] for i in range(len(start), len(whole))))


def by_hand(model, tokenizer) -> dict[str, list[float]]:
    """acc and acc_norm of ARC's questions, in the harness's words."""
    found: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in ARC:
        scores = [likelihood(model, tokenizer, row["query"] + "\nAnswer:", f" {c}") for c in row["choices"]]
        norms = [s / len(c) for s, c in zip(scores, row["choices"], strict=True)]
        for metric, values in (("acc", scores), ("acc_norm", norms)):
            found[metric].append(float(max(range(4), key=values.__getitem__) == row["gold"]))
    return found


def test_rows_become_the_harness_columns():
    (arc, *_), own = questions.as_columns("arc_easy", ARC)
    assert arc == {"question": "What is 1 plus 2?", "answerKey": "A",
                   "choices": {"text": ARC[0]["choices"], "label": ["A", "B", "C", "D"]}} and not own  # fmt: skip
    piqa = questions.as_columns("piqa", PIQA)[0][1]
    assert piqa == {"goal": "open the box", "sol1": "pull the box", "sol2": "wait for it", "label": 1}
    assert questions.as_columns("lambada_openai", LAMBADA)[0][0] == {
        "text": "the cat saw the dog, and the cat went to the dog"
    }
    wino = questions.as_columns("winogrande", WINO)[0][0]
    assert wino == {"sentence": "The cup fits not in the bag as the _ is too large.", "option1": "cup",
                    "option2": "bag", "answer": "1"}  # fmt: skip
    assert questions.as_columns("piqa", [piqa]) == ([piqa], True)
    with pytest.raises(PhaseQuantError, match="question 1 of 'piqa' has the columns text"):
        questions.as_columns("piqa", [{"text": "x"}])


def test_what_cannot_be_read_is_said(folder):
    with pytest.raises(PhaseQuantError, match=r"there is no .*hellaswag.jsonl.*here: arc_easy"):
        questions.read(folder, "hellaswag")
    (folder / "bad.jsonl").write_text('{"query": 1}\n{oops\n')
    with pytest.raises(PhaseQuantError, match="line 2, is not JSON"):
        questions.read(folder, "bad")
    (folder / "none.jsonl").write_text("\n")
    with pytest.raises(PhaseQuantError, match="holds no question"):
        questions.read(folder, "none")
    assert len(questions.read(folder, "piqa", 2)) == 2


def test_without_the_harness_the_command_is_told(folder, run, monkeypatch, saved):
    import builtins

    real = builtins.__import__

    def without(name, *args, **options):
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    status, _, err = run("eval", saved("llama"), "--tasks", "arc_easy", "--tasks-dir", folder)
    assert status == 2 and "pip install 'lm-eval" in err
    status, _, err = run("eval", saved("llama"), "--limit", "3")
    assert status == 2 and "--tasks arc_easy" in err


def test_answers_outlive_a_cut_line(tmp_path):
    kept = Answers("m", tmp_path)
    kept.keep([("a", [1.0, True]), ("b", [2.0, False])])
    with kept.path.open("a") as file:
        file.write('["c", [3.0')
    again = Answers("m", tmp_path)
    assert again["b"] == [2.0, False] and "c" not in again
    again.keep([("c", [3.0, True])])
    assert Answers("m", tmp_path)["c"] == [3.0, True]
    assert Answers.key("x", [1]) != Answers.key("x", [1, 1])


def test_names_tell_models_and_grids_apart(tiny):
    model = tiny().model
    run = phasequant.quantize(tiny(), "quarot")
    names = {name_of(model, {}), name_of(tiny(seed=1).model, {}), name_of(run.model, {})}
    from phasequant.nn import kv_in_16_bits

    with kv_in_16_bits(run.model):
        names.add(name_of(run.model, {}))
    assert len(names) == 4
    assert name_of(tiny().model, {}) == name_of(model, {})


@harness
def test_accuracy_is_that_of_single_texts(tiny, folder):
    source = tiny()
    found = phasequant.evaluate(source, tasks=["arc_easy"], tasks_dir=folder, batch=3)
    known = by_hand(source.model, source.tokenizer)
    one = found["tasks"]["arc_easy"]
    assert one["metric"] == "acc_norm" and one["n"] == 4 and found["ppl"] is None and found["text"] is None
    assert one["value"] == sum(known["acc_norm"]) / 4 and one["others"]["acc"]["value"] == sum(known["acc"]) / 4
    assert one["error"] == pytest.approx(math.sqrt(one["value"] * (1 - one["value"]) / 3))


@harness
def test_equals_the_harness_alone(tiny, folder):
    """Its HFLM, its task from its own file, rows in its own columns; ours from the same questions in another form."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    source = tiny()
    rows = [{"goal": r["query"][len("Question: ") : -1], "sol1": r["choices"][0], "sol2": r["choices"][1],
             "label": r["gold"]} for r in PIQA]  # fmt: skip
    config = tasks._config("piqa") | {"dataset_path": "json", "training_split": None, "dataset_name": None}
    (folder / "raw.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["dataset_kwargs"] = {"data_files": {"validation": str(folder / "raw.json")}}
    lm = HFLM(pretrained=source.model, tokenizer=source.tokenizer, batch_size=2)
    theirs = lm_eval.simple_evaluate(
        model=lm, tasks=[config], bootstrap_iters=10, task_manager=TaskManager(include_defaults=False)
    )["results"]["piqa"]
    one = phasequant.evaluate(source, tasks=["piqa"], tasks_dir=folder, batch=2)["tasks"]["piqa"]
    assert one["value"] == theirs["acc_norm,none"] and one["error"] == pytest.approx(theirs["acc_norm_stderr,none"])
    assert one["others"]["acc"]["value"] == theirs["acc,none"]


@harness
@pytest.mark.parametrize("sets", [[], ["prefix.method=bos"]])
def test_quantized_models_run_with_their_kv_grid_and_prefix(tiny, folder, sets):
    made = phasequant.quantize(tiny(), "quarot", overrides=sets)
    assert prefix_length(made.model, made.map) == len(prefix_tokens(made.model)) == len(sets)
    found = tasks.run(
        made.model, made.tokenizer, ["arc_easy"], "x", folder=folder, prefix=prefix_tokens(made.model),
        prefix_length=prefix_length(made.model, made.map), batch=1,
    )["arc_easy"]  # fmt: skip
    known = by_hand(made.model, made.tokenizer)
    assert list(found.values) == known["acc_norm"] and list(found.others["acc"].values) == known["acc"]


@harness
def test_lambada_winogrande_and_a_task_of_ones_own(tiny, folder):
    source = tiny()
    names = ["lambada_openai", "winogrande", "mine"]
    found = phasequant.evaluate(source, tasks=names, tasks_dir=folder)["tasks"]
    logs = [likelihood(source.model, source.tokenizer, r["context"], f" {r['continuation']}") for r in LAMBADA]
    last = found["lambada_openai"]
    assert last["metric"] == "acc"
    assert last["others"]["perplexity"]["value"] == pytest.approx(math.exp(-sum(logs) / 3), rel=1e-4)
    options = [likelihood(source.model, source.tokenizer, o, " is too large.") for o in WINO[0]["context_options"]]
    assert found["winogrande"]["value"] == float(options[0] > options[1])
    assert found["mine"]["metric"] == "acc_norm" and found["mine"]["n"] == 4


@harness
def test_an_interrupted_run_goes_on(tiny, folder, monkeypatch):
    from phasequant.evaluate import harness as ours

    source, kept, asked = tiny(), Answers.keep, []
    monkeypatch.setattr(ours, "BATCHES", 1)

    def stopping(self, pairs):
        found = list(pairs)
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(found))
        kept(self, found)

    monkeypatch.setattr(Answers, "keep", stopping)
    with pytest.raises(KeyboardInterrupt):
        phasequant.evaluate(source, tasks=["arc_easy"], tasks_dir=folder, batch=4)
    done = sum(asked)

    def counting(self, pairs):
        found = list(pairs)
        asked.append(len(found))
        kept(self, found)

    monkeypatch.setattr(Answers, "keep", counting)
    found = phasequant.evaluate(source, tasks=["arc_easy"], tasks_dir=folder, batch=4)
    assert done == 8 and sum(asked) == 16
    again = phasequant.evaluate(source, tasks=["arc_easy"], tasks_dir=folder, batch=4)
    assert sum(asked) == 16 and again["tasks"] == found["tasks"]


@harness
def test_texts_are_shorter_by_the_prefix(tiny, tmp_path):
    from phasequant.evaluate.harness import KeptLM

    source = tiny()
    lm = KeptLM(source.model, source.tokenizer, Answers("x", tmp_path), batch=1, prefix=(256, 5), prefix_length=2)
    assert lm.max_length == source.model.config.max_position_embeddings - 2
    assert lm.tok_encode("ab") == source.tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert lm.tokenizer is not source.tokenizer


@harness
def test_command_line(folder, run, saved, tmp_path):
    made = phasequant.quantize(str(saved("llama")), "quarot", output=tmp_path / "q")
    assert made.model is not None
    status, out, err = run(
        "eval", tmp_path / "q", "--tasks", "arc_easy,piqa", "--tasks-dir", folder, "--limit", "3", "--batch", "2",
        "--json",
    )  # fmt: skip
    assert status == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["tasks"]["piqa"]["n"] == 3 and told["tasks"]["piqa"]["16bit"]["n"] == 3
    assert told["tasks"]["piqa"]["difference"]["verdict"] in ("better", "worse", "undecided")
    assert "McNemar" in out and "average" in out and told["average_16bit"] is not None
    status, _, err = run("eval", tmp_path / "q", "--tasks", "no_such", "--tasks-dir", folder)
    assert status == 2 and "no_such.jsonl" in err
