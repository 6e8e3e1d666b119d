"""Perplexity block by block: for a search on a model that stays in host memory while its blocks visit a device."""

import math

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from phasequant.arch import ModelMap
from phasequant.evaluate.perplexity import nll
from phasequant.nn import logits_of
from phasequant.stream import BlockStream, resident


@torch.no_grad()
def streamed_perplexity(
    model: PreTrainedModel, model_map: ModelMap, tokens: Int[Tensor, "sequences T"], device: torch.device, title: str
) -> float:
    """exp of the mean over sequences of their mean negative log-likelihood."""
    stream = BlockStream(model, model_map, tokens, device, spread=True)
    for _ in stream.steps(title):
        pass
    norm = model.get_submodule(model_map.family.final_norm)
    head = model.get_submodule(model_map.family.head)
    total = 0.0
    with resident(norm, device), resident(head, device):
        for row, ids in zip(stream.hidden, tokens[stream.dealt.mine], strict=True):
            total += nll(logits_of(model, model_map, row.to(device)), ids)
    mean = stream.dealt.total(total) / len(tokens)
    return math.exp(mean) if mean < 700 else math.inf
