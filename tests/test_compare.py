"""`compare`: rows for recipes and plans, kept and taken up again; the same figures as `evaluate`."""

import json

import pytest

import phasequant
from phasequant.cli import app
from phasequant.compare import compare
from phasequant.errors import PhaseQuantError
from phasequant.recipe import Recipe

SMALL = [
    "learning.sequences=4", "learning.seqlen=32", "learning.epochs=1", "learning.steps=1", "learning.batch=2",
    "calibration.sequences=4", "calibration.seqlen=32", "rotation.iterations=2", "rotation.preconditioning=2",
]  # fmt: skip


@pytest.fixture
def setup(saved, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PHASEQUANT_CACHE", str(tmp_path / "cache"))
    options = {
        "output": tmp_path / "out", "text": text_file, "chunks": 2, "seqlen": 48,
        "overrides": [*SMALL, f"calibration.text={text_file}"],
    }  # fmt: skip
    return saved("llama"), options


def test_rows_for_every_recipe_plan_and_kv(setup):
    model, options = setup
    result, page = compare(model, ["quarot", "flat", "16bit"], **options)
    rows = {(row["recipe"], row["policy"]): row for row in result["rows"]}
    assert len(rows) == 7 and not any(row["error"] for row in rows.values())
    for (recipe, policy), row in rows.items():
        assert set(row["figures"]) == ({"16"} if recipe == "16bit" else {"16", "4"})
        assert row["seconds"] >= 0 and row["peak_bytes"] > 0 and row["gsr"] > 0 and row["gsr_raw"] > 0
        assert (row["a8_share"] > 0) == (policy != "uniform")
        assert row["a8_share"] <= 0.125 + 1e-9 or policy == "paper"
    assert rows["16bit", "uniform"]["figures"]["16"]["kl"] == pytest.approx(0, abs=1e-2)
    assert rows["flat", "uniform"]["online_macs"] > rows["quarot", "uniform"]["online_macs"] > 0
    assert page.is_file() and json.loads((page.parent / "compare.json").read_text())["rows"]


@pytest.mark.parametrize("recipe", ["quarot", "flat"])
def test_rows_equal_evaluate(recipe, setup):
    """What a row says is what `eval` says of the same recipe and policy."""
    model, options = setup
    result, _ = compare(model, [recipe], policies=["budget"], **options)
    alone = phasequant.evaluate(
        model, recipe=recipe, text=options["text"], chunks=2, seqlen=48,
        overrides=[*options["overrides"], "policy.name=budget", "policy.a8_share=0.125"],
    )  # fmt: skip
    (row,) = result["rows"]
    assert row["figures"]["4"]["ppl"] == pytest.approx(alone["ppl"], rel=1e-9)
    assert row["figures"]["4"]["kl"] == pytest.approx(alone["kl"], rel=1e-9)
    assert row["weight_bytes"] == alone["weight_bytes"] and result["original"]["ppl"] == alone["ppl_16bit"]


def test_an_interrupted_comparison_goes_on(setup, monkeypatch):
    model, options = setup
    from phasequant import pipeline

    finish, calls = pipeline.finish, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finish(*args)

    monkeypatch.setattr(pipeline, "finish", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(model, ["flat", "wush"], **options)
    assert len(list((options["output"] / "rows").glob("*.json"))) == 2
    before = len(calls)
    result, _ = compare(model, ["flat", "wush"], **options)
    assert len(calls) - before == 2  # flat's third plan, and wush once for all
    assert len(result["rows"]) == 6 and len(calls) == before + 2
    again, _ = compare(model, ["wush", "flat"], **options)
    assert len(calls) == before + 2 and again["original"] == result["original"]
    other = {**options, "overrides": [*options["overrides"], "seed=1"]}
    compare(model, ["wush"], **other)
    assert len(calls) == before + 3  # another seed is other work


def test_what_cannot_be_done_is_said_and_tried_again(setup, tmp_path):
    model, options = setup
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("compose: [w4, a4, kv4]\ntransform: {method: load, file: none.safetensors}\n")
    result, _ = compare(model, [str(wrong), "quarot"], policies=["uniform"], **options)
    bad, good = result["rows"]
    assert "none.safetensors" in bad["error"] and good["error"] is None
    assert len(list((options["output"] / "rows").glob("*.json"))) == 1
    with pytest.raises(PhaseQuantError, match="unknown policy"):
        compare(model, ["quarot"], policies=["papr"], **options)
    with pytest.raises(PhaseQuantError, match="there is no recipe 'quart'"):
        compare(model, ["quart"], **options)
    with pytest.raises(PhaseQuantError, match="nothing to compare"):
        compare(model, [], **options)
    (options["output"] / "mine.txt").write_text("x")
    with pytest.raises(PhaseQuantError, match="holds other files"):
        compare(model, ["quarot"], **options)


def test_command_line(setup, capsys):
    from typer.testing import CliRunner

    model, options = setup
    sets = [part for one in SMALL for part in ("--set", one)]
    arguments = ["compare", str(model), "--recipes", "rtn, quarot", "--policies", "uniform", "--weights", "rtn",
                 "-o", str(options["output"]), "--text", str(options["text"]), "--calib", str(options["text"]),
                 "--chunks", "1", "--seqlen", "48", "--json", *sets]  # fmt: skip
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    last = json.loads(found.output.splitlines()[-1])
    assert [row["recipe"] for row in last["rows"]] == ["rtn", "quarot"]
    assert "GSR" in found.output and "quarot" in found.output


def test_observations_of_a_row_are_of_what_it_ran(setup):
    """The GSR of a learned row is that of its own transform, not of the draft that its plan was made on."""
    model, options = setup
    result, _ = compare(model, ["flat"], policies=["uniform", "paper"], **options)
    uniform, paper = result["rows"]
    assert uniform["gsr"] != paper["gsr"] and uniform["gsr_raw"] == paper["gsr_raw"]


def test_a_polished_recipe_has_codes_and_polish_of_each_plan(saved, text_file, tmp_path):
    recipe = tmp_path / "polished.yaml"
    recipe.write_text(
        "compose: [w4, a4, kv4]\ntransform: {method: quarot}\n"
        "activations: {token_policy: absmax, token_share: 0.1}\n"
        "finetune: {steps: 2, sequences: 4, seqlen: 32, batch: 1}\n"
        f"calibration: {{text: {text_file}, sequences: 2, seqlen: 64}}\n"
    )
    result, _ = compare(
        saved("llama"), [str(recipe)], output=tmp_path / "out", policies=["uniform", "paper"], text=text_file,
        chunks=1, seqlen=64,
    )  # fmt: skip
    rows = result["rows"]
    assert [row["policy"] for row in rows] == ["uniform", "paper"] and not any(row["error"] for row in rows)
    assert all(row["weights"] == "rtn + polish" for row in rows)
    assert (
        rows[0]["figures"]["4"]["rows"] > 0 and rows[1]["figures"]["4"]["rows"] is None
    )  # all three blocks are raised


def without_times(result):
    """A comparison but for what a clock or the memory says."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_bytes", "seconds_per_block")}
            for row in result["rows"]]  # fmt: skip


def test_a_killed_comparison_ends_with_the_same_table(setup, tmp_path, monkeypatch):
    from phasequant.compare.kept import Rows

    model, options = setup
    asked = {**options, "policies": ["uniform"], "seeds": 2, "text": [options["text"], "builtin"], "chunks": 1}
    whole, _ = compare(model, ["rtn", "quarot"], **{**asked, "output": tmp_path / "whole"})
    write, written = Rows.write, []

    def stopping(self, recipe, row):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, recipe, row)
        written.append(row)

    monkeypatch.setattr(Rows, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(model, ["rtn", "quarot"], **asked)
    monkeypatch.setattr(Rows, "write", lambda self, recipe, row: (written.append(row), write(self, recipe, row)))
    found, page = compare(model, ["rtn", "quarot"], **asked)
    assert len(written) == 3 and without_times(found) == without_times(whole)
    assert found["original"] == whole["original"] and set(found["original"]["texts"]) == {"builtin"}
    rows = [(row["recipe"], row["seed"]) for row in found["rows"]]
    assert rows == [("rtn", 0), ("quarot", 0), ("quarot", 1)]  # nothing is random in rtn
    assert {s["n"] for s in found["over_seeds"] if s["recipe"] == "quarot"} == {2}
    assert "quarot, seed 1" in page.read_text() and "Over seeds" in page.read_text()


def test_intervals_and_verdicts_against_the_baseline(setup):
    from phasequant.evaluate.statistics import compare_nll, perplexity_interval

    model, options = setup
    result, page = compare(
        model, ["rtn", "quarot"], baseline="quarot/paper", **{**options, "policies": ["uniform", "paper"], "chunks": 4}
    )
    assert result["baseline"] == "quarot/paper"
    rows = {(row["recipe"], row["policy"]): row["figures"]["4"] for row in result["rows"]}
    base = rows["quarot", "paper"]
    assert base["against"] is None and base["interval"] == perplexity_interval(base["nll"]).to_dict()
    one = rows["rtn", "uniform"]
    assert one["against"] == compare_nll(one["nll"], base["nll"])
    assert one["against"]["verdict"] in page.read_text() and "More than chance?" in page.read_text()
    with pytest.raises(PhaseQuantError, match="the baseline 'quarto' is not compared: did you mean 'quarot/"):
        compare(model, ["rtn", "quarot"], baseline="quarto", **options)


def test_processes_make_the_same_rows(setup, tmp_path):
    model, options = setup
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("compose: [w4, a4, kv4]\ntransform: {method: load, file: none.safetensors}\n")
    asked = {**options, "policies": ["uniform"], "chunks": 1}
    alone, _ = compare(model, ["rtn", str(wrong), "quarot"], **{**asked, "output": tmp_path / "alone"})
    found, _ = compare(model, ["rtn", str(wrong), "quarot"], workers=2, **asked)
    for ours, theirs in zip(found["rows"], alone["rows"], strict=True):
        assert (ours["recipe"], ours["seed"]) == (theirs["recipe"], theirs["seed"])
        if theirs["error"]:
            assert "none.safetensors" in ours["error"]
        else:
            assert ours["figures"]["4"]["ppl"] == pytest.approx(theirs["figures"]["4"]["ppl"], rel=1e-6)
    assert len(list((asked["output"] / "rows").glob("*.json"))) == 2


def test_tasks_markdown_and_latex(setup, tmp_path, run):
    pytest.importorskip("lm_eval")
    model, options = setup
    (tmp_path / "qa").mkdir()
    rows = [{"query": f"Question: the {x}?", "choices": [x, "no", f"{x} {x}"], "gold": 0} for x in "abcdef"]
    (tmp_path / "qa" / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [part for one in SMALL for part in ("--set", one)]
    status, out, err = run(
        "compare", model, "--recipes", "rtn,quarot", "--policies", "uniform", "-o", options["output"],
        "--text", options["text"], "--calib", options["text"], "--chunks", "2", "--seqlen", "48", "--json",
        "--tasks", "arc_easy", "--tasks-dir", tmp_path / "qa", "--limit", "5", "--baseline", "quarot",
        "--markdown", tmp_path / "a.md", "--latex", tmp_path / "a.tex", *sets,
    )  # fmt: skip
    assert status == 0, err
    told = json.loads(out.splitlines()[-1])
    rtn, quarot = (row["figures"]["4"]["tasks"]["arc_easy"] for row in told["rows"])
    assert rtn["n"] == 5 and len(rtn["values"]) == 5 and quarot["against"] is None
    assert rtn["against"]["verdict"] in ("better", "worse", "undecided")
    alone = phasequant.evaluate(
        model, recipe="rtn", tasks=["arc_easy"], tasks_dir=tmp_path / "qa", limit=5,
        overrides=[*SMALL, f"calibration.text={options['text']}"],
    )["tasks"]["arc_easy"]  # fmt: skip
    assert rtn["value"] == alone["value"] and told["original"]["tasks"]["arc_easy"]["value"] == alone["16bit"]["value"]
    lines = (tmp_path / "a.md").read_text().splitlines()
    assert lines[0].startswith("| recipe | plan | bits | A8 % | ppl KV16 | arc_easy acc_norm KV16 |")
    assert len({line.count("|") for line in lines[:5]}) == 1 and lines[2].startswith("| 16-bit |")
    tex = (tmp_path / "a.tex").read_text()
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert len(body) == 4 and len({line.replace(r"\&", "").count("&") for line in body}) == 1
    assert r"arc\_easy" in tex and "%" not in tex.replace(r"\%", "").removeprefix("% needs")
    assert "Zero-shot tasks" in (options["output"] / "compare.html").read_text()


def test_seeds_take_other_calibration_text(setup):
    """Rows of smooth, which draws no signs, differ by what they were calibrated on; seed 0 is what it was without."""
    model, options = setup
    asked = {**options, "policies": ["uniform"], "chunks": 1}
    alone, _ = compare(model, ["smooth"], **asked)
    found, _ = compare(model, ["smooth", "rtn"], **asked, seeds=3)
    assert [(row["recipe"], row["seed"]) for row in found["rows"]] == [
        ("smooth", 0), ("smooth", 1), ("smooth", 2), ("rtn", 0),
    ]  # fmt: skip
    perplexities = [row["figures"]["4"]["ppl"] for row in found["rows"][:3]]
    assert len(set(perplexities)) == 3 and perplexities[0] == alone["rows"][0]["figures"]["4"]["ppl"]
    assert len({row["gsr_raw"] for row in found["rows"][:3]}) == 3
    budget, _ = compare(model, ["rtn"], **{**asked, "policies": ["budget"]}, seeds=2)
    assert [row["seed"] for row in budget["rows"]] == [0, 1]  # its plan is made on the text


def test_the_manifest_says_which_text_a_seed_took(setup, tmp_path):
    model, options = setup
    told = []
    for seed in (0, 1):
        sets = [*options["overrides"], "policy.name=budget", f"seed={seed}"]
        phasequant.quantize(model, "quarot", overrides=sets, output=tmp_path / f"q{seed}")
        manifest = json.loads((tmp_path / f"q{seed}" / "manifest.json").read_text())
        assert Recipe.load(tmp_path / f"q{seed}" / "recipe.yaml").seed == seed
        told.append(manifest["calibration"])
    assert [one["seed"] for one in told] == [0, 1] and told[0]["sha256"] == told[1]["sha256"]
    assert told[0]["tokens_sha256"] != told[1]["tokens_sha256"] and told[0]["sequences"] == told[1]["sequences"]
