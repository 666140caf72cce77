"""A folder of exported graphs, and what goes into them as JSON.

image.onnx or image.pt2  pictures
text.onnx or text.pt2    texts, of a model with a head of captions
preprocess.json          how a picture becomes the input, names of the outputs, scale of the cosines
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m3i_fast.durable_files import created_whole, sync, write_atomically
from m3i_fast.inference.graphs.formats import SUFFIX, Target, write_graph
from m3i_fast.inference.graphs.modules import Graph, ImageGraph, TextGraph, capture, output_name
from m3i_fast.inference.model import Model
from m3i_fast.objectives.terms import Category, Labels

PREPROCESS = "preprocess.json"
ACTIVATION = {Category: "softmax", Labels: "sigmoid"}
"""What makes probabilities of a column's logits; numbers need nothing."""


def save_graphs(model: Model, out: Path, target: Target) -> list[str]:
    """Write the graphs of a model to a new folder, and return the names of its files.

    Graphs compute in fp32, for the device of the model where the target is compiled. After an error
    there is no folder. Raises FileExistsError where `out` is there, and what `Model.class_names`
    and `Model.column_names` raise.
    """
    graphs: dict[str, Graph] = {"image": ImageGraph(model)}
    if model.caption is not None:
        graphs["text"] = TextGraph(model.caption)
    preprocess = json.dumps(describe(model), indent=2) + "\n"
    with created_whole(out) as folder:
        for name, graph in graphs.items():
            write_graph(capture(graph), graph, folder / f"{name}{SUFFIX[target]}", target)
        write_atomically(folder / PREPROCESS, preprocess.encode())
        files = sorted(folder.iterdir())
        for file in files:
            sync(file)
    return [file.name for file in files]


def describe(model: Model) -> dict[str, Any]:
    """Return the content of preprocess.json, JSON-able."""
    made = model.transform.preprocessing
    told: dict[str, Any] = {
        "version": 1,
        "size": made.size,
        "crop": "largest centred square",
        "filter": made.interpolation,
        "antialias": True,
        "mean": [*made.mean],
        "std": [*made.std],
        "normalised_in_graph": True,
        "num_prefix_tokens": model.num_prefix_tokens,
    }
    if model.category is not None:
        told["class_names"] = [*model.class_names]
    if model.column_heads:
        told["columns"] = {
            name: {
                "output": output_name(head),
                "activation": ACTIVATION.get(type(head)),
                "names": [*model.column_names[name]],
            }
            for name, head in model.column_heads.items()
        }
    if model.caption is not None:
        cfg, bias = model.caption.text_encoder.cfg, model.logit_bias
        told |= {
            "context_length": cfg.context_length,
            "end_token": cfg.vocab_size - 1,
            "logit_scale": model.logit_scale.item(),
            "logit_bias": None if bias is None else bias.item(),
        }
    return told
