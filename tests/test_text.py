"""Texts and their cut."""

import itertools

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


def test_a_seed_takes_as_many_sequences_from_elsewhere(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("".join(chr(33 + i % 90) + chr(33 + i // 90) for i in range(500)))  # every place is its own
    corpus = text.find(str(path), "calibration")
    ids = text.tokenize(corpus, tokenizer).tolist()
    first = text.cut(corpus, tokenizer, 64, 5)
    assert torch.equal(text.cut(corpus, tokenizer, 64, 5, 0), first) and first.flatten().tolist() == ids[:320]
    seen = set()
    for seed in range(1, 40):
        chosen = text.cut(corpus, tokenizer, 64, 5, seed)
        assert torch.equal(chosen, text.cut(corpus, tokenizer, 64, 5, seed)) and chosen.shape == (5, 64)
        starts = [next(i for i in range(len(ids)) if ids[i : i + 64] == row) for row in chosen.tolist()]
        assert all(b - a >= 64 for a, b in itertools.pairwise(sorted(starts)))
        seen.add(tuple(starts))
    assert len(seen) == 39 and max(max(s) for s in seen) > len(ids) - 128 and min(min(s) for s in seen) < 64
    assert any(list(s) != sorted(s) for s in seen)
    for wanted in (None, 15, 400):  # the whole text: the tail of 40 is what is dealt out
        assert text.cut(corpus, tokenizer, 64, wanted, 7).shape == (15, 64)


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
