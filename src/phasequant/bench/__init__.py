"""Timings of what runs here, for people and for the planner."""

from phasequant.bench.linears import LinearTime, time_linears

__all__ = ["LinearTime", "time_linears"]
