"""Captions as arrays: stored and read back, faults named, one drawn with equal probability."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom, chi2_contingency
from torch import Tensor

from m3i_fast.pipelines.dataset import captions
from tests.shared.pipelines.data import TOKENIZER, several_captions

T = TOKENIZER.context_length
MOST = 4  # captions of a picture
MASK = 2**64 - 1


def splitmix64(seed: int, number: int) -> int:
    """Draw `number` (from 0) of the generator in whole numbers, step by step as published."""
    state = seed
    for _ in range(number + 1):
        state = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def stored(tokens: list[int], lengths: list[int] | None) -> tuple[bytes, bytes | None]:
    of_each = None if lengths is None else np.array(lengths, "<i4").tobytes()
    return np.array(tokens, "<i4").tobytes(), of_each


def as_read(rows: list[tuple[list[int], list[int] | None]]) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, num_tokens and lengths, padded as the graph pads them."""
    token_ids = torch.zeros(len(rows), MOST * T, dtype=torch.int32)
    lengths = torch.full((len(rows), MOST), captions.PADDING, dtype=torch.int32)
    for i, (tokens, of_each) in enumerate(rows):
        token_ids[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        lengths[i, : len(of_each or [])] = torch.tensor(of_each or [], dtype=torch.int32)
    return token_ids, torch.tensor([len(tokens) for tokens, _ in rows]), lengths


def test_published_numbers_of_the_generator() -> None:
    """The first draws of seed 1234567, and any draw in whole numbers."""
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix64(1234567, i) for i in range(5)] == known
    ids = torch.arange(5)
    for count in (2**62 - 1, 3, 1):
        got = captions.draw(1234567, ids, torch.full((5,), count))
        assert got.tolist() == [number % count for number in known]


def test_every_caption_is_drawn_as_often_as_the_others() -> None:
    """Per count over ids and epochs, and per id over epochs: inside 1e-6 of the binomial law."""
    num_ids, num_epochs = 400, 300
    ids = 7 * torch.arange(num_ids)
    for count in (2, 3, 5):
        counts = torch.full((num_ids,), count)
        keys = [captions.epoch_key(11, epoch) for epoch in range(num_epochs)]
        drawn = torch.stack([captions.draw(key, ids, counts) for key in keys])
        for choice in range(count):
            hits = (drawn == choice).sum()
            total = binom(num_ids * num_epochs, 1 / count)
            assert total.ppf(1e-6) <= hits <= total.ppf(1 - 1e-6)
            of_each = binom(num_epochs, 1 / count)
            hits_of_each = (drawn == choice).sum(0)
            low, high = of_each.ppf(1e-6 / num_ids), of_each.ppf(1 - 1e-6 / num_ids)
            assert low <= hits_of_each.min() and hits_of_each.max() <= high
            spread = hits_of_each.double().var() / of_each.var()
            assert 0.7 < spread < 1.3  # neither regular nor clustered


@pytest.mark.parametrize("axis", ["epoch", "sample", "seed"])
def test_draws_of_neighbours_are_independent(axis: str) -> None:
    ids, counts = torch.arange(30_000), torch.full((30_000,), 3)
    first = captions.draw(captions.epoch_key(5, 8), ids, counts)
    second = {
        "epoch": lambda: captions.draw(captions.epoch_key(5, 9), ids, counts),
        "sample": lambda: captions.draw(captions.epoch_key(5, 8), ids + 1, counts),
        "seed": lambda: captions.draw(captions.epoch_key(6, 8), ids, counts),
    }[axis]()
    table = np.zeros((3, 3))
    np.add.at(table, (first.numpy(), second.numpy()), 1)
    assert chi2_contingency(table).pvalue > 1e-5


def test_choose_against_plain_lists() -> None:
    """Every count of captions, of every length, in one batch."""
    rng = np.random.default_rng(0)
    texts: list[list[NDArray[np.int32]]] = [
        [rng.integers(0, 521, rng.integers(1, T + 1)).astype(np.int32) for _ in range(i % 5)]
        for i in range(100)
    ]
    texts.append([np.full(T, 7, np.int32)] * MOST)  # nothing is left of the padding
    rows = [
        (
            [int(i) for ids in found for i in ids],
            [len(ids) for ids in found] if len(found) > 1 else None,
        )
        for found in texts
    ]
    read = as_read(rows)
    assert not captions.faulty_rows(*read, TOKENIZER).any()
    sample_id = torch.from_numpy(rng.integers(0, 2**40, len(rows)))
    seen = set()
    for key in (None, 0, 1, 2**64 - 1):
        token_ids, num_tokens = captions.choose(*read, sample_id, context_length=T, key=key)
        assert token_ids.shape == (len(rows), T) and token_ids.dtype == torch.int32
        assert num_tokens.dtype == torch.int64
        for i, found in enumerate(texts):
            which = 0
            if key is not None and found:
                which = int(captions.draw(key, sample_id[i : i + 1], torch.tensor([len(found)])))
            expected = found[which].tolist() if found else []
            assert num_tokens[i] == len(expected)
            assert token_ids[i].tolist() == expected + [0] * (T - len(expected))
            seen.add((len(found), which))
    assert len(seen) == 1 + 1 + 2 + 3 + 4


