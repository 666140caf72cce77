"""The caption tokenizer against open_clip's own."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3i_fast.pipelines.dataset.annotations.tokenizer import CLIP_NUM_MERGES, Tokenizer

CAPTIONS = (
    "grinning face",
    "woman in motorized wheelchair facing right medium-light skin tone",
    "A photo of 3 zebras; it's 100% real &amp; na\u00efve \u2014 \U0001f600!",
    "",
    " ".join(["antidisestablishmentarianism"] * 40),
)


TOKENIZER, OPEN_CLIP = Tokenizer(None, 200), open_clip.SimpleTokenizer()


@pytest.mark.parametrize("context_length", [77, 12])
def test_full_size_gives_the_ids_of_open_clip(context_length: int) -> None:
    tokenizer = Tokenizer(None, context_length)
    expected = open_clip.tokenize(list(CAPTIONS), context_length=context_length).numpy()
    for caption, row in zip(CAPTIONS, expected, strict=True):
        ids = tokenizer.encode(caption)
        assert ids.dtype == np.int32
        assert np.array_equal(np.pad(ids, (0, context_length - len(ids))), row)
    assert tokenizer.vocab_size == 49408


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=0x17F) | st.sampled_from("''&;<>_ .tsdl"), max_size=40))
def test_words_that_are_kept_have_the_ids_of_open_clip(text: str) -> None:
    """Also between punctuation, numbers, and what cleaning changes."""
    found, count = TOKENIZER.encode_and_count(text)
    expected = OPEN_CLIP.encode(text)
    assert found[1:-1].tolist() == expected and count == len(expected) + 2


RANDOM = "".join(np.random.default_rng(0).choice([*"abcdefghijklmnopqrstuvwxyz"], 9000))
LONG = ("\u4e2d\u56fd\u7684\u732b" * 400, RANDOM, "word " * 50_000, "&amp;" * 3000)


@pytest.mark.parametrize("text", LONG, ids=["Chinese", "a word", "words", "cleaned"])
def test_long_texts_have_the_first_ids_of_open_clip_in_little_time(text: str) -> None:
    """A word of 9,000 letters takes open_clip minutes, so that it is asked for fewer of them."""
    ids = TOKENIZER.encode(text)
    expected = OPEN_CLIP.encode(text[:1400])
    assert len(ids) == 200 and ids[1:-1].tolist() == expected[:198]
    assert TOKENIZER.encode_and_count(text, 200)[1] > 200


def test_all_merges_by_number_is_the_full_size() -> None:
    full, by_number = Tokenizer(None, 20), Tokenizer(CLIP_NUM_MERGES, 20)
    assert full.fingerprint == by_number.fingerprint
    assert full.vocab_size == by_number.vocab_size


@pytest.mark.parametrize("num_merges", [0, 1, 1000])
def test_fewer_merges_split_words_into_smaller_pieces(num_merges: int) -> None:
    small, full = Tokenizer(num_merges, 77), Tokenizer(None, 77)
    assert small.vocab_size == 512 + num_merges + 2
    for caption in CAPTIONS[:3]:
        ids = small.encode(caption)
        assert len(ids) >= len(full.encode(caption))
        assert ids.min() >= 0 and ids.max() < small.vocab_size
        assert ids[0] == small.vocab_size - 2 and ids[-1] == small.vocab_size - 1
        # Pieces join to the same text; punctuation and digits are set apart by either tokenizer.
        assert small.decode(ids) == full.decode(full.encode(caption))


def test_no_merges_is_one_token_a_byte() -> None:
    assert len(Tokenizer(0, 77).encode("zebra fish")) == len("zebrafish") + 2


def test_truncation_keeps_the_end() -> None:
    tokenizer = Tokenizer(None, 5)
    ids = tokenizer.encode("one two three four five six")
    assert len(ids) == 5 and ids[-1] == 49407
    assert tokenizer.decode(np.pad(ids, (0, 3))) == "one two three"


def test_fingerprint_follows_every_setting() -> None:
    fingerprints = {Tokenizer(m, c).fingerprint for m, c in [(None, 77), (500, 77), (500, 24)]}
    assert len(fingerprints) == 3
    assert Tokenizer(500, 24).fingerprint in fingerprints


def test_a_manifests_description_builds_the_same_tokenizer() -> None:
    info = Tokenizer(300, 16).info
    assert Tokenizer.from_info(info).encode("red apple").tolist() == (
        Tokenizer(300, 16).encode("red apple").tolist()
    )
    changed = type(info)(**{**info.as_dict(), "fingerprint": "0" * 64})
    with pytest.raises(ValueError, match="expected 0000.*got"):
        Tokenizer.from_info(changed)


@pytest.mark.parametrize(("num_merges", "context_length"), [(-1, 77), (10**6, 77), (None, 2)])
def test_settings_out_of_range_are_refused(num_merges: int | None, context_length: int) -> None:
    with pytest.raises(ValueError, match=r"expected .* got"):
        Tokenizer(num_merges, context_length)
