"""Measuring: perplexity and KL divergence beside the 16-bit original, and what a model weighs."""

from phasequant.evaluate.perplexity import Candidate, Score, kl_divergence, nll, score
from phasequant.evaluate.size import weight_bytes
from phasequant.evaluate.streamed import streamed_perplexity

__all__ = ["Candidate", "Score", "kl_divergence", "nll", "score", "streamed_perplexity", "weight_bytes"]
