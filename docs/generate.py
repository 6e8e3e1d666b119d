"""What the site says that the code says already, made from the code when the site is built: nothing of it is committed.

`PARTS` fills lines `[[generated: NAME]]` of the hand-written pages and `[[file: PATH]]` puts a file in; `pages` are the
pages that are generated whole. MkDocs calls the functions at the end (`hooks` in mkdocs.yml).
"""

import ast
import inspect
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pygments.formatters import HtmlFormatter

import phasequant
from phasequant.cli import app
from phasequant.recipe import Recipe, presets
from phasequant.recipe.words import _in_one_line, _type_name

DOCS = Path(__file__).parent
PACKAGE = Path(phasequant.__file__).parent
LINE = re.compile(r"^\[\[(generated|file): ([\w./-]+)\]\]$", re.MULTILINE)
SHORTEST = 250  # characters of a docstring that is a method's
METHODS = {
    "transform": "Transforms: making activations flat",
    "weight": "Weights",
    "isolate": "Spikes",
    "plan": "Plans",
    "sensitivity": "Sensitivities: how harm is measured",
    "finetune": "Polish",
    "nn": "What stands in a quantized model",
    "numerics": "Grids and matrices",
    "optim": "Optimizers",
    "streaming": "Models larger than memory",
    "serving": "vLLM",
    "export": "Stock checkpoints",
    "doctor": "Doctor",
}
"""Package → its heading, in the order of a run."""


def markdown(text: str) -> str:
    """A docstring as Markdown: indented runs are its equations and tables, shown as they stand."""
    lines: list[str] = []
    fenced = False
    block = inspect.cleandoc(text).splitlines()
    for at, line in enumerate(block):
        following = next((later for later in block[at:] if later.strip()), "")
        if fenced and line and not line.startswith("    "):
            lines += ["```", ""]
            fenced = False
        elif not fenced and line.startswith("    ") and (not at or not block[at - 1].strip()):
            lines += ["```text"]
            fenced = True
        if fenced and not line and not following.startswith("    "):
            lines += ["```"]
            fenced = False
        lines.append(line[4:] if fenced else _linked(line))
    return "\n".join([*lines, "```"] if fenced else lines)


