"""README and docs say what is so: Python runs, commands parse; files, links and messages are there."""

import ast
import importlib.util
import math
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer
from conftest import CONFIGS, make_model, make_tokenizer

import phasequant
from phasequant.arch import ModelMap, map
from phasequant.cli import app
from phasequant.console import set_quiet
from phasequant.evaluate import weight_bytes
from phasequant.nn import kv_bytes_per_token
from phasequant.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "<!-- not run: "
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
SIZES = runpy.run_path(str(ROOT / "docs" / "sizes.py"))


@cache
def fences(page: Path) -> list[tuple[str, str, str]]:
    """(language, text, the line before) of every fenced block of a page as it stands in the repository."""
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    start = None
    for at, line in enumerate(lines):
        if line.startswith("```"):
            if start is None:
                start = at
            else:
                before = lines[start - 1] if start else ""
                found.append((lines[start][3:], "\n".join(lines[start + 1 : at]), before))
                start = None
    assert start is None, f"{page.name} ends inside a block"
    return found


@pytest.fixture(scope="module")
def little(tmp_path_factory) -> Path:
    """The folder of a tiny model that takes sequences of 2048."""
    folder = tmp_path_factory.mktemp("docs") / "tiny"
    model = make_model("llama")
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# -- Python --------------------------------------------------------------------------------------------------------

PYTHON = [page for page in PAGES if any(language == "python" for language, _, _ in fences(page))]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.stem)
def test_python_runs(page, little, text_file, tmp_path, monkeypatch):
    """Every block, in the order of the page, in one namespace; `demo` is a tiny model, `out` and texts are ours."""
    monkeypatch.chdir(tmp_path)
    names = {'"demo"': repr(str(little)), '"wiki.test"': repr(str(text_file)), "capacity=2048": "capacity=32"}
    space: dict[str, object] = {}
    for language, code, before in fences(page):
        if language == "python" and not before.startswith(NOT_RUN):
            for name, ours in names.items():
                code = code.replace(name, ours)
            exec(compile(code, f"{page.name}: {code.splitlines()[0]}", "exec"), space)
    assert space or all(before.startswith(NOT_RUN) for language, _, before in fences(page) if language == "python")


def example(name: str):
    file = ROOT / "docs" / "examples" / f"{name}.py"
    assert len(file.read_text().splitlines()) < 60
    assert f"[[file: examples/{name}.py]]" in (ROOT / "docs" / "extend.md").read_text()
    return runpy.run_path(str(file))["main"]


def test_all_examples_are_tested():
    assert {file.stem for file in (ROOT / "docs" / "examples").iterdir() if file.suffix == ".py"} == {
        "family", "transform", "policy",
    }  # fmt: skip


def test_example_of_a_family(monkeypatch):
    monkeypatch.setattr(map, "FAMILIES", map.FAMILIES)  # what the example puts before it goes with the test
    assert example("family")() < 1e-6


def test_example_of_a_transform(little):
    found = example("transform")(str(little))
    assert math.isclose(found["16-bit"], found["transformed"], rel_tol=1e-4)
    assert 0.5 < found["W8A8"] / found["16-bit"] < 2 and found["W8A8"] != found["transformed"]


def test_example_of_a_policy(little):
    found = example("policy")(str(little))
    assert found["outer-down"] != found["uniform"]
    made = ModelMap.from_config(CONFIGS["llama"])
    assert math.isclose(found["A8 share"], 2 * made.macs("down") / made.macs_total)


# -- command lines -------------------------------------------------------------------------------------------------

SHOWN = re.compile(r"`(phasequant [^`]+)`")


def quoted(page: Path) -> list[tuple[str, bool]]:
    """Every `phasequant …` of a page, and whether it stands in a block, as a line that could be run."""
    found = []
    for language, text, _ in fences(page):
        if language in ("", "bash", "sh", "console"):
            found += [(line, True) for line in text.splitlines() if line.startswith("phasequant ")]
    plain = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return found + [(line.replace("\n", " "), False) for line in SHOWN.findall(plain)]


def words(line: str) -> list[str]:
    """A line as a shell splits it, without its comment; a pipe between choices ends it."""
    return shlex.split(line.split(" | ")[0], comments=True)[1:]


COMMANDS = [(page, line, whole) for page in PAGES for line, whole in quoted(page)]


