"""`phasequant recipes`: the presets and their keys."""

from typing import Annotated

import typer
from rich.table import Table

from phasequant.cli.options import Json, Sets, emit
from phasequant.console import out


def recipes(
    name: Annotated[str | None, typer.Argument(help="print this one, with a comment on every key")] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """List the presets, or print one whole."""
    from phasequant.recipe import Recipe, parts, presets

    if name is not None:
        recipe = Recipe.load(name, sets or [])
        print(recipe.to_yaml(), end="")
        emit(recipe.to_dict(), as_json)
        return
    shown = Table(box=None, show_header=False, pad_edge=False)
    for preset, line in presets().items():
        shown.add_row(preset, line)
    out.print(shown)
    out.print("\nparts, for `compose:` in a recipe of yours:")
    shown = Table(box=None, show_header=False, pad_edge=False)
    for part, line in parts().items():
        shown.add_row(part, line)
    out.print(shown)
    emit({"presets": presets(), "parts": parts()}, as_json)