def _linked(line: str) -> str:
    """Papers by their number; `<` is no tag."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", line.replace("<", "&lt;"))


@cache
def methods() -> tuple[tuple[str, str, str], ...]:
    """(package, module, docstring) of everything that explains a method."""
    return tuple(_methods())


def _methods() -> Iterator[tuple[str, str, str]]:
    for package in METHODS:
        for path in sorted((PACKAGE / package).glob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            if len(docstring) >= SHORTEST:
                yield package, package if path.stem == "__init__" else path.stem, docstring


def _title(docstring: str) -> str:
    """The docstring's first sentence, without its full stop."""
    first = docstring.split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[\w)`])\.(?: |$)", first)[0].rstrip(":")


@cache
def _presets() -> dict[str, Recipe]:
    return {name: Recipe.load(name) for name in presets()}


def _used_by(package: str, module: str) -> str:
    """Which presets choose a method by this name."""
    key = {"transform": "transform", "weight": "weights"}.get(package)
    name = module.replace("_", "-")
    chosen = [p for p, recipe in _presets().items() if key and getattr(recipe, key).method == name]
    return f"\n`{key}.method={name}`; presets: {', '.join(f'`{p}`' for p in chosen)}.\n" if chosen else ""


def pages() -> dict[str, str]:
    """Path → Markdown of every page that is generated whole: one a method."""
    found = {}
    for package, module, docstring in methods():
        file = f"src/phasequant/{package}/{'__init__' if module == package else module}.py"
        body = markdown(docstring)
        found[f"methods/{package}/{module}.md"] = (
            f"# {module}\n\n{body}\n{_used_by(package, module)}\n---\n\nFrom `{file}`, whose docstring this is.\n"
        )
    return found


def method_list() -> str:
    """Links to all of them, by package."""
    lines: list[str] = []
    for package, heading in METHODS.items():
        lines += ["", f"## {heading}", ""]
        lines += [
            f"- [{module}](methods/{package}/{module}.md): {_linked(_title(docstring))}"
            for name, module, docstring in methods()
            if name == package
        ]
    return "\n".join(lines)


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def recipe_keys() -> str:
    """A table a part of the recipe: key, type, default, meaning."""
    lines = []
    for name, info in Recipe.model_fields.items():
        part = info.annotation
        whole = isinstance(part, type) and issubclass(part, BaseModel)
        fields = part.model_fields if whole else {name: info}  # type: ignore[union-attr]
        lines += ["", f"## {name}", "", f"{info.description[0].upper()}{info.description[1:]}." if whole else ""]
        lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in fields.items():
            path = f"{name}.{key}" if whole else key
            default = _in_one_line(list(field.default) if isinstance(field.default, tuple) else field.default)
            kind = _cell(_type_name(field.annotation))
            lines.append(f"| `{path}` | {kind} | `{default}` | {_cell(field.description)} |")
    return "\n".join(lines)


def shelf(folder: str) -> Callable[[], str]:
    """Presets or parts, each with the comment that its file begins with."""

    def listed() -> str:
        lines = ["| name | what it is |", "|---|---|"]
        for path in sorted((PACKAGE / folder).glob("*.yaml")):
            text = path.read_text(encoding="utf-8").splitlines()
            comment = [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text)]
            lines.append(f"| `{path.stem}` | {_cell(' '.join(comment))} |")
        return "\n".join(lines)

    return listed


def _option(parameter: Any) -> str:
    default = parameter.default
    shown = f" [{default}]" if default not in (None, False, ()) and not callable(default) else ""
    meaning = _cell(f"{parameter.help or ''}{shown}")
    value = parameter.metavar or parameter.name.upper()
    if parameter.param_type_name == "argument":
        return f"| `{value}` | {meaning} |"
    words = ", ".join(f"`{word}`" for word in (*parameter.opts, *parameter.secondary_opts))
    return f"| {words}{'' if parameter.is_flag else f' {_cell(value)}'} | {meaning} |"


def command_line() -> str:
    """Every command with its arguments and options."""
    lines: list[str] = []

    def show(name: str, command: Any) -> None:
        inner = getattr(command, "commands", None)
        if inner is None:
            lines.extend(["", f"## {name}", "", _linked(inspect.cleandoc(command.help or "")), ""])
            lines.extend(
                ["| argument, option | meaning [default] |", "|---|---|", *(_option(p) for p in command.params)]
            )
        for word, one in sorted((inner or {}).items()):
            show(f"{name} {word}", one)

    show("phasequant", typer.main.get_command(app))
    return "\n".join(lines)


def _public(owner: type) -> Iterator[tuple[str, Any]]:
    """A class's own methods with docstrings."""
    for name, member in vars(owner).items():
        plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if not name.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, property)) and plain.__doc__:
            yield name, plain


def _bare(text: str) -> str:
    """Names without their modules."""
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text.replace("'", ""))


def _signature(found: Any) -> str:
    """A call, on one line where it fits."""
    signature = inspect.signature(found)
    named: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in named:
            named.append("*")
        named.append(str(parameter))
    end = signature.return_annotation
    end = "" if end is signature.empty else f" -> {inspect.formatannotation(end)}"
    named, end = [_bare(one) for one in named], _bare(end)
    whole = f"({', '.join(named)}){end}"
    return whole if len(whole) < 90 else "(\n    " + ",\n    ".join(named) + f"\n){end}"


def python_api() -> str:
    """Every public name with its signature and docstring."""
    lines: list[str] = []
    for name in phasequant.__all__:
        found = getattr(phasequant, name)
        error = isinstance(found, type) and issubclass(found, Exception)
        shown = "" if error or (isinstance(found, type) and issubclass(found, BaseModel)) else _signature(found)
        lines += [
            "",
            f"## phasequant.{name}",
            "",
            "```text",
            f"{name}{shown}",
            "```",
            "",
            markdown(found.__doc__ or ""),
        ]
        if isinstance(found, type) and not error:
            for method, plain in _public(found):
                call = f".{method}" if isinstance(plain, property) else f".{method}{_signature(plain)}"
                lines += ["", f"### {name}.{method}", "", "```text", call, "```", "", markdown(plain.__doc__)]
    return "\n".join(lines)


@cache
def _tables() -> dict[str, str]:
    found: dict[str, str] = runpy.run_path(str(DOCS / "sizes.py"))["tables"]()
    return found


def _sizes(table: str) -> Callable[[], str]:
    return lambda: _tables()[table]


PARTS: dict[str, Callable[[], str]] = {
    "methods": method_list,
    "recipe-keys": recipe_keys,
    "presets": shelf("recipes"),
    "parts": shelf("recipes/parts"),
    "command-line": command_line,
    "python": python_api,
    **{f"sizes-{table}": _sizes(table) for table in ("weights", "cache", "shares", "online")},
}
"""Name → Markdown."""


def fill(text: str) -> str:
    """A page with its generated parts and files in place."""

    def put(found: re.Match[str]) -> str:
        kind, name = found.groups()
        if kind == "generated":
            return PARTS[name]()
        return f"```python\n{(DOCS / name).read_text(encoding='utf-8').rstrip()}\n```"

    return LINE.sub(put, text)


def on_config(config: Any) -> Any:
    """The method pages take their place in the navigation."""
    by_package: dict[str, list[Any]] = {heading: [] for heading in METHODS.values()}
    for package, module, _ in methods():
        by_package[METHODS[package]].append({module: f"methods/{package}/{module}.md"})
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = ["methods.md", *({heading: found} for heading, found in by_package.items())]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The generated pages become files of the site."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    files.append(File.generated(config, "pygments.css", content=HtmlFormatter().get_style_defs(".codehilite")))
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    """The generated parts of hand-written pages."""
    return fill(text)


if __name__ == "__main__":
    print(fill((DOCS / sys.argv[1]).read_text(encoding="utf-8")))