def test_components_are_int32_ids_and_lengths() -> None:
    assert dict(captions.components(())) == {}
    for index in range(12):
        found = several_captions(index)
        stored_as = dict(captions.components(found))
        assert stored_as.keys() == {0: set(), 1: {"tok"}}.get(len(found), {"tok", "len"})
        if found:
            assert stored_as["tok"] == b"".join(ids.astype("<i4").tobytes() for ids in found)
        if len(found) > 1:
            assert np.frombuffer(stored_as["len"], "<i4").tolist() == [len(i) for i in found]
        tokens, lengths = (stored_as.get(name) for name in ("tok", "len"))
        assert captions.stored_fault(tokens, lengths, TOKENIZER) is None


GOOD = [1, 2, 3, 4, 5, 6, 7]
FAULTS = [
    (GOOD, [3, 3], r"expected 6 token ids \(lengths \[3, 3\]\), got 7"),
    (GOOD, [3, 5], r"expected 8 token ids \(lengths \[3, 5\]\), got 7"),
    ([], [3, 4], r"expected 7 token ids .*, got 0"),
    (GOOD, [3, 0, 4], r"expected at least 1 token id a caption, got lengths \[3, 0, 4\]"),
    (GOOD, [0, 7], "expected at least 1 token id a caption"),
    (GOOD, [7, 0], "expected at least 1 token id a caption"),
    (GOOD, [9, -2], "expected at least 1 token id a caption"),
    (GOOD, [3, -1, 4], "expected at least 1 token id a caption"),
    ([1] * 15, [2, 13], "caption 2 of 2: expected 1 to 12 token ids, got 13"),
    ([1] * 13, None, "^expected 1 to 12 token ids, got 13"),
    ([1, 2, 521, 4], [2, 2], "caption 2 of 2: expected token ids from 0 to 520, got 4 to 521"),
    ([1, -1, 3, 4], [2, 2], "caption 1 of 2: expected token ids from 0 to 520, got -1 to 1"),
    ([1, 521], None, "^expected token ids from 0 to 520, got 1 to 521"),
]


@pytest.mark.parametrize(("tokens", "lengths", "message"), FAULTS)
def test_faults_are_named_and_found_in_a_batch(
    tokens: list[int], lengths: list[int] | None, message: str
) -> None:
    found = captions.stored_fault(*stored(tokens, lengths), TOKENIZER)
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)
    good: list[tuple[list[int], list[int] | None]] = [(GOOD, [3, 4]), ([], None), (GOOD, None)]
    read = as_read([*good, (tokens, lengths), *good])
    assert captions.faulty_rows(*read, TOKENIZER).tolist() == [False] * 3 + [True] + [False] * 3
    if lengths is None:  # as where no picture has several
        token_ids, num_tokens, _ = read
        bad = captions.faulty_rows(token_ids, num_tokens, None, TOKENIZER)
        assert bad.nonzero().tolist() == [[3]]


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (b"12345", None, "tok: expected int32 values, got 5 bytes"),
        (b"12345678", b"123456", "len: expected int32 values, got 6 bytes"),
        (b"", None, "expected 1 to 12 token ids, got 0"),
        (None, b"\x01\0\0\0", "expected 1 token ids"),
        (b"\x01\0\0\0", b"", "expected at least 1 token id a caption"),
    ],
)
def test_components_of_odd_sizes_are_named(
    tokens: bytes | None, lengths: bytes | None, message: str
) -> None:
    assert message in str(captions.stored_fault(tokens, lengths, TOKENIZER))


def test_the_key_is_64_bits_of_seed_and_epoch() -> None:
    keys = {captions.epoch_key(seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(keys) == 900 and max(keys) > 2**63
    digest = hashlib.sha256(b"caption|3|4").digest()
    assert captions.epoch_key(3, 4) == int.from_bytes(digest[:8], "little")
