"""The standard cut: text tokenized once, non-overlapping sequences of equal length, the tail dropped.

This is the protocol of GPTQ, QuaRot, SpinQuant and FlatQuant, by their code: whatever the tokenizer adds at the very
start (LLaMA's BOS, nothing for SmolLM2) is there once; no chunk gets a BOS of its own.

Calibration text may be cut elsewhere: with a seed other than 0 the same number of sequences begins anywhere in the
text, none over another, every such choice as likely as any other.
"""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from phasequant.errors import PhaseQuantError
from phasequant.text.corpus import Corpus


def tokenize(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " tokens"]:
    """Token ids of the whole text."""
    ids = tokenizer(corpus.text, return_tensors="pt", verbose=False)["input_ids"]
    return torch.as_tensor(ids)[0].to(torch.int64)


def cut(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None, seed: int = 0
) -> Int[Tensor, "chunks length"]:
    """The first `most` sequences of `length` tokens (all, if None); an error where the text holds not even one. With a
    `seed` other than 0 as many from anywhere, in any order, without overlap; the same ones for the same seed."""
    if length < 2:
        raise PhaseQuantError(f"a sequence needs at least 2 tokens, not {length}")
    if most is not None and most < 1:
        raise PhaseQuantError(f"at least 1 sequence is needed, not {most}")
    ids = tokenize(corpus, tokenizer)
    count = len(ids) // length
    if count == 0:
        raise PhaseQuantError(
            f"the text {corpus.source} has {len(ids)} tokens, fewer than one sequence of {length}: "
            f"give a longer text or shorter sequences"
        )
    count = min(count, most) if most is not None else count
    if seed == 0:
        return ids[: count * length].view(count, length)
    return torch.stack([ids[start : start + length] for start in _starts(len(ids), length, count, seed)])


def _starts(tokens: int, length: int, count: int, seed: int) -> list[int]:
    """Where `count` sequences begin that do not overlap: the tokens between them are dealt out at random."""
    draw = torch.Generator().manual_seed(seed)
    gaps = torch.randint(tokens - count * length + 1, (count,), generator=draw).sort().values
    starts = gaps + length * torch.arange(count)
    order: list[int] = starts[torch.randperm(count, generator=draw)].tolist()
    return order


def digest(tokens: Int[Tensor, "chunks length"]) -> str:
    """SHA-256 of the token ids, for manifests."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
