r"""PrefixQuant's prefix: the tokens that are outliers most often, then the begin token (arXiv 2410.05265).

    M_t = max_j |X_tj|  at down's input of every block;    t is an outlier where M_t > η·median_t M,  η = 64
    o = ceil( max over blocks of the mean over sequences of how many outliers there are )
    prefix = the o ids that are outliers most often, the most frequent first, then begin

The first token of a sequence, whatever it is, is left out of both counts: begin takes its place. One lone id that is an
outlier in fewer than a tenth of the sequences is dropped. Source: the paper and its `stat_utils.py`.
"""

import math
from collections import Counter
from typing import Any

from jaxtyping import Int
from torch import Tensor

from phasequant.observe.spikes import Spikes

RARE = 0.1


def outlier_tokens(
    spikes: Spikes, tokens: Int[Tensor, "S T"], begin: int | None, eta: float
) -> tuple[list[int], dict[str, Any]]:
    """(prefix, numbers of the search)."""
    most, where = 0.0, -1
    often: Counter[int] = Counter()
    sequences: dict[int, set[int]] = {}
    for (block, group), s in spikes.items():
        if group != "down":
            continue
        outlier = s > eta * s.median(-1, keepdim=True).values
        outlier[:, 0] = False
        mean = float(outlier.sum(-1).float().mean())
        if mean > most:
            most, where = mean, block
        for sequence, at in outlier.nonzero().tolist():
            token = int(tokens[sequence, at])
            often[token] += 1
            sequences.setdefault(token, set()).add(sequence)
    count = math.ceil(most)
    chosen = [token for token, _ in often.most_common(count)]
    if len(chosen) == 1 and len(sequences[chosen[0]]) < RARE * len(tokens):
        chosen = []
    notes = {"outliers": round(most, 3), "block": where, "eta": eta}
    return [*chosen, *([] if begin is None else [begin])], notes
