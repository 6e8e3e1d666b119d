"""Metrics of a sweep: Jump Ratio, Historical Feature SNR, GSR, massive activations, token spikes, injected noise."""

from phasequant.observe.clips import search_clips
from phasequant.observe.gsr import gsr
from phasequant.observe.massive import Outlier, Phase, outstanding, phases
from phasequant.observe.observations import Curve, GroupStats, Observations, Residual, SpikeMap, TokenMap
from phasequant.observe.ranges import calibrate_ranges
from phasequant.observe.residual import analysis_quantize, historical_snr, jump_ratio
from phasequant.observe.rows import row_thresholds
from phasequant.observe.spikes import Spikes, spike_ratio, token_absmax, token_spikes
from phasequant.observe.sweep import sweep

__all__ = [
    "Curve",
    "GroupStats",
    "Observations",
    "Outlier",
    "Phase",
    "Residual",
    "SpikeMap",
    "Spikes",
    "TokenMap",
    "analysis_quantize",
    "calibrate_ranges",
    "gsr",
    "historical_snr",
    "jump_ratio",
    "outstanding",
    "phases",
    "row_thresholds",
    "search_clips",
    "spike_ratio",
    "sweep",
    "token_absmax",
    "token_spikes",
]
