"""The papers' tables: every row has a recipe that our loader takes, and the runner puts figures side by side."""

import json
import sys
from pathlib import Path

import pytest

from phasequant import PhaseQuantError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "papers"))
import papers
import run

LLAMAS = ["llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3-70b"]
ALL = [(name, key) for name in papers.papers() for key in papers.read(name).tables]


@pytest.mark.parametrize(("name", "key"), ALL)
def test_every_row_has_a_recipe_that_loads(name, key):
    paper = papers.read(name)
    table = paper.tables[key]
    for row in table.rows:
        recipe = paper.recipe(row.recipe, table)
        assert (recipe.weights.bits == 16) == (row.policy is None)
        if row.policy is not None:
            assert recipe.with_(f"policy.name={row.policy}").policy.name == row.policy
            assert isinstance(paper.differs(row.recipe), list)
    assert {row.recipe for t in paper.tables.values() for row in t.rows} == set(paper.recipes)


def test_the_papers_tables_are_whole():
    tables = papers.read("dynamicptq").tables
    assert {"1", "2", "3", "4", "5"} <= set(tables)
    one, two = tables["1"], tables["2"]
    backbones = [
        f"{method}, {weights}" for weights in ("RTN", "GPTQ") for method in ("QuaRot", "SpinQuant", "FlatQuant")
    ]
    names = [row.name for row in one.rows]
    assert len(names) == 13 and set(backbones) < set(names)
    assert one.models == LLAMAS == two.models
    for row in one.rows:
        missing = set(LLAMAS) - set(row.published)
        assert missing == ({"llama-3-70b"} if row.recipe == "quarot-rtn" else set())  # NA in the paper
        assert all(set(figures) == {"wikitext2", "c4"} for figures in row.published.values())
    assert [row.name for row in two.rows] == [
        "FP16", "FlatQuant, RTN", "FlatQuant + DynamicPTQ, RTN", "FlatQuant, GPTQ", "FlatQuant + DynamicPTQ, GPTQ",
    ]  # fmt: skip
    assert all(set(row.published) == set(LLAMAS) for row in two.rows)
    assert len(tables["3"].rows) == 3 and tables["3"].models == ["r1-distill-qwen-1.5b"]
    assert {len(figures) for key in "45" for row in tables[key].rows for figures in row.published.values()} == {8}
    assert one.rows[6].published["llama-3-8b"] == {"wikitext2": 6.54, "c4": 10.33}
    plain = {(row.recipe, row.policy): row.published for row in one.rows}
    for (recipe, policy), figures in plain.items():  # DynamicPTQ betters its backbone everywhere, or is equal
        if policy == "paper":
            base = plain[recipe, "uniform"]
            assert all(figures[m][t] <= base[m][t] for m in figures for t in ("wikitext2", "c4"))


def test_a_directory_is_known_by_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**papers.models()["llama-2-13b"], "rope_theta": 1e4}))
    assert papers.matching(tmp_path) == ["llama-2-13b"]
    three = {key: value for key, value in papers.models()["llama-3-8b"].items() if key != "plain_rope"}
    (tmp_path / "config.json").write_text(json.dumps(three))
    assert papers.matching(tmp_path) == ["llama-3-8b"]
    (tmp_path / "config.json").write_text(json.dumps({**three, "rope_scaling": {"rope_type": "llama3", "factor": 8}}))
    assert papers.matching(tmp_path) == []  # LLaMA-3.1
    assert papers.matching("demo") == []


@pytest.fixture
def asked(saved, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PHASEQUANT_CACHE", str(tmp_path / "cache"))
    small = ["calibration.sequences=2", "calibration.seqlen=32", "weights.sequences=2", "weights.seqlen=32",
             "learning.sequences=2", "learning.seqlen=32", "weights.clip=0.9", "rotation.iterations=1",
             "rotation.preconditioning=1"]  # fmt: skip
    sets = [part for one in small for part in ("--set", one)]
    common = ["--text", str(text_file), "--calib", str(text_file), "--chunks", "2", "--seqlen", "48", *sets]

    def arguments(*more):
        return run.parser().parse_args([str(saved("llama")), *common, "-o", str(tmp_path / "t.json"), *more])

    return arguments


def test_published_and_ours_side_by_side(asked, capsys):
    found = run.run(asked("--rows", "QuaRot, RTN", "QuaRot + DynamicPTQ, RTN", "--as", "llama-2-7b"))
    rows = {one["row"]: one for one in found["rows"] if one["metric"] == "wikitext2"}
    assert {"FP16", "QuaRot, RTN", "QuaRot + DynamicPTQ, RTN"} <= set(rows)
    quarot = rows["QuaRot, RTN"]
    assert quarot["published"] == 8.56 and quarot["published_to_16bit"] == pytest.approx(8.56 / 5.47)
    assert quarot["difference"] == pytest.approx(quarot["ours"] - 8.56)
    assert quarot["ours_to_16bit"] == pytest.approx(quarot["ours"] / rows["FP16"]["ours"])
    assert quarot["interval"]["low"] < quarot["ours"] < quarot["interval"]["high"]
    assert rows["QuaRot + DynamicPTQ, RTN"]["ours"] != quarot["ours"]
    assert all(one["ours"] is None for one in found["rows"] if one["metric"] == "c4")  # no text was given
    shown = capsys.readouterr().out
    assert "| QuaRot, RTN | wikitext2 | 8.56 | 1.565 |" in shown
    again = run.run(asked("--rows", "QuaRot + DynamicPTQ, RTN"))  # kept rows; no model of the table: no difference
    one = next(one for one in again["rows"] if one["row"] == "QuaRot + DynamicPTQ, RTN")
    assert one["ours"] == rows["QuaRot + DynamicPTQ, RTN"]["ours"] and one["difference"] is None
    assert again["published_of"] == "llama-2-7b" and not again["same_model"]


def test_claims_against_another_row(asked, capsys):
    found = run.run(asked("--paper", "frtq", "--table", "abstract", "--rows", "DFRot", "FRTQ, rotations"))
    (claim,) = found["claims"]
    gsr = {one["row"]: one["ours"] for one in found["rows"] if one["metric"] == "gsr"}
    assert claim["ours"] == pytest.approx(100 * (gsr["FRTQ, rotations"] / gsr["DFRot"] - 1))
    assert "stated -28.69 % (llama-2-70b), ours" in capsys.readouterr().out


def test_what_is_not_measured_is_shown_and_what_is_unknown_refused(asked, capsys):
    assert run.run(asked("--table", "5")) is None
    shown = capsys.readouterr().out
    assert "phasequant bench decode" in shown and "tokens/s, batch 32 120.16" in shown
    assert run.run(asked("--list")) is None
    assert "--recipe flat --set policy.name=paper" in capsys.readouterr().out
    for wrong, message in (
        (["--table", "9"], "no table '9'"), (["--paper", "none"], "no paper 'none'"),
        (["--as", "gpt-5"], "no model 'gpt-5'"),
        (["--rows", "Quart"], "no row is called 'quart'"),
    ):  # fmt: skip
        with pytest.raises(PhaseQuantError, match=message):
            run.run(asked(*wrong))
