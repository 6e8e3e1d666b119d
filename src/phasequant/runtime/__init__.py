"""Running a model fast, quantized or in 16 bits: static shapes, stacked linears, fused entrances, CUDA graphs."""

from phasequant.runtime.decoder import Decoder, can_run, can_run_config, window_in
from phasequant.runtime.runner import Runner

__all__ = ["Decoder", "Runner", "can_run", "can_run_config", "window_in"]