@pytest.mark.parametrize(("page", "line", "whole"), COMMANDS, ids=[f"{p.stem}: {line}" for p, line, _ in COMMANDS])
def test_commands_parse(page, line, whole):
    """The command and its options exist; whole lines also have all they need, and name recipes and keys that are."""
    command, rest = typer.main.get_command(app), words(line)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    if hasattr(command, "commands"):
        assert not rest and command.name == "bench", f"'{line}' names no command"
        return
    known = {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
    own = rest[: rest.index("--")] if "--" in rest else rest
    assert not [word for word in own if word.startswith("-") and word.partition("=")[0] not in known]
    if not whole:
        return
    given = command.make_context(command.name, list(rest)).params
    named = [given.get("recipe"), *(given.get("recipes") or "").split(",")] if command.name != "recipes" else []
    for name in (name for name in named if name):
        Recipe.load(name, given.get("sets") or [])


def test_commands_are_found():
    """The guards above would catch a wrong option, and there is much to catch."""
    assert len(COMMANDS) > 60
    with pytest.raises(AssertionError):
        test_commands_parse(None, "phasequant quantize MODEL -o out --recipee quarot", False)
    with pytest.raises(AssertionError):
        test_commands_parse(None, "phasequant kwantize MODEL", False)
    with pytest.raises(phasequant.PhaseQuantError):
        test_commands_parse(None, "phasequant quantize MODEL -o out --set weights.bit=4 -r quarot", True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_named_exists(page):
    """Targets of make, scripts, presets after `--recipe` in the text, environment variables."""
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"\b(?:benchmarks|tests|docs|src)/[\w./-]+\.(?:py|md|json|yaml)\b", text):
        assert (ROOT / script).is_file(), script
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    for variable in re.findall(r"\bPHASEQUANT_[A-Z_]+\b", text):
        assert variable in source, variable
    known = {f"{part}.{key}" for part, info in Recipe.model_fields.items()
             for key in getattr(info.annotation, "model_fields", ())}  # fmt: skip
    parts = "|".join(part for part in Recipe.model_fields if part != "seed")
    for key in re.findall(rf"`((?:{parts})\.[a-z_0-9]+)(?:=[^`]*)?`", text):
        assert key in known, key


# -- messages ------------------------------------------------------------------------------------------------------


@cache
def source_texts() -> list[str]:
    """Every string of the source, as a message has it: what is put in at run time as `…`."""
    found = []
    for path in (ROOT / "src" / "phasequant").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def stands_in_source(fragment: str) -> bool:
    pattern = re.compile(".*?".join(re.escape(part) for part in fragment.split("…")), re.DOTALL)
    return any(pattern.search(text) for text in source_texts())


def test_messages_are_those_of_the_source():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    fragments = re.findall(r"^\*\*`(.+)`\*\*$", page, re.MULTILINE)
    assert len(fragments) > 40 and len(fragments) == page.count("\n**`")
    assert not [fragment for fragment in fragments if not stands_in_source(fragment)]
    assert not stands_in_source("no such message in …")


# -- the site ------------------------------------------------------------------------------------------------------


def test_site_is_whole():
    """Everything that is generated is there and is not empty; links between pages lead somewhere."""
    site = {page.name: GENERATE["fill"](page.read_text(encoding="utf-8")) for page in PAGES[1:]} | GENERATE["pages"]()
    assert "[[generated" not in "".join(site.values()) and "[[file" not in "".join(site.values())
    for path, text in site.items():
        assert text.startswith("# ") and text.count("\n```") % 2 == 0, path
        for link in re.findall(
            r"\]\((?!https?:)([^)#\s]*)(?:#[^)]*)?\)", re.sub(r"^```.*?^```", "", text, flags=16 | 8)
        ):
            assert not link or link in site, f"{path} links to {link}"
    nav = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {page.name for page in PAGES[1:]} == {*nav, "methods.md"}
    for name in phasequant.__all__:
        assert f"## phasequant.{name}\n" in site["python.md"]
    for part, info in Recipe.model_fields.items():
        for key in getattr(info.annotation, "model_fields", ()):
            assert f"| `{part}.{key}` |" in site["recipes.md"]
    for command in ("quantize", "bench decode", "serve"):
        assert f"## phasequant {command}\n" in site["cli.md"]


def test_docstrings_become_markdown():
    text = "One.\n\n    y = x·Wᵀ\n\n    second\n\nTwo, a < b (arXiv 2404.00456).\n    not code"
    assert GENERATE["markdown"](text) == (
        "One.\n\n```text\ny = x·Wᵀ\n\nsecond\n```\n\nTwo, a &lt; b ([arXiv 2404.00456](https://arxiv.org/abs/2404.00456)).\n"
        "    not code"
    )


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="`make docs` installs mkdocs")
def test_mkdocs_knows_all_pages():
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"))
    nav = str(GENERATE["on_config"](config).nav)
    assert all(path in nav for path in GENERATE["pages"]())


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-bias", "llama-odd", "qwen3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_sizes_are_those_of_a_model(name, bits, tiny, text_file):
    """The tables' functions against what a quantized model stores; biases and a tied embedding apart."""
    set_quiet(True)
    source = tiny(name)
    grids = [f"{part}.bits={bits}" for part in ("weights", "kv")]
    made = phasequant.quantize(source, "16bit", overrides=[*grids, f"calibration.text={text_file}"])
    biases = sum(2 * t.numel() for n, t in made.model.state_dict().items() if n.endswith("bias"))
    tied = 2 * made.model.get_input_embeddings().weight.numel() * made.model.config.tie_word_embeddings
    stored = weight_bytes(made.model) - biases + tied
    assert stored == SIZES["weight_bytes"](source.map, bits)
    assert kv_bytes_per_token(made.model, source.map) == SIZES["kv_bytes"](source.map, bits)


def test_sixteen_bits_are_those_of_the_shape(tiny):
    source = tiny("llama-odd")
    assert weight_bytes(source.model) == SIZES["weight_bytes"](source.map, 16)
    assert kv_bytes_per_token(source.model, source.map) == SIZES["kv_bytes"](source.map, 16)
