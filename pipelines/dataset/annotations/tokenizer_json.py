"""The tokenizer as the files that Hugging Face's tokenizers read.

Texts are cleaned before: ids are those of `Tokenizer` for a text that open_clip has cleaned.
"""

from __future__ import annotations

from typing import Any

from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer

START, END = "<start_of_text>", "<end_of_text>"
# SimpleTokenizer's words: English endings, letters, one digit, and what is neither nor a space.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Return the contents of tokenizer.json and tokenizer_config.json by their names.

    `AutoTokenizer.from_pretrained` reads them. Rows are padded with the end, where `Tokenizer` pads
    with 0; CLIP's towers read nothing after the first end.
    """
    vocabulary = tokenizer.vocabulary
    ids = {token: vocabulary[token] for token in (START, END)}
    special = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ids]
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    template = [special[0], sequence, special[1]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added(token, number) for token, number in ids.items()],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": WORDS},
                        "behavior": "Removed",
                        "invert": True,
                    },
                    {**byte_level, "use_regex": False},
                ],
            },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": template,
                "pair": template,
                "special_tokens": {
                    token: {"id": token, "ids": [number], "tokens": [token]}
                    for token, number in ids.items()
                },
            },
            "decoder": {**byte_level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": "</w>",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocabulary,
                "merges": [list(pair) for pair in tokenizer.merges],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": START,
            "eos_token": END,
            "pad_token": END,
            "model_max_length": tokenizer.context_length,
            "clean_up_tokenization_spaces": False,
        },
    }


def _added(token: str, number: int) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **plain, "special": True}
