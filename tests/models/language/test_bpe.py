"""Byte-pair encoding: what comes back, what is learned, and the package tokenizers as the judge of both."""

from __future__ import annotations

import re

import pytest
import torch

from attnlab.models.language.bpe import SPECIALS, ByteTokenizer
from attnlab.models.language.molecules import random_selfies

LINES = random_selfies(300, generator=torch.Generator().manual_seed(0))
TEXT = ["Hello, wörld's  3 x=[C]   end ", "don't we'll\n\n a_b", "αβγ 12ab", ""]


def test_every_text_comes_back():
    tokenizer = ByteTokenizer.train(LINES, size=300)
    for lines in (LINES, TEXT):
        assert tokenizer.decode(tokenizer.encode(lines).ids) == lines


def test_special_tokens_come_first_and_frame_each_line():
    tokenizer = ByteTokenizer.train(LINES, size=300)
    assert [tokenizer.vocabulary[token] for token in SPECIALS] == [0, 1, 2, 3, 4]
    assert (tokenizer.pad, tokenizer.mask) == (1, 4)
    ids, keep = tokenizer.encode(["[C]", "[C][=C]"])
    assert (ids[:, 0] == 0).all() and ids[1, -1] == 2
    assert torch.equal(keep, ids != 1) and not keep[0, -1]


def test_vocabulary_and_ids_are_those_of_tokenizers():
    peer = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    ours = ByteTokenizer.train([*LINES, *TEXT], size=290)
    peer.train_from_iterator([*LINES, *TEXT], 290, min_frequency=2, special_tokens=list(SPECIALS), show_progress=False)
    assert peer.get_vocab() == ours.vocabulary
    for line in [*LINES[:50], *TEXT]:
        assert peer.encode(line).ids == ours.encode([line]).ids[0, 1:-1].tolist()


def test_released_variant_learns_symbols_as_the_authors_code():
    tokenizers = pytest.importorskip("tokenizers")
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    split = tokenizers.pre_tokenizers.Split(pattern=tokenizers.Regex(r"\[|\]"), behavior="removed")
    peer.pre_tokenizer = split
    order = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=order, vocab_size=60, min_frequency=2, show_progress=False)
    peer.train_from_iterator(LINES, trainer)
    ours = ByteTokenizer.train(LINES, size=60, variant="release")
    assert peer.get_vocab() == ours.vocabulary
    assert ours.decode(ours.encode(LINES).ids) == [re.sub(r"[\[\]]", "", line) for line in LINES]


def test_only_pairs_as_frequent_as_asked_are_merged():
    assert len(ByteTokenizer.train(["[C]"], size=300)) == 261
    assert len(ByteTokenizer.train(["xy", "xy"], size=300)) == 262
    assert len(ByteTokenizer.train(["xy", "xy"], size=300, min_frequency=3)) == 261


def test_a_saved_tokenizer_encodes_alike(tmp_path):
    tokenizer = ByteTokenizer.train([*LINES, *TEXT], size=300)
    tokenizer.save(tmp_path)
    again = ByteTokenizer.load(tmp_path)
    assert again.vocabulary == tokenizer.vocabulary and again.merges == tokenizer.merges
    assert torch.equal(again.encode(TEXT).ids, tokenizer.encode(TEXT).ids)


def test_long_lines_are_never_cut_in_silence():
    tokenizer = ByteTokenizer.train(LINES, size=300)
    long = ["[C]", "[N]" * 80]
    with pytest.raises(ValueError, match="1 of 2 lines have more than length = 32 tokens"):
        tokenizer.encode(long, length=32)
    ids, _ = tokenizer.encode(long, length=32, truncate=True)
    assert ids.shape == (2, 32) and ids[1, -1] == tokenizer.end
    assert "[N]" * 80 != tokenizer.decode(ids)[1]
    assert ("[N]" * 80).startswith(tokenizer.decode(ids)[1])


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="size must hold the 261"):
        ByteTokenizer.train(LINES, size=100)
    with pytest.raises(ValueError, match="variant"):
        ByteTokenizer.train(LINES, variant="old")
    with pytest.raises(ValueError, match="lacks <pad>, </s>, <unk>, <mask>"):
        ByteTokenizer({"<s>": 0}, [])
    with pytest.raises(ValueError, match="at least one line"):
        ByteTokenizer.train(LINES).encode([])
    ByteTokenizer.train(LINES, size=270).save(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match="two tokens per line, got 'a b c'"):
        ByteTokenizer.load(tmp_path)
