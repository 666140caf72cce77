"""The README.md of a folder for transformers: what it holds, how to load it, how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_SOURCES = ("trained", "ema", "untrained", "pixels", "chance")  # of evaluation.json


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """Say how a folder is loaded, and what it computes."""

    class_name: str
    """Class that AutoModel returns, or AutoModelForImageClassification of a classifier."""
    why_own: str = ""
    """Why the folder brings its own code; empty where the class is of transformers."""
    num_prefix: int
    """Tokens before the patches."""
    has_text: bool
    has_logit_bias: bool = False
    classifies: Literal["", "classes", "labels"] = ""
    """What a classifier tells: one of classes, or which labels; empty: there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Say how the weights were made: rows of a table, and the data with their digests."""

    method: str
    """Title of the method whose terms were trained; empty for a list of terms of its own."""
    is_m3i: bool
    """Whether that is M3I, of any form."""
    facts: Sequence[tuple[str, str]]
    data: Sequence[tuple[str, str, str]]
    """Name, split and SHA-256 of the manifest of each data set."""
    evaluation: Mapping[str, Any] | None
    """Content of evaluation.json, where the run has one."""
    which: str
    """Weights that were written: trained or ema."""
    step: int | None
    """Number of optimiser steps after which these weights were saved; None where not known."""


def model_card(title: str, licence: str, size: int, loading: Loading, training: Training) -> bytes:
    """Return the card. size: S, pixels of a side; licence: of the weights, empty if not said."""
    parts = [
        _front_matter(licence, loading, training),
        f"# {title}\n",
        _what(size, loading, training),
        "## Use\n",
        f"```python\n{loading_lines(loading)}\n```\n",
        _outputs(loading),
        "## Pictures and texts\n",
        _inputs(size, loading),
        "## How it was trained\n",
        _table(("", ""), training.facts),
        _data(training),
        _measured(training),
        "## Limits\n",
        _limits(licence, loading),
    ]
    return "\n".join(part for part in parts if part).encode()


def loading_lines(loading: Loading, folder: str = "FOLDER") -> str:
    """Return the lines of Python that load a folder and use it on a picture."""
    auto = "AutoProcessor" if loading.has_text else "AutoImageProcessor"
    model = "AutoModelForImageClassification" if loading.classifies else "AutoModel"
    trust = ", trust_remote_code=True" if loading.why_own else ""
    lines = [
        "import torch",
        f"from transformers import {', '.join(sorted((model, auto)))}",
        "from transformers.image_utils import load_image",
        "",
        f'model = {model}.from_pretrained("{folder}"{trust})',
        f'processor = {auto}.from_pretrained("{folder}"{trust})',
        'picture = load_image("picture.jpg")',
    ]
    if loading.has_text:
        lines += [
            'texts = ["a red heart", "a green tree"]',
            'inputs = processor(images=picture, text=texts, return_tensors="pt", padding=True, '
            "truncation=True)",
            "with torch.no_grad():",
            "    output = model(**inputs)",
            "output.logits_per_image"
            + (".sigmoid()" if loading.has_logit_bias else ".softmax(-1)"),
        ]
        return "\n".join(lines)
    lines += ['inputs = processor(images=picture, return_tensors="pt")', "with torch.no_grad():"]
    if loading.classifies:
        lines += ["    logits = model(**inputs).logits[0]"]
        lines += {
            "classes": ["named = model.config.id2label[int(logits.argmax())]"],
            "labels": ["named = [model.config.id2label[n] for n, x in enumerate(logits) if x > 0]"],
        }[loading.classifies]
        return "\n".join(lines)
    lines += [
        "    tokens = model(**inputs).last_hidden_state",
        f"vector = tokens[:, {loading.num_prefix}:].mean(1)  # the mean over the patches",
    ]
    return "\n".join(lines)


def _front_matter(licence: str, loading: Loading, training: Training) -> str:
    task = "zero-shot-image-classification" if loading.has_text else "image-feature-extraction"
    task = "image-classification" if loading.classifies else task
    lines = ["---"]
    if licence:
        lines.append(f"license: {json.dumps(licence)}")
    lines += ["library_name: transformers", f"pipeline_tag: {task}", "tags:"]
    lines += [f"- {tag}" for tag in ("m3i", "m3i-fast", "vision", "image-feature-extraction")]
    if training.data:
        lines.append("training_data:")
    for name, split, digest in training.data:
        lines += [
            f"- name: {json.dumps(name)}",
            f"  split: {json.dumps(split)}",
            f"  sha256: {digest}",
        ]
    return "\n".join([*lines, "---\n"])


def _what(size: int, loading: Loading, training: Training) -> str:
    what = "An image encoder and a text encoder in one space" if loading.has_text else (
        "An image encoder"
    )  # fmt: skip
    if loading.classifies:
        what = f"A classifier of pictures by {loading.classifies}"
    text = (
        f"{what}, for pictures of {size} x {size} pixels, trained by m3i-fast: "
        f"{_trained_by(training)}.\n"
    )
    if not loading.why_own:
        return text + (
            f"\nThe folder holds a `{loading.class_name}` of transformers and no code of its own.\n"
        )
    return text + (
        "\nThe folder brings the code of its model, `modeling_m3i.py` and two files beside it, in "
        f"torch and transformers alone:\n{loading.why_own}.\nRead it before you pass "
        "`trust_remote_code=True`, which runs it.\n"
    )


def _trained_by(training: Training) -> str:
    if not training.method:
        return "a list of terms of its own, which is below"
    if not training.is_m3i:
        return f"{training.method}, whose terms are below"
    return (
        "M3I pre-training\n([arXiv 2211.09807](https://arxiv.org/abs/2211.09807)), a sum of bounds "
        "of the mutual information between a picture\nand what is to be predicted of it"
    )


def _outputs(loading: Loading) -> str:
    if loading.classifies:
        of = "a softmax" if loading.classifies == "classes" else "a sigmoid each"
        return (
            f"`logits` is [B, K], of {of}, in the order of `model.config.id2label`. "
            "`AutoModel.from_pretrained` loads the image encoder\nalone.\n"
        )
    prefix = loading.num_prefix
    lines = [
        f"`last_hidden_state` is [B, {prefix} + N, C]: {prefix} tokens before the patches, then N "
        "patches row by row." if prefix else
        "`last_hidden_state` is [B, N, C]: a token a patch, row by row.",
    ]  # fmt: skip
    if loading.class_name == "IJepaModel":
        lines.append(
            "At other sizes of pictures pass `interpolate_pos_encoding=True`; transformers "
            "resamples positions without antialiasing there."
        )
    elif not loading.why_own:
        lines.append(
            "`pooler_output` is the first of these tokens after the last norm; training read the "
            "mean over the patches, so prefer that."
        )
    else:
        lines.append("`pooler_output` is the mean over the patches.")
    if loading.has_text:
        lines.append(
            "`get_image_features(pixel_values).pooler_output` and `get_text_features(input_ids, "
            "attention_mask).pooler_output` embed pictures and texts, of any length; cosines are "
            "scaled by `model.logit_scale.exp()`"
            + (" and `model.logit_bias` is added." if loading.has_logit_bias else ".")
        )
    return "\n".join(lines) + "\n"


def _inputs(size: int, loading: Loading) -> str:
    text = (
        f"The largest centred square is resized to {size} x {size} with antialiasing and "
        "normalised. `load_image` turns a picture\nas its EXIF says and makes it RGB without its "
        "transparency, as training did. The processor alone neither turns it nor\ndrops the "
        "transparency, which it lays on white. With the torchvision backend (the "
        "default) the pixels are those of training's evaluation,\nup to rounding in fp32; "
        'Pillow\'s (`backend="pil"`) are at most one level of 255 apart. Make a picture of 16 bits '
        "a channel\none of 8 bits first.\n"
    )
    if loading.has_text:
        text += (
            "\nTexts become lower case and are split by byte-pair encoding with the merges of the "
            "run. Pass `truncation=True`.\nWrongly decoded text, ligatures and wide letters are "
            "taken as they are; training repaired them by ftfy: `ftfy.fix_text(text)`.\n"
        )
    return text


def _data(training: Training) -> str:
    if not training.data:
        return ""
    return "Data:\n\n" + _table(("data set", "split", "SHA-256 of its manifest"), training.data)


def _measured(training: Training) -> str:
    """Return the table of the measures of evaluation.json, where it is of these weights."""
    if training.evaluation is None:
        return "## Measured\n\nThe run has no evaluation.\n"
    if other := _of_others(training):
        return f"## Measured\n\n{other}\n"
    rows = []
    for name, values in training.evaluation.items():
        if isinstance(values, Mapping) and _is_number(values.get(training.which)):
            rows.append((f"`{name}`", *(_shown(values.get(source)) for source in _SOURCES)))
    if not rows:
        return "## Measured\n\nThe run's evaluation has no figures of these weights.\n"
    here = ["this model" if s == training.which else s for s in _SOURCES]
    table = _table(("measure", *here), rows)
    said = training.evaluation["evaluated"]
    of_data = _evaluated_data(said)
    return f"## Measured\n\nOf these weights, after step {said['step']}, on {of_data}:\n\n{table}"


def _of_others(training: Training) -> str:
    """Say of which model or data evaluation.json is, where not of these; empty where it is."""
    said = (training.evaluation or {}).get("evaluated", {})
    step, data = said.get("step"), said.get("data")
    if not isinstance(step, int) or not isinstance(data, Mapping):
        return (
            "The run's `evaluation.json` does not say of which step and data its figures are, so "
            "they are not shown."
        )
    digests = {digest for _, _, digest in training.data}
    if step == training.step and data.get("sha256") in digests:
        return ""
    own = "a step not known" if training.step is None else f"step {training.step}"
    return (
        f"The run's `evaluation.json` has figures of step {step} on {_evaluated_data(said)}. These "
        f"weights are of {own}, and the data they were trained on stand above: no figure is shown."
    )


def _evaluated_data(said: Mapping[str, Any]) -> str:
    data = said["data"]
    return f"split {said.get('split')} of {data.get('name')} (SHA-256 {data.get('sha256')})"


def _limits(licence: str, loading: Loading) -> str:
    lines = ["- What the model has seen is what the data above show; nothing else was measured."]
    if not licence:
        lines.append("- The licence of the weights is not stated: ask who trained them.")
    else:
        lines.append("- The licence named at the top is that of the weights.")
    if loading.classifies:
        lines.append("- Other heads of the training are not in the folder.")
    elif not loading.has_text:
        lines.append("- Heads of the training (categories, captions) are not in the folder.")
    else:
        lines.append("- The head of categories is not in the folder.")
    if loading.why_own:
        lines.append("- The code in the folder is m3i-fast's, under Apache-2.0.")
    if loading.has_text:
        lines.append("- The tokenizer's merges are the first ones of CLIP's, under MIT.")
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
