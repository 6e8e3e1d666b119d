"""`Prefix`: which tokens stand before every sequence with 16-bit keys and values, who chose them, and on what grounds.

    qfep           [begin, c, t]: a spiking token after the context that makes only its first occurrence spike (`qfep`)
    prefixquant    the most frequent outlier tokens, then begin (`prefixquant`)
    bos            [begin]
    tokens         the ids that the recipe gives

Tokens that spike take the model's one large sink; once they have stood before a sequence, its own tokens no longer
spike. `begin` is the tokenizer's BOS, EOS where it has none. What a prefix does to the ratios is measured by the run
(observations before and after), not assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.isolate.prefixquant import outlier_tokens
from phasequant.isolate.qfep import spiking_prefix
from phasequant.observe import token_spikes
from phasequant.observe.sweep import token_text
from phasequant.recipe import PrefixPart


@dataclass(frozen=True)
class Prefix:
    """Token ids in their order; `texts` as a person reads them; `notes`: numbers of the search."""

    method: str
    tokens: tuple[int, ...]
    texts: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For manifests and reports."""
        return {
            "method": self.method,
            "tokens": list(self.tokens),
            "texts": list(self.texts),
            "position_offset": len(self.tokens),
            "notes": dict(self.notes),
        }


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What begins a text: BOS, or EOS where the tokenizer has no BOS; None where it has neither."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return None if found is None else int(found)


def find_prefix(
    model: PreTrainedModel,
    model_map: ModelMap,
    tokenizer: PreTrainedTokenizerBase,
    part: PrefixPart,
    tokens: Int[Tensor, "sequences T"] | None,
    device: torch.device | None = None,
) -> Prefix:
    """The prefix that a recipe's part asks for; `tokens`: calibration text, for the methods that search."""
    begin = begin_token(tokenizer)
    chosen: list[int]
    notes: dict[str, Any] = {}
    if part.method == "tokens":
        chosen = list(part.tokens)
        high = [t for t in chosen if t >= model_map.shape.vocab]
        if high:
            raise PhaseQuantError(
                f"prefix.tokens holds {high[0]}, and the model knows ids 0 to {model_map.shape.vocab - 1}"
            )
    elif part.method == "bos":
        if begin is None:
            raise PhaseQuantError("prefix.method=bos: this tokenizer has no BOS and no EOS token; give prefix.tokens")
        chosen = [begin]
    else:
        assert tokens is not None
        if part.method == "qfep":
            first = [] if begin is None else [begin]
            ahead = torch.tensor(first, dtype=tokens.dtype).expand(len(tokens), -1)
            tokens = torch.cat((ahead, tokens[:, : tokens.shape[1] - len(first)]), 1)
            spikes = token_spikes(model, model_map, tokens, device)
            chosen, notes = spiking_prefix(model, model_map, tokens, spikes, begin, part, device)
        else:
            chosen, notes = outlier_tokens(token_spikes(model, model_map, tokens, device), tokens, begin, part.eta)
        if not chosen:
            raise PhaseQuantError(
                f"prefix.method={part.method} found no token to put before the text, and this tokenizer has no BOS: "
                "the model has no spikes there; leave the prefix away, or give prefix.tokens"
            )
    return Prefix(part.method, tuple(chosen), tuple(token_text(t, tokenizer) for t in chosen), notes)
