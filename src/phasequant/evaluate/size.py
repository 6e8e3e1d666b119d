"""What a model weighs as stored: codes and scales as they are, everything else at two bytes a number."""

from torch import nn

from phasequant.nn import KVQuantizer, OnlineMap, QuantLinear


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights of a checkpoint of this model. Dense tensors count 2 bytes a number (16 bits), also where a
    CPU computes them in fp32; packed codes, scales and online factors count what they are. Tied weights count once."""
    exact: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, (QuantLinear, OnlineMap, KVQuantizer)):
            for buffer in module.buffers(recurse=False):
                exact[id(buffer)] = buffer.nbytes
    dense = {id(p): 2 * p.numel() for p in model.parameters()}
    return sum(exact.values()) + sum(dense.values())
