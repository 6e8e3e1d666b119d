r"""Generation with static shapes: prefill once, then one CUDA graph a token, for a quantized or a 16-bit model alike.

    prefill   (B, T) tokens, padded on the right → cache, logits of each row's last token; a graph for every T, rounded
              up to `BUCKET`, the last `KEPT` of which are kept
    decode    (B, 1) tokens at each row's own length, in place: embedding to next token is one graph, replayed

Rows have their own lengths, on the device: a graph reads them, so it is captured once for a batch and a capacity. A
graph is run once before it is captured (kernels are compiled then). On a CPU the same steps run without graphs. Tokens
are Transformers' greedy tokens (`tests/test_runtime.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from phasequant.errors import PhaseQuantError
from phasequant.nn import prefix_length
from phasequant.runtime.cache import make_cache
from phasequant.runtime.decoder import Decoder, window_of

WARM_UPS = 2
BUCKET, KEPT = 64, 4


@dataclass
class _Fill:
    """A captured prefill and what it reads and writes."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    ends: Tensor
    logits: Tensor


def captured(
    call: Callable[[], Tensor],
    warm_ups: int,
    *,
    after: Callable[[], None] = lambda: None,
    last: Callable[[], Tensor] | None = None,
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `last` (or `call`) and its result, after some calls on another stream; `after`: what puts the state
    right before it is captured, and once it was."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            call()
        after()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = (last or call)()
    after()
    return graph, result


@dataclass
class Runner:
    """A decoder with a cache of `batch` rows of `capacity` tokens. `flash`: see `cache`; for timing alone."""

    decoder: Decoder
    batch: int
    capacity: int
    flash: bool = False

    def __post_init__(self) -> None:
        device = self.decoder.device
        window = window_of(self.decoder.model)
        if window is not None and self.capacity > window:
            raise PhaseQuantError(
                f"this model's tokens see {window} back, and the runtime has no sliding windows: a capacity of "
                f"{self.capacity} is refused; take {window} at most, or run it in Transformers"
            )
        self.cache = make_cache(self.decoder, self.batch, self.capacity, flash=self.flash)
        self.offset = prefix_length(self.decoder.model, self.decoder.map)
        self.tokens = torch.zeros(self.batch, 1, dtype=torch.long, device=device)
        self.logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._fills: dict[int, _Fill] = {}

    @classmethod
    def of(
        cls, model: PreTrainedModel, batch: int, capacity: int, *, release: bool = False, flash: bool = False
    ) -> "Runner":
        """From a Transformers model, quantized or not."""
        return cls(Decoder(model, release=release), batch, capacity, flash)

    @torch.no_grad()
    def prefill(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B V"]:
        """Fill the cache anew; logits after each row's last token. `lengths`: of the rows, if padded on the right."""
        batch, count = tokens.shape
        if batch != self.batch or count > self.capacity:
            raise PhaseQuantError(
                f"this runner holds {self.batch} rows of {self.capacity} tokens, and was given {batch} of {count}"
            )
        ends = torch.full((batch,), count, device=tokens.device) if lengths is None else lengths.to(tokens.device)
        if self.decoder.device.type != "cuda":
            return self._fill(tokens, ends)
        width = min(-(-count // BUCKET) * BUCKET, self.capacity)
        if width not in self._fills:
            self._capture_fill(width)
        fill = self._fills[width]
        fill.tokens[:, :count].copy_(tokens)
        fill.ends.copy_(ends)
        fill.graph.replay()
        self.cache.set_lengths(ends)
        return fill.logits

    def _fill(self, tokens: Tensor, ends: Tensor) -> Tensor:
        batch, count = tokens.shape
        self.cache.reset()
        positions = torch.arange(count, device=tokens.device).expand(batch, -1) + self.offset
        hidden = self.decoder.hidden(tokens, positions, self.cache, None)
        self.cache.set_lengths(ends)
        return self.decoder.logits(hidden[torch.arange(batch, device=tokens.device), ends - 1])

    def _capture_fill(self, width: int) -> None:
        while len(self._fills) >= KEPT:
            self._fills.pop(next(iter(self._fills)))
        device = self.decoder.device
        tokens = torch.zeros(self.batch, width, dtype=torch.long, device=device)
        ends = torch.full((self.batch,), width, device=device)
        graph, logits = captured(lambda: self._fill(tokens, ends), 1)
        self._fills[width] = _Fill(graph, tokens, ends, logits)

    def _step(self) -> Tensor:
        positions = self.cache.lengths[:, None].long() + self.offset
        hidden = self.decoder.hidden(self.tokens, positions, self.cache, self.cache.mask())
        logits = self.decoder.logits(hidden[:, -1])
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        self.cache.advance(1)
        return logits

    @torch.no_grad()
    def decode(self) -> Float[Tensor, "B V"]:
        """Logits after `self.tokens`, which become the likeliest next ones."""
        if self.decoder.device.type != "cuda":
            return self._step()
        if self._graph is None:
            self._capture()
        assert self._graph is not None and self.logits is not None
        self._graph.replay()
        return self.logits

    def _capture(self) -> None:
        kept = self.tokens.clone(), self.cache.lengths.clone()

        def step() -> Tensor:
            self._restore(*kept)
            return self._step()

        self._graph, self.logits = captured(step, WARM_UPS, after=lambda: self._restore(*kept), last=self._step)

    def _restore(self, tokens: Tensor, lengths: Tensor) -> None:
        self.tokens.copy_(tokens)
        self.cache.set_lengths(lengths)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]] | Int[Tensor, "B T"], new: int, stop: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy continuations of up to `new` tokens, ended before a token of `stop`."""
        rows = prompts.tolist() if isinstance(prompts, Tensor) else [list(row) for row in prompts]
        longest = max(len(row) for row in rows)
        if longest + new > self.capacity:
            raise PhaseQuantError(f"{longest} tokens and {new} new ones do not fit the capacity of {self.capacity}")
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.decoder.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.decoder.device)
        self.tokens.copy_(self.prefill(padded, lengths).argmax(-1, keepdim=True))
        found: list[Tensor] = [self.tokens.clone()]
        for _ in range(new - 1):
            self.decode()
            found.append(self.tokens.clone())
        ends = set(stop)
        told: list[list[int]] = []
        for row in torch.cat(found, 1).tolist():
            cut = next((at for at, token in enumerate(row) if token in ends), len(row))
            told.append(row[:cut])
        return told


def describe(runner: Runner) -> dict[str, Any]:
    """What runs: kernels and entrances by group, attention, cache."""
    return {"linears": runner.decoder.describe(), "cache": runner.cache.describe()}
