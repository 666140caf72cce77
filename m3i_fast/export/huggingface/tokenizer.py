"""A run's tokenizer as the files that AutoTokenizer of transformers reads.

The same ids as open_clip's SimpleTokenizer, which cleans a text by ftfy and by html.unescape before
it is split. Of that cleaning the files have what captions need: typographic quotation marks become
plain ones, entities of HTML that stand for & < > and quotation marks are resolved, and the text is
composed (NFC), without repeated spaces and in lower case. Text that ftfy repairs in other ways
(wrongly decoded bytes, ligatures, wide letters) has other ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

START, END = "<start_of_text>", "<end_of_text>"  # open_clip's, the last two ids
# Pieces that are never merged across, as CLIP's.
_PIECES = rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"
_NESTED_ENTITIES = 3  # ftfy resolves them once, SimpleTokenizer twice
_REPLACED = (
    *([("&amp;", "&")] * _NESTED_ENTITIES),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&quot;", '"'),
    ("&nbsp;", " "),
    ("&#0*39;|&apos;|[\u02bc\u2018-\u201b]", "'"),
    ("[\u201c-\u201f]", '"'),
    (r"\s+", " "),
)


def tokenizer_files(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], context_length: int
) -> dict[str, bytes]:
    """Return the content of tokenizer.json and tokenizer_config.json.

    vocabulary: the id of each piece, `START` and `END` among them. merges: in the order in which
    they are applied. A text longer than context_length is cut where the tokenizer is called with
    truncation=True.
    """
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(text, vocabulary[text]) for text in (START, END)],
        "normalizer": _normalizer(),
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _PIECES},
                    "behavior": "Removed",
                    "invert": True,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocabulary[END]],
            "cls": [START, vocabulary[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": [list(pair) for pair in merges],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "CLIPProcessor",
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }
    contents = {"tokenizer.json": described, "tokenizer_config.json": config}
    return {name: (json.dumps(tree, indent=1) + "\n").encode() for name, tree in contents.items()}


def _normalizer() -> dict[str, Any]:
    replaced = [
        {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
        for pattern, content in _REPLACED
    ]
    return {
        "type": "Sequence",
        "normalizers": [*replaced, {"type": "NFC"}, {"type": "Lowercase"}],
    }


def _special(text: str, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
