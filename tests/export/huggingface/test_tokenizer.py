"""Ids of AutoTokenizer are those of the run's tokenizer, which is open_clip's."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import ftfy
import pytest
import torch
from transformers import AutoTokenizer

from m3i_fast.export.huggingface.tokenizer import tokenizer_files
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer

TEXTS = [
    "a red apple",
    "  Two\tships,\n at  SEA!! 1234 ",
    "it's the dog's, they've said: don't",
    "it\u2019s \u201cquoted\u201d text",
    "salt &amp; pepper &lt;3 &quot;x&quot; &#39;y&#39; &amp;amp;",
    "café cafe\u0301 na\u00efve stra\u00dfe \u0130stanbul",
    "\u4f60\u597d \u2603 snowman \U0001f600",
    "",
    "word " * 40,
    "<end_of_text> and <start_of_text> as words",
]
REPAIRED = ["\ufb01ne \ufb02our", "\uff37\uff49\uff44\uff45", "schÃ¶n"]  # by ftfy alone


def exported(tokenizer: Tokenizer, folder: Path) -> Any:
    folder.mkdir()
    files = tokenizer_files(tokenizer.vocabulary, tokenizer.merges, tokenizer.context_length)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("num_merges", "context_length"), [(300, 24), (None, 77)])
def test_ids_are_those_of_the_run(
    num_merges: int | None, context_length: int, tmp_path: Path
) -> None:
    ours = Tokenizer(num_merges, context_length)
    theirs = exported(ours, tmp_path / "folder")
    assert len(theirs) == ours.vocab_size and theirs.model_max_length == context_length
    for text in TEXTS:
        assert theirs(text, truncation=True)["input_ids"] == [*ours.encode(text)], text
    for text in REPAIRED:
        expected = [*ours.encode(text)]
        assert theirs(text, truncation=True)["input_ids"] != expected
        cleaned = html.unescape(ftfy.fix_text(text))
        assert theirs(cleaned, truncation=True)["input_ids"] == expected


def test_a_batch_is_padded_on_the_right_with_a_mask(tmp_path: Path) -> None:
    ours = Tokenizer(300, 24)
    theirs = exported(ours, tmp_path / "folder")
    batch = theirs(TEXTS, padding=True, truncation=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    expected = ours(TEXTS)[:, : ids.shape[1]]
    assert torch.equal(torch.where(mask, ids, 0), torch.where(mask, expected, 0))
    assert [*mask.sum(1)] == [len(ours.encode(text)) for text in TEXTS]
    assert theirs.decode(ids[0], skip_special_tokens=True).split("</w>")[0].startswith("a")
