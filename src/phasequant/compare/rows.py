"""The rows of the recipes: those that were finished earlier, and the others made now, here or by several processes."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from phasequant import pipeline
from phasequant.compare.asked import Asked
from phasequant.compare.measure import Comparison
from phasequant.console import note, progress, set_quiet, warn
from phasequant.errors import PhaseQuantError
from phasequant.recipe import Recipe


def make_rows(comparison: Comparison, asked: Asked, name: str, recipe: Recipe) -> list[dict[str, Any]]:
    """The rows of a recipe under every policy: those that were finished earlier, and the others made now."""
    rows, wanted = comparison.rows, asked.wanted(recipe)
    ready = {one.policy.name: row for one in wanted if (row := rows.read(one)) is not None}
    missing = [one for one in wanted if one.policy.name not in ready]
    if ready:
        note(f"{name}: {len(ready)} of {len(wanted)} rows were finished earlier")
    drafts: dict[str, pipeline.Transformed] = {}
    try:
        if missing and not pipeline.sees_plan(recipe):
            for row in comparison.once(name, missing):
                ready[row["policy"]] = row
        else:
            for one in missing:
                for row in comparison.learned(name, one, drafts):
                    ready[row["policy"]] = row
    except PhaseQuantError as error:
        warn(f"{name}: {error}")
        for one in missing:
            if one.policy.name not in ready:
                ready[one.policy.name] = _failed(name, one, error)
    return [{**ready[one.policy.name], "recipe": name} for one in wanted]


def _failed(name: str, recipe: Recipe, error: BaseException) -> dict[str, Any]:
    return {"recipe": name, "policy": recipe.policy.name, "seed": recipe.seed, "error": str(error)}


_here: Comparison | None = None  # of a worker, opened once


def _work(asked: Asked, index: int) -> list[dict[str, Any]]:
    global _here
    if _here is None:
        _here = asked.open()
    return make_rows(_here, asked, *asked.recipes[index])


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    set_quiet(True)  # the parent tells what is done


def in_processes(asked: Asked, workers: int) -> dict[int, list[dict[str, Any]]]:
    """Rows by index of recipe, made by several processes. A row that fails is told as such; a process that dies is an
    error, after which the rows that were finished remain."""
    threads = max(1, torch.get_num_threads() // workers)
    found: dict[int, list[dict[str, Any]]] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (threads,))
    try:
        waiting = {pool.submit(_work, asked, index): index for index in range(len(asked.recipes))}
        with progress(f"compare, {workers} processes", len(waiting)) as tick:
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                tick()
    except BrokenProcessPool as error:
        raise PhaseQuantError("a worker ended before its rows were done: run the same command again") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return found
