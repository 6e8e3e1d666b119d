"""Calibration and evaluation tokens: where text comes from and how it is cut."""

from phasequant.text.chunks import cut, digest, tokenize
from phasequant.text.corpus import BUILTIN, Corpus, builtin, find

__all__ = ["BUILTIN", "Corpus", "builtin", "cut", "digest", "find", "tokenize"]
