r"""Keys, values and queries on their way into vLLM's attention: R3, the KV grid, the prefix.

    q ← q·T^{-T},   k ← K̂(k·T),   v ← V̂(v)          after RoPE; K̂, V̂: rounded to the checkpoint's grid and back
    k, v of a position p < P  ←  the prefix's stored k_p·T, v_p, in 16 bits

vLLM's cache then holds the very numbers that attention over our packed cache reads, in 16 bits: the promised numerics,
without the saving of memory. Its own `int4_per_token_head` cache (CUDA) is another grid, with a rotation of its own:
where it is asked for, ours is left out, and that is said.

Positions come from the attention metadata of the running batch; the tokens of the first P positions must be the
prefix's (`Embedding` compares them), or their places in the cache would not be what the model was measured with.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from phasequant.arch import ModelMap
from phasequant.errors import PhaseQuantError
from phasequant.nn import KVQuantizer, ModelLayout, PrefixStates
from phasequant.serving import cpu_attention
from phasequant.serving.slots import Slots, tensors_of

logger = init_logger(__name__)
OWN_GRID = "int4_per_token_head"
SIXTEEN = ("auto", "bfloat16", "float16", "float32")
FAR = 2**30


def positions(tokens: int, device: torch.device) -> Int[Tensor, " T"] | None:
    """Where each token of the running batch stands in its sequence; padding stands far away. None in a dry run."""
    context = get_forward_context()
    found = getattr(context, "phasequant_positions", None)
    if found is not None and len(found) == tokens:
        return found
    told = context.attn_metadata
    if not told:
        return None
    if not isinstance(told, dict):
        raise PhaseQuantError("a checkpoint with a prefix does not run in microbatches: leave dual-batch overlap off")
    one = next(iter(told.values()))
    starts, lengths = one.query_start_loc.to(device), one.seq_lens.to(device)
    slot = torch.arange(tokens, device=device)
    request = torch.searchsorted(starts[1:].contiguous(), slot, right=True)
    inside = request < len(lengths)
    request = request.clamp(max=len(lengths) - 1)
    counts = starts[1:] - starts[:-1]
    found = lengths[request] - counts[request] + slot - starts[request]
    found = torch.where(inside, found, FAR)
    context.phasequant_positions = found
    return found


class Embedding(UnquantizedEmbeddingMethod):
    """vLLM's own, after comparing the first tokens with the prefix."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self.tokens = torch.tensor(list(tokens))

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Token ids (T,) → (T, D)."""
        where = positions(len(input_), input_.device)
        if where is not None:
            tokens = self.tokens.to(input_.device)
            meant = tokens[where.clamp(0, len(tokens) - 1)]
            asked = where < len(tokens)
            if layer.tp_size > 1:  # ids come less the first of this device's rows
                held = layer.shard_indices
                first, end = held.org_vocab_start_index, held.org_vocab_end_index
                asked &= (meant >= first) & (meant < end)
                meant = meant - first
            if bool((asked & (input_ != meant)).any()):
                raise PhaseQuantError(
                    f"a prompt does not begin with this checkpoint's prefix {tokens.tolist()}: the process that takes "
                    "the prompts runs without PhaseQuant's plugin; install phasequant there, and see that VLLM_PLUGINS "
                    "does not leave it out"
                )
        return super().embedding(layer, input_)


class RoundedKV(BaseKVCacheMethod):
    """The KV grid and the prefix of one block."""

    def __init__(self, config: QuantizationConfig, layout: ModelLayout, model_map: ModelMap, block: int) -> None:
        super().__init__(config)
        self.layout, self.shape, self.block = layout, model_map.shape, block

    def create_weights(self, layer: Any) -> None:
        """Slots for the maps of keys and queries and for the prefix's states."""
        device, shape = torch.empty(0).device, self.shape
        kind = layer.kv_cache_dtype
        own = kind == OWN_GRID and device.type == "cuda"
        if kind not in SIXTEEN and not own:
            raise PhaseQuantError(
                f"kv_cache_dtype={kind} would round this checkpoint's keys and values a second time: leave it at auto "
                f"(or, on an NVIDIA GPU, take {OWN_GRID} in place of the checkpoint's grid)"
            )
        self.quantizer = None
        targets = {}
        if self.layout.kv:
            self.quantizer = KVQuantizer(self.layout.kv[self.block], shape.d_head, device)
            targets.update({f"kv_quantizer.{name}": t for name, t in tensors_of(self.quantizer).items()})
        self.prefix = None
        self.by_sequence = cpu_attention.chosen(device)
        if self.layout.prefix is not None:
            longest = get_current_vllm_config().model_config.max_model_len
            if layer.sliding_window is not None and layer.sliding_window < longest:
                raise PhaseQuantError(
                    f"vLLM drops what lies before a sliding window of {layer.sliding_window} tokens, and this "
                    "checkpoint's prefix is there to be seen by all: set max_model_len to the window or less"
                )
            size = (layer.num_kv_heads, len(self.layout.prefix.tokens), shape.d_head)
            dtype = getattr(torch, self.layout.prefix.dtype)
            empty = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
            self.prefix = PrefixStates(*empty)
            targets.update({f"kv_prefix.{name}": t for name, t in tensors_of(self.prefix).items()})
        parallel = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.slots = Slots(layer, layer.layer_name, {None: targets}, *parallel)
        if own:
            logger.warning_once(
                "phasequant: kv_cache_dtype=%s is vLLM's own 4-bit grid: keys and values are not those of the "
                "checkpoint's grid that was measured", kind,
            )  # fmt: skip
            self.quantizer = None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put this before the layer's own forward."""
        self.slots.close()
        layer.forward = partial(_attend, self, layer, layer.forward)

    def rounded(
        self, key: Float[Tensor, "T K H"], value: Float[Tensor, "T K H"]
    ) -> tuple[Float[Tensor, "T K H"], Float[Tensor, "T K H"]]:
        """What the cache shall hold."""
        if self.quantizer is None:
            return key, value
        packed = self.quantizer.encode(key.transpose(0, 1)[None], value.transpose(0, 1)[None])
        made = (self.quantizer.decode(states, key.dtype)[0].transpose(0, 1) for states in packed)
        return tuple(made)  # type: ignore[return-value]

    def with_prefix(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stored states in the places of the prefix's tokens."""
        where = positions(len(key), key.device) if self.prefix is not None else None
        if where is None:
            return key, value
        assert self.prefix is not None
        states = self.prefix.states(key[None], self.quantizer)
        count = states[0].shape[2]
        inside, index = (where < count)[:, None, None], where.clamp(0, count - 1)
        made = (
            torch.where(inside, stored[0].transpose(0, 1)[index], given)
            for stored, given in zip(states, (key, value), strict=True)
        )
        return tuple(made)  # type: ignore[return-value]


def _attend(
    method: RoundedKV, layer: Any, plain: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> Tensor:
    shapes = key.shape, value.shape
    q = query.reshape(len(query), layer.num_heads, -1)
    k, v = (x.reshape(len(x), layer.num_kv_heads, -1) for x in (key, value))
    if method.quantizer is not None:
        q = method.quantizer.rotate_queries(q)
    k, v = method.with_prefix(*method.rounded(k, v))
    if method.by_sequence:
        length = 0 if method.layout.prefix is None else len(method.layout.prefix.tokens)
        return cpu_attention.attend_by_sequence(layer, q, k, v, length)
    return plain(q.reshape(query.shape), k.reshape(shapes[0]), v.reshape(shapes[1]), *rest, **options)
