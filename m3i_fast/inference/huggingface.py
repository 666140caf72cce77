"""What a run has learnt, as a folder that Hugging Face's transformers loads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.run_encoder import Which
from m3i_fast.engine.initial_weights import INIT_FILE
from m3i_fast.engine.run.data_record import DataRecord
from m3i_fast.export.huggingface import own_model
from m3i_fast.export.huggingface.model_card import Loading, Training, loading_lines, model_card
from m3i_fast.export.huggingface.native import native_model, no_class_for
from m3i_fast.export.huggingface.own_model import TextTower
from m3i_fast.export.huggingface.preprocessing import preprocessor_config
from m3i_fast.export.huggingface.save import save_folder
from m3i_fast.export.huggingface.tokenizer import tokenizer_files
from m3i_fast.inference.loading import Stored, data_record, find_weights, load
from m3i_fast.inference.model import Model
from m3i_fast.json_files import read_json
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.methods import METHODS, Method
from m3i_fast.objectives.terms import Category
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer

Task = Literal["encoders", "image-classification"]

_CLASSIFIER = "no class of transformers classifies by this head of the mean over the patches"
_CAPTIONS = "no class of transformers compares texts with the mean over a picture's patches"


def save_transformers_folder(
    run: Path,
    out: Path,
    *,
    which: Which = "trained",
    image_only: bool = False,
    task: Task = "encoders",
    column: str = "",
    licence: str = "",
    data: Path | None = None,
) -> str:
    """Write a folder for `AutoModel.from_pretrained(OUT)`, with its processor and model card.

    The encoder is a class of transformers where one computes the same (`export.huggingface.native`)
    and else one that the folder brings. A run with captions becomes both encoders with the
    tokenizer, unless image_only or the moving average, which has no heads. task: the folder of an
    image classification is `AutoModelForImageClassification`'s, by the head of a column of a class
    or of labels; no column: of the class. licence: of the weights, for the card. run, which, data:
    as `load` takes them. Returns the lines that use the folder.

    Raises as `load`, and FileExistsError.
    """
    model = load(run, which=which, device="cpu", data=data)
    stored = find_weights(run)
    cfg = TrainConfig.load(stored.directory / "config.json")
    record = data_record(stored, cfg, data)
    if task == "image-classification":
        config, weights, loading = _classifier(model, column)
    else:
        text = None if image_only else _text_tower(model, cfg)
        config, weights, loading = _model(model.encoder, text)
    made = record.preprocessing
    preprocessing = preprocessor_config(
        made.size,
        mean=made.mean,
        std=made.std,
        interpolation=made.interpolation,
        has_text=loading.has_text,
    )
    training = _training(stored, cfg, record, which)
    card = model_card(out.name, licence, made.size, loading, training)
    files = {"preprocessor_config.json": preprocessing, "README.md": card}
    if loading.why_own:
        files |= own_model.code()
    if loading.has_text:
        files |= _tokenizer_files(model.tokenizer)
    save_folder(out, config=config, weights=weights, files=files)
    return loading_lines(loading, str(out))


def _model(
    encoder: ViT | InternImage, text: TextTower | None
) -> tuple[dict[str, Any], dict[str, Tensor], Loading]:
    """Return config.json and weights of a class of transformers or of our own, and which it is."""
    why_own = _why_own(encoder) if text is None else _CAPTIONS
    if why_own:
        config, weights = own_model.own_model(encoder, text)
        class_name = own_model.CLASS_NAME
    else:
        assert isinstance(encoder, ViT)
        native = native_model(encoder)
        config, weights, class_name = native.config, native.state, native.class_name
    loading = Loading(
        class_name=class_name,
        why_own=why_own,
        num_prefix=encoder.num_prefix if isinstance(encoder, ViT) else 0,
        has_text=text is not None,
        has_logit_bias=text is not None and "bias" in text.weights,
    )
    return config, weights, loading


def _classifier(model: Model, column: str) -> tuple[dict[str, Any], dict[str, Tensor], Loading]:
    """Return config.json and weights of a classifier of our own, and that it is one."""
    head = model.class_head(column)
    told = own_model.ClassifierHead(
        names=model.column_names[column] if column else model.class_names,
        weights={n: value for n, value in head.state_dict().items() if n.startswith("head.")},
    )
    if isinstance(head, Category):
        told = replace(told, class_embeddings=head.class_embeddings(), log_scale=head.log_scale)
    config, state = own_model.own_classifier(model.encoder, told)
    loading = Loading(
        class_name=own_model.CLASSIFIER_NAME,
        why_own=_CLASSIFIER,
        num_prefix=model.num_prefix_tokens,
        has_text=False,
        classifies="classes" if told.excludes else "labels",
    )
    return config, state, loading


def _why_own(encoder: ViT | InternImage) -> str:
    if isinstance(encoder, ViT):
        return no_class_for(encoder.cfg)
    return "transformers has no InternImage; its deformable convolutions are in plain torch here"


def _text_tower(model: Model, cfg: TrainConfig) -> TextTower | None:
    if model.caption is None:
        return None
    weights = {
        name: value
        for name, value in model.caption.state_dict().items()
        if name.startswith(("text_encoder.", "head.")) or name in ("log_scale", "bias")
    }
    return TextTower(cfg=cfg.text, weights=weights)


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    return tokenizer_files(tokenizer.vocabulary, tokenizer.merges, tokenizer.context_length)


def _training(stored: Stored, cfg: TrainConfig, record: DataRecord, which: Which) -> Training:
    evaluation = stored.directory / "evaluation.json"
    method = _method(cfg)
    return Training(
        method=method.title if method else "",
        is_m3i=method is not None and method.family == "M3I",
        facts=[*_facts(stored, cfg)],
        data=[(each.name, each.split, each.digest) for each in record.datasets],
        evaluation=read_json(evaluation) if evaluation.is_file() else None,
        which=which,
        step=stored.step,
    )


def _method(cfg: TrainConfig) -> Method | None:
    return next((m for m in METHODS.values() if m.terms == cfg.objective.terms), None)


def _facts(stored: Stored, cfg: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yield what the run's own files say of how it was trained."""
    directory = stored.directory
    environment = directory / "env.json"
    if environment.is_file():
        tree = read_json(environment)
        if recipe := _recipe(str(tree.get("command", ""))):
            yield "recipe", recipe
        yield "commit of m3i-fast", str(tree.get("commit") or "a wheel")
        yield "torch", str(tree.get("torch"))
    terms, method = cfg.objective.active_terms, _method(cfg)
    yield "method", method.title if method else "a list of terms of its own"
    yield (
        "terms",
        "; ".join(f"{t.name} ({t.target}, {t.likelihood}, x {t.weight:g})" for t in terms),
    )
    if cfg.init:
        yield "began from", _initial(cfg.init.partition(":")[0], directory / INIT_FILE)
    taken = f"of {cfg.num_steps}" if stored.step is None else f"{stored.step} of {cfg.num_steps}"
    yield "steps", taken
    yield "pictures a step and rank", str(cfg.data.batch_size)
    yield "optimiser", f"{cfg.optim.name}, matrices by {cfg.optim.matrices}, lr {cfg.optim.lr:g}"
    yield "precision", cfg.precision
    vision = json.loads(cfg.to_json())["vision"]
    yield "encoder", ", ".join(f"{name} {value}" for name, value in vision.items())


def _initial(scheme: str, path: Path) -> str:
    """Return what init.json says of the weights that the run began from, without their place."""
    if not path.is_file():
        return f"weights of {scheme}"
    said = read_json(path, {"sha256": str})
    nearest = said.get("nearest_architecture")
    return f"weights of {scheme}{f', {nearest}' if nearest else ''}, SHA-256 {said['sha256']}"


def _recipe(command: str) -> str:
    """Return the recipe in a command line, without the paths and settings after it."""
    try:
        words = shlex.split(command)
    except ValueError:  # older versions did not quote
        words = command.split()
    place = words.index("train") + 1 if "train" in words else len(words)
    word = words[place] if place < len(words) else ""
    return word if word.isidentifier() else ""
