"""A recipe in words: YAML with a comment on every key, and its mistakes as a person reads them."""

import reprlib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from phasequant.errors import did_you_mean


class _Dumper(yaml.SafeDumper):
    """Plain values, each written out where it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        """All."""
        return True


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is dict:
        return "mapping"
    arguments = get_args(annotation)
    if not arguments:
        return getattr(annotation, "__name__", str(annotation))
    if "Literal" in str(annotation).split("[")[0]:
        return " | ".join(str(a) for a in arguments)
    if "Annotated" in str(type(annotation)):
        return _type_name(arguments[0])
    return " | ".join(_type_name(a) for a in arguments)


def _in_one_line(value: Any) -> str:
    """A value as YAML that reads back as itself."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=float("inf"))
    lines = text.removesuffix("...\n").splitlines()
    if len(lines) == 1:
        return lines[0]
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, default_style='"', width=float("inf")).strip()


def commented(model: type[BaseModel], values: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, info in model.model_fields.items():
        value = values[name]
        part = info.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            lines += ["", f"{indent}# {info.description}", f"{indent}{name}:"]
            lines += commented(part, value, indent + "  ")
        else:
            default = yaml.safe_dump(info.default, default_flow_style=True).splitlines()[0]
            shown = _in_one_line(value)
            if not indent:
                lines.append("")
            lines.append(f"{indent}# {info.description} [{_type_name(info.annotation)}; default {default}]")
            lines.append(f"{indent}{name}: {shown}")
    return lines[1:] if not indent else lines


def explain(problem: Any, model: type[BaseModel]) -> str:
    """One problem that validation found, with the key and the nearest right one."""
    place = [str(step) for step in problem["loc"]]
    if not place:
        return f"the recipe does not fit together: {problem['msg'].removeprefix('Value error, ')}"
    fields: Mapping[str, Any] = model.model_fields
    if len(place) > 1 and place[0] in fields:
        fields = fields[place[0]].annotation.model_fields
    path = ".".join(place[:2])
    if problem["type"] == "extra_forbidden":
        return f"unknown recipe key '{path}': {did_you_mean(place[-1], fields)}"
    given = problem.get("input")
    if problem["type"] == "literal_error" and isinstance(given, str):
        choices = [a for a in get_args(fields[place[1]].annotation) if isinstance(a, str)] if len(place) > 1 else []
        if choices:
            return f"recipe key '{path}' cannot be '{given}': {did_you_mean(given, choices)}"
    return f"recipe key '{path}' cannot be {reprlib.repr(given)}: {problem['msg'].removeprefix('Value error, ')}"
