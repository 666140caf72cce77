"""Captions as arrays: stored and read back, faults named."""

from __future__ import annotations

import numpy as np
import pytest

from m3i_fast.pipelines.dataset.annotations import captions
from tests.shared.pipelines.data import TOKENIZER, several_captions

T = TOKENIZER.context_length


def stored(tokens: list[int], lengths: list[int] | None) -> tuple[bytes, bytes | None]:
    of_each = None if lengths is None else np.array(lengths, "<i4").tobytes()
    return np.array(tokens, "<i4").tobytes(), of_each


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
def test_faults_are_named(tokens: list[int], lengths: list[int] | None, message: str) -> None:
    found = captions.stored_fault(*stored(tokens, lengths), TOKENIZER)
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)


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
