"""Texts and their cut."""

import pytest
import torch

from phasequant import text
from phasequant.errors import PhaseQuantError


def test_builtin_parts_are_large_and_apart():
    a, b = text.builtin("calibration"), text.builtin("evaluation")
    assert min(len(a.text), len(b.text)) > 100_000
    assert a.sha256 != b.sha256 and a.text[:2000] not in b.text


def test_cut_is_the_standard_one(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("abc" * 100)
    corpus = text.find(str(path), "evaluation")
    chunks = text.cut(corpus, tokenizer, 64)
    ids = text.tokenize(corpus, tokenizer)
    assert chunks.shape == (4, 64)  # 300 tokens, tail dropped
    assert torch.equal(chunks.flatten(), ids[:256])
    assert text.cut(corpus, tokenizer, 64, 2).shape == (2, 64)
    assert text.digest(chunks) != text.digest(chunks + 1)


def test_bad_texts(tokenizer, tmp_path):
    for content, message in ((b"", "empty"), (b" \n", "empty"), (b"\xff\xfe\x00", "UTF-8")):
        path = tmp_path / "bad.txt"
        path.write_bytes(content)
        with pytest.raises(PhaseQuantError, match=message):
            text.find(str(path), "evaluation")
    with pytest.raises(PhaseQuantError, match="does not exist"):
        text.find(str(tmp_path / "none.txt"), "evaluation")
    with pytest.raises(PhaseQuantError, match="directory"):
        text.find(str(tmp_path), "evaluation")
    path.write_text("short")
    with pytest.raises(PhaseQuantError, match="5 tokens, fewer than one sequence of 64"):
        text.cut(text.find(str(path), "evaluation"), tokenizer, 64)
    with pytest.raises(PhaseQuantError, match="at least 2"):
        text.cut(text.find(str(path), "evaluation"), tokenizer, 1)
