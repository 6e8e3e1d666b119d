"""Whether a run streams: where it must (`--stream`), or the model would not fit into memory; and what cannot."""

from pathlib import Path

from phasequant.checkpoint import is_checkpoint
from phasequant.console import note
from phasequant.errors import PhaseQuantError
from phasequant.recipe import Recipe
from phasequant.sensitivity import RUNS_MODEL
from phasequant.streaming.memory import available
from phasequant.streaming.tensors import SourceTensors, weight_files

SHARE = 0.8  # of the memory that is free: a model that would take more is streamed
WIDE = 4  # bytes of a weight in memory on a CPU


def unstreamable(recipe: Recipe) -> str | None:
    """Why a recipe needs the whole model at once; None where it goes block by block."""
    if recipe.transform.method == "spin":
        return (
            "transform.method=spin learns its rotations end to end, through the whole model (what a machine with more "
            "memory has learned, transform.method=load takes)"
        )
    if recipe.finetune.on:
        return (
            "finetune polishes against the 16-bit model, both of them in memory (finetune.steps=0 and "
            "finetune.epochs=0 turn it off)"
        )
    if recipe.policy.name == "budget" and recipe.policy.score in RUNS_MODEL:
        return f"policy.score={recipe.policy.score} runs the whole model (policy.score=noise does not)"
    return None


def should_stream(name: str, recipe: Recipe, wanted: bool | None) -> Path | None:
    """The directory of a model that is to be streamed; None where it is opened whole. `wanted`: None leaves the choice
    to the memory that is free. Raises where streaming was asked for and cannot be."""
    path = Path(name).expanduser()
    why = None
    if not path.is_dir():
        why = "only a directory of safetensors is read block by block, and this is none"
    elif is_checkpoint(path):
        why = "it is quantized already"
    elif not weight_files(path):
        why = f"{path} holds no safetensors"
    why = why or unstreamable(recipe)
    if wanted:
        if why is not None:
            raise PhaseQuantError(f"'{name}' cannot be streamed: {why}; leave --stream away")
        return path
    if wanted is False or (why is not None and not path.is_dir()):
        return None
    if not weight_files(path):
        return None
    dense, free = WIDE * SourceTensors(path).numbers, available()
    if dense <= SHARE * free:
        return None
    said = f"'{name}' takes {dense / 2**30:.1f} GiB in memory, and {free / 2**30:.1f} GiB are free"
    if why is not None:
        note(f"{said}; it cannot be streamed: {why}")
        return None
    note(f"{said}: it is streamed, block by block")
    return path
