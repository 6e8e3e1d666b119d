r"""Perplexity, and KL divergence to the 16-bit original, on the same tokens.

    PPL = exp( mean over chunks of mean over t of -log p(x[t+1] | x[≤t]) )
    KL  = mean over chunks and t of Σ_v p16(v) · ( log p16(v) - log p(v) )      nats a token

Chunks are `text.chunks`: 2048 tokens, not overlapping, no BOS of their own; each predicts its last 2047. Candidates and
the original run chunk by chunk side by side, so that one chunk's logits are all that is held, and any number of
candidates costs one pass of the original.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import exp
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from phasequant.console import progress
from phasequant.errors import PhaseQuantError
from phasequant.nn import row_share
from phasequant.ranks import Dealt

ROWS = 256  # of logits turned into probabilities at once

Candidate: TypeAlias = PreTrainedModel | Callable[[], AbstractContextManager[PreTrainedModel]]
"""A model, or what opens one for the time of a chunk (a plan put on a shared model)."""


@dataclass(frozen=True)
class Score:
    """Means over chunks; `kl` is None without an original. Bootstraps can resample the per-chunk values. `rows`: of the
    multiply-adds of groups with per-token precision, the share that single rows read in 8 bits."""

    ppl: float
    kl: float | None
    nll_by_chunk: tuple[float, ...]
    kl_by_chunk: tuple[float, ...]
    rows: float | None = None


@torch.no_grad()
def _logits(model: PreTrainedModel, chunk: Int[Tensor, " T"]) -> Float[Tensor, "T V"]:
    device = next(model.parameters()).device
    return model(input_ids=chunk[None].to(device), use_cache=False).logits[0]


def nll(logits: Float[Tensor, "T V"], chunk: Int[Tensor, " T"]) -> float:
    """Mean negative log-likelihood of a chunk's tokens after its first, nats."""
    targets = chunk[1:].to(logits.device)
    total = 0.0
    for rows, wanted in zip(logits[:-1].split(ROWS), targets.split(ROWS), strict=True):
        total += float(torch.nn.functional.cross_entropy(rows.float(), wanted, reduction="sum"))
    return total / len(targets)


def kl_divergence(original: Float[Tensor, "T V"], logits: Float[Tensor, "T V"]) -> float:
    """Mean KL(original ‖ logits) over the positions that predict, nats."""
    total = 0.0
    for p_rows, q_rows in zip(original[:-1].split(ROWS), logits[:-1].split(ROWS), strict=True):
        log_p = p_rows.float().log_softmax(-1)
        log_q = q_rows.to(p_rows.device).float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / (len(original) - 1)


def _open(candidate: Candidate) -> AbstractContextManager[PreTrainedModel]:
    return nullcontext(candidate) if isinstance(candidate, PreTrainedModel) else candidate()


def _score(nlls: list[float], kls: list[float], rows: list[float]) -> Score:
    mean = sum(nlls) / len(nlls)
    return Score(
        exp(mean) if mean < 700 else float("inf"),
        sum(kls) / len(kls) if kls else None,
        (*nlls,),
        (*kls,),
        sum(rows) / len(rows) if rows else None,
    )


def score(
    candidates: Mapping[str, Candidate],
    chunks: Int[Tensor, "chunks T"],
    original: PreTrainedModel | None = None,
) -> tuple[dict[str, Score], Score | None]:
    """Scores of every candidate, and of the original if there is one."""
    nlls: dict[str, list[float]] = {name: [] for name in candidates}
    kls: dict[str, list[float]] = {name: [] for name in candidates}
    rows: dict[str, list[float]] = {name: [] for name in candidates}
    original_nlls: list[float] = []
    runs = len(candidates) + (original is not None)
    dealt = Dealt.of(len(chunks))
    with progress("evaluate", len(dealt.mine) * runs) as tick:
        for chunk in chunks[dealt.mine]:
            reference = None
            if original is not None:
                reference = _logits(original, chunk)
                original_nlls.append(nll(reference, chunk))
                tick()
            for name, candidate in candidates.items():
                with _open(candidate) as model:
                    row_share(model, forget=True)
                    logits = _logits(model, chunk)
                    if (counted := row_share(model, forget=True)) is not None:
                        rows[name].append(counted)
                if not torch.isfinite(logits).all():
                    raise PhaseQuantError(
                        f"'{name}' produced NaN or infinite logits: its weights or scales are damaged"
                    )
                nlls[name].append(nll(logits, chunk))
                if reference is not None:
                    kls[name].append(kl_divergence(reference, logits))
                tick()
    full = _score(dealt.ordered(original_nlls), [], []) if original is not None else None
    return {
        name: _score(
            dealt.ordered(nlls[name]),
            dealt.ordered(kls[name]) if original is not None else [],
            dealt.ordered(rows[name]) if rows[name] else [],
        )
        for name in candidates
    }, full
