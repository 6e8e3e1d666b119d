"""RESULTS.md is what its generator makes of the committed runs; README's tables have their commands beside them."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import test_docs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))
INDEX = RESULTS["yaml"].safe_load((ROOT / "benchmarks" / "results.yaml").read_text(encoding="utf-8"))
RUNS = [
    (made["folder"], name, f"{made.get('common', '')} {command}".strip())
    for section in ("comparisons", "papers", "gpu", "ranks")
    for made in INDEX[section]
    for name, command in made["runs"].items()
]
COMMAND = re.compile(r"(?:^|`)(?:make|phasequant|python benchmarks/|(?:[A-Z_]+=\S+ )+python benchmarks/)", re.MULTILINE)


def test_results_are_what_the_runs_say():
    made = RESULTS["build"]()
    assert made == (ROOT / "RESULTS.md").read_text(encoding="utf-8"), "run python benchmarks/results.py"
    assert made.count("(negative") >= 6  # what did not work is told
    for _, name, command in RUNS:
        assert f"`{command}`" in made and f"[{name}]" in made


@pytest.mark.parametrize(("folder", "name", "command"), RUNS, ids=[name for _, name, _ in RUNS])
def test_commands_of_runs_parse(folder, name, command):
    assert json.loads((ROOT / folder / name).read_text(encoding="utf-8"))
    if command.startswith("phasequant "):
        test_docs.test_commands_parse(None, command, True)
    elif "benchmarks/ranks/" in command:
        options = command.partition(" -- ")[2]
        test_docs.test_commands_parse(None, f"phasequant quantize m8b -o out {options}", True)
    else:
        sys.path.insert(0, str(ROOT / "benchmarks" / "papers"))
        runner = runpy.run_path(str(ROOT / "benchmarks" / "papers" / "run.py"))
        python, script, *rest = shlex.split(command)
        assert python == "python" and script == "benchmarks/papers/run.py"
        asked = runner["parser"]().parse_args(rest)
        assert asked.table in runner["read"](asked.paper).tables


def test_all_committed_runs_are_told():
    """A run's JSON that nobody reads is not evidence. Earlier runs of a benchmark are told in its own README."""
    told = {f"{folder}/{name}" for folder, name, _ in RUNS}
    earlier = {"benchmarks/gpu/2026-11-22-h200"}
    for path in sorted((ROOT / "benchmarks").rglob("*.json")):
        shown = path.relative_to(ROOT).as_posix()
        assert shown in told or path.parent.relative_to(ROOT).as_posix() in earlier, shown


def tables(page: str) -> list[tuple[str, str]]:
    """(the table, it with the two paragraphs before and behind it), of every table with measured numbers."""
    plain = re.sub(r"^```.*?^```", lambda block: block[0].replace("\n\n", "\n"), page, flags=re.DOTALL | re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n", plain)
    found = []
    for at, one in enumerate(paragraphs):
        if one.startswith("|") and len(re.findall(r"\d\.\d", one)) >= 3:
            found.append((one, "\n\n".join(paragraphs[max(0, at - 2) : at + 3])))
    return found


def test_tables_of_the_readme_have_their_commands():
    found = tables((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) >= 7
    for table, around in found:
        assert COMMAND.search(around), table.splitlines()[0]
    bare = "text\n\n| a | b |\n|---|---|\n| 1.5 | 2.5 |\n| 3.5 | 4.5 |\n\nmore text"
    assert not COMMAND.search(tables(bare)[0][1])
