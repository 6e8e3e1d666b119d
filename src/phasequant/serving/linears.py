r"""Linears of a served model: our kernels on our codes.

    y = W̃ · Q( online(x) ) + B·A·online(x) + b           as `nn.linear` has it; shards of a fused layer stacked by rows

The shards are laid out empty as a checkpoint's config says, filled by slots, stacked (`runtime.stacking`), and laid out
for the kernel once (`runtime.linear`: on a GPU map and rounding are one kernel before the product). What the kernel
prepared is all that is kept. To torch.compile and CUDA graphs a linear is one opaque operator.
Several devices: `shards`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase

from phasequant.nn import ModelLayout, QuantLinear, empty_linear
from phasequant.runtime.linear import Linear
from phasequant.runtime.stacking import stack
from phasequant.serving.shards import Columns
from phasequant.serving.slots import Shard, Slots, sealed, tensors_of

logger = init_logger(__name__)
SEAL = "weight"  # of the first linear alone (checkpoint.seal)

_served: dict[int, Linear | Columns] = {}


@torch.library.custom_op("phasequant::served_linear", mutates_args=())
def served_linear(x: Tensor, key: int, out: int) -> Tensor:
    """(T, I) → (T, O) by the linear that stands under `key`."""
    return _served[key].plain(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], out)


@served_linear.register_fake
def _(x: Tensor, key: int, out: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


class CodesLinear(LinearMethodBase):
    """One group's linears, or one of them."""

    def __init__(self, layout: ModelLayout, block: int, group: str, seal: Callable[[], Tensor]) -> None:
        self.layout, self.block, self.group, self.seal = layout, block, group, seal

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty shards, and slots for what fills them."""
        self.dtype, self.device = params_dtype, torch.empty(0).device
        rank, devices = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.columns: Columns | None = None
        self.parts: dict[Shard, QuantLinear] = {}
        if input_size_per_partition != input_size:
            (rows,) = output_partition_sizes
            self.columns = Columns(
                self.layout, self.block, self.group, input_size_per_partition, rows, devices, self.device, self.dtype
            )
            targets: dict[Shard, dict[str, Tensor]] = {None: self.columns.targets()}
        else:
            self.parts = self._parts(input_size, output_partition_sizes)
            targets = {shard: tensors_of(part) for shard, part in self.parts.items()}
        self.slots = Slots(layer, str(getattr(layer, "prefix", self.group)), targets, rank, devices)
        sealed(layer, SEAL, self.seal)

    def _parts(self, width: int, sizes: list[int]) -> dict[Shard, QuantLinear]:
        shards: list[Shard] = [None]
        if len(sizes) > 1:
            shards = ["q", "k", "v"] if self.group == "qkv" else list(range(len(sizes)))
        rest = {"bias": False, "device": self.device, "dtype": self.dtype}
        return {
            shard: empty_linear(self.layout, self.block, self.group, (width, rows), **rest)  # type: ignore[arg-type]
            for shard, rows in zip(shards, sizes, strict=True)
        }

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Stack the shards and lay them out for the kernel."""
        self.slots.close()
        delattr(layer, SEAL)
        bias = getattr(layer, "bias", None)
        bias = None if bias is None or getattr(layer, "skip_bias_add", False) else bias.data
        made: Linear | Columns
        if self.columns is not None:
            first = get_tensor_model_parallel_rank() == 0  # the bias is added once
            self.columns.close(self.device, self.dtype, bias if first else None)
            made, self.out = self.columns, self.columns.part.out_features
        else:
            parts = list(self.parts.values())
            joined = stack(parts)
            assert isinstance(joined, QuantLinear)
            if bias is not None:
                joined.bias = nn.Parameter(bias, requires_grad=False)
            made = Linear(joined, self.device, self.dtype)
            made.release(parts)
            self.out = joined.out_features
        self.key = id(made)
        _served[self.key] = made
        told = made.describe()
        logger.info_once("phasequant: %s: kernel %s, entrance %s", self.group, told["kernel"], told["entrance"])

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(*, I) → (*, O); the bias is added by the kernel, in fp32."""
        return torch.ops.phasequant.served_linear(x, self.key, self.out)
