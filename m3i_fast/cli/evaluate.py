"""m3i-fast evaluate: a run on its own held-out concepts, or any encoder on pictures of a user."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich import box
from rich.table import Table

from m3i_fast.cli import console
from m3i_fast.config.data import CACHE_DIR
from m3i_fast.config.fields import BATCHES, check_fields
from m3i_fast.config.run_encoder import expect_run
from m3i_fast.durable_files import expect_folder
from m3i_fast.flags import read_verb
from m3i_fast.line_files import read_lines
from m3i_fast.report.evaluations.verdict import SOURCES, Judgement, judge, judge_more
from m3i_fast.terminal import make_console

if TYPE_CHECKING:  # torch takes seconds: help and refusals come before it
    from m3i_fast.measuring.evaluate import EvaluationSettings
    from m3i_fast.measuring.results import Results

Several = tyro.conf.UseAppendAction
Kind = Literal[
    "auto", "packed", "imagefolder", "folder", "table", "tars", "huggingface", "torchvision"
]
MeasureName = Literal[
    "knn",
    "few-labels",
    "zero-shot",
    "retrieval",
    "linear",
    "attentive",
    "fine-tuning",
    "correspondence",
    "segmentation",
]


@dataclass(frozen=True, kw_only=True)
class OnPictures:
    """With --data alone: which pictures, beside what, and how."""

    baseline: Annotated[tuple[str, ...], Several] = ()
    """Another encoder, named as MODEL, that is measured beside it. May be given several times."""
    measures: tuple[MeasureName, ...] = ()
    """Some of: knn few-labels zero-shot retrieval, which are all that is measured without it, as
    far as data and encoder allow; and linear attentive fine-tuning correspondence segmentation,
    which take longer."""
    linear_steps: int | None = None
    """Steps of linear, about; none: DINOv2's 12,500 on a GPU, and a tenth of them on a CPU."""
    attentive_epochs: int = 20
    """Epochs of attentive, over training pictures; V-JEPA's."""
    fine_tuning_epochs: int = 50
    """Epochs of fine-tuning, over training pictures; MAE's of ViT-L, which has 100 for ViT-B."""
    segmentation: Path | None = None
    """Folder of pictures and masks, as ADE20k or Pascal VOC, on which patches are segmented too."""
    segmentation_steps: int | None = None
    """Steps of segmentation; none: DINOv2's 40,000 on a GPU, and a tenth of them on a CPU."""
    class_names: Path | None = None
    """Text file with the name of each class on a line of its own, by index, for prompts."""
    templates: Path | None = None
    """Text file with a prompt on each line, {} for the class; without it CLIP's 80 for ImageNet."""
    kind: Kind = "auto"
    """What DIR is, as `m3i-fast data pack --kind` has it; packed: written by m3i-fast data."""
    image_column: str | None = None
    """Column of pictures, as `m3i-fast data pack` has it."""
    caption_column: Annotated[tuple[str, ...], Several] = ()
    """Column of captions; may be given several times. '' for none."""
    label_column: str | None = None
    """Column of the class. '' for none."""
    split_column: str | None = None
    """Column with the name of each picture's split."""
    group_column: str | None = None
    """Column of groups of near-duplicates, which are in one split and counted as one."""
    json_caption: Annotated[tuple[str, ...], Several] = ()
    """Field of captions in JSON, as `m3i-fast data pack` has it; may be given several times."""
    image_root: Path | None = None
    """Folder that paths of a table are relative to; without this that of the table."""
    delimiter: str | None = None
    """What ends a cell of a text table; guessed by its first line."""
    allow_outside: bool = False
    """Read files that lie outside of DIR, or are reached by links out of it."""
    max_unpacked_gib: float | None = None
    """Most GiB that a compressed tar or a Parquet file of DIR may unpack to, as `m3i-fast data
    pack` has it."""
    torchvision_class: str | None = None
    """Class of torchvision.datasets that reads DIR."""
    train_split: str = "train"
    """Split whose labels classifiers are fitted to."""
    share: float = 0.2
    """Of data with labels and one split, the share that is measured on."""
    seed: int = 0
    """Seed of that share, of the draws of few labels, and of what is trained and cut."""
    out: Path | None = None
    """Folder of page.html, of results.json and of arrays for plots; none: `evaluation` in a run's
    folder, else evaluation/MODEL in the current one."""
    cache_dir: Path = CACHE_DIR
    """Folder where features are kept, by digest of weights, data, transform and dtype."""
    workers: int | None = None
    """Processes that decode pictures; none: as many as cores, which ranks of a node share."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where encoders run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: that of a run, for others bfloat16 where a GPU has it."""
    allow_download: bool = False
    """Have timm or open_clip fetch weights that are not in their caches."""
    record: bool = False
    """Append a row to the ledger, benchmarks/results/evaluation.jsonl."""


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Measure a run on its own held-out concepts, or, with --data, any encoder on your pictures.

    Without --data, MODEL is a run: kNN, probes, scenes and retrieval on the held-out concepts of
    its data, beside the untrained encoder, pixels and chance (evaluation.json). With --data DIR the
    field's protocols: kNN, few labels, zero-shot and retrieval on a labelled or captioned folder,
    and by --measures linear, attentive, fine-tuning and correspondence, beside any --baseline
    (evaluation/page.html and results.json; unfinished.json until all is measured). m3i-fast launch
    evaluate ... computes the latter's features on all ranks.
    """

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run; with --data also a checkpoint, a folder of export --to safetensors,
    timm:NAME_OR_FOLDER[,checkpoint=FILE], open_clip:NAME_OR_FOLDER[,checkpoint=FILE], pixels, or
    random:RUN, a run's encoder as it was before training."""
    data: Path | None = None
    """Folder of pictures to measure on: packed by m3i-fast data, an ImageFolder, a Hugging Face
    data set on disk, or whatever else m3i-fast data pack reads."""
    split: str | None = None
    """Split to measure on, on which no setting is chosen; none: heldout, or with --data the first
    of heldout, test and tune that there is."""
    held_out_data: Path | None = None
    """Without --data: a packed data set whose held-out concepts are taken in place of the run's
    own, with the run's tokenizer. A run on a mixture of data sets needs it."""
    batch_size: Annotated[int, BATCHES] = 256
    """Pictures a forward pass."""
    json: bool = False
    """Print the figures as JSON, with every interval, in place of the table."""
    pictures: Annotated[OnPictures, tyro.conf.arg(name="")] = field(default_factory=OnPictures)

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: list[str]) -> int:
    command = read_verb(EvaluateCommand, "evaluate", argv)
    if command.data is not None:
        return _on_pictures(command, command.data)
    if command.pictures != OnPictures():
        raise ValueError(
            "--data: expected the folder of pictures that the other flags are for, got none; "
            "without it MODEL is a run, measured on its own held-out concepts"
        )
    return _on_held_out(command)


# ---- The held-out concepts of a run --------------------------------------------------------------


def _on_held_out(command: EvaluateCommand) -> int:
    from m3i_fast.engine.evaluator import evaluate  # loads torch, which help does without

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluate RUN: expected one process, or --data DATA, which takes several")
    run = Path(command.model)
    expect_run(run, "MODEL", "; with --data DATA it may be any encoder, such as timm:NAME")
    evaluation = evaluate(
        run,
        split=command.split or "heldout",
        batch_size=command.batch_size,
        data=command.held_out_data,
    )
    if command.json:
        sys.stdout.write(json.dumps(evaluation.figures, indent=2) + "\n")
    else:
        print_figures(evaluation.figures)
        console.print(f"wrote {run / 'evaluation.json'}", soft_wrap=True)
    return 0


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print the figures of evaluation.json on standard output, those of the hard half last."""
    output = make_console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"{figures['held_out_concepts']} held-out concepts", overflow="fold")
    for name in SOURCES.values():
        table.add_column(name, justify="right", no_wrap=True)
    rows = judge(figures) + judge_more(figures)
    for row in sorted(rows, key=lambda row: row.name.endswith("_hard")):
        table.add_row(row.title, *(_cell(row, source) for source in SOURCES))
    output.print(table)
    output.print(
        "* not told from the trained encoder: by the 95 % interval of the difference, paired, over "
        "concepts with near-duplicates as one, and by Holm's correction for all comparisons. "
        "Hard half: the concepts that lie farthest from any training picture.",
        highlight=False,
    )


def _cell(row: Judgement, source: str) -> str:
    """Return a value, marked where the trained encoder's is neither above nor below it."""
    alike = any(
        comparison.source == source and comparison.verdict == "no difference found"
        for comparison in row.comparisons
    )
    return row.shown.get(source, "-") + (" *" if alike else "  ")


# ---- Pictures of a user --------------------------------------------------------------------------


def _on_pictures(command: EvaluateCommand, data: Path) -> int:
    if command.held_out_data is not None:
        raise ValueError("--held-out-data: expected without --data, which names the pictures")
    settings = _settings(command, data)
    from m3i_fast.engine.parallel.ranks import join_world, leave_world
    from m3i_fast.engine.precision.arithmetic import resolve_device
    from m3i_fast.measuring.evaluate import default_out, evaluate, no_bar, plan
    from m3i_fast.measuring.results import expect_kept, expect_replaceable
    from m3i_fast.measuring.tables import print_plan, print_results
    from m3i_fast.pipelines.packing.progress import bar

    out = command.pictures.out or default_out(command.model)
    expect_folder(out, "--out")
    expect_replaceable(out, model=settings.model, data=settings.source.path)
    world = join_world(resolve_device(command.pictures.device))
    if not world.is_main:  # what a source needs to be read in any order, the first rank writes
        world.wait_for_all()
    planned = plan(settings)
    asked = (settings.model, *settings.baselines)
    expect_kept(out, source=planned.source, encoders=asked, measures=planned.measures)
    if world.is_main:
        print_plan(planned, console)
        world.wait_for_all()
    results = evaluate(
        settings,
        planned,
        world,
        tell=lambda text: console.print(text, soft_wrap=True, highlight=False),
        bar=(lambda title, total: bar(console, title, total, 0)) if world.is_main else no_bar,
        keep=lambda so_far: so_far.keep(out),
    )
    leave_world()
    if results is None:
        return 0
    results.save(out)
    if command.json:
        sys.stdout.write(json.dumps(results.as_dict(), indent=2) + "\n")
    else:
        print_results(results, make_console())
    console.print(f"wrote {out}/results.json and the arrays of its plots", soft_wrap=True)
    _write_page(out)
    if command.pictures.record:
        _record(results)
    return 0


def _write_page(out: Path) -> None:
    """Write page.html beside results.json; without plotly say that there is none."""
    from m3i_fast.measuring.results import PAGE
    from m3i_fast.report.evaluations.files import read_evaluation
    from m3i_fast.report.evaluations.page import write_evaluation_page

    try:
        page = write_evaluation_page(read_evaluation(out), out / PAGE)
    except ImportError as error:
        console.print(f"no page: {error}; then start again, features are kept", soft_wrap=True)
    else:
        console.print(f"open {page}", soft_wrap=True)


def _settings(command: EvaluateCommand, data: Path) -> EvaluationSettings:
    """Return what is measured; ValueError names the flag that is wrong."""
    import torch

    from m3i_fast.measuring.evaluate import EvaluationSettings
    from m3i_fast.measuring.features import ExtractionSettings
    from m3i_fast.measuring.measure import TrainingSettings
    from m3i_fast.measuring.source import SourceSettings

    chosen = command.pictures
    if not 0 < chosen.share < 1:
        raise ValueError(f"--share: expected a number in (0, 1), got {chosen.share}")
    if chosen.workers is not None and chosen.workers < 0:
        raise ValueError(f"--workers: expected at least 0, got {chosen.workers}")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = max(len(os.sched_getaffinity(0)) // ranks_here, 1)
    return EvaluationSettings(
        model=command.model,
        baselines=chosen.baseline,
        source=SourceSettings(
            path=data,
            kind=chosen.kind,
            image_column=chosen.image_column,
            caption_columns=chosen.caption_column,
            label_column=chosen.label_column,
            split_column=chosen.split_column,
            group_column=chosen.group_column,
            json_captions=chosen.json_caption,
            image_root=chosen.image_root,
            delimiter=chosen.delimiter,
            allow_outside=chosen.allow_outside,
            max_unpacked_gib=chosen.max_unpacked_gib,
            torchvision_class=chosen.torchvision_class,
            classes=_lines(chosen.class_names, "--class-names"),
            train_split=chosen.train_split,
            split=command.split,
            share=chosen.share,
            seed=chosen.seed,
            cache_dir=chosen.cache_dir,
        ),
        measures=chosen.measures,
        templates=_lines(chosen.templates, "--templates"),
        dtype=None if chosen.dtype == "auto" else getattr(torch, chosen.dtype),
        allow_download=chosen.allow_download,
        extraction=ExtractionSettings(
            cache_dir=chosen.cache_dir,
            batch_size=command.batch_size,
            workers=cores if chosen.workers is None else chosen.workers,
        ),
        training=TrainingSettings(
            linear_steps=chosen.linear_steps,
            attentive_epochs=chosen.attentive_epochs,
            fine_tuning_epochs=chosen.fine_tuning_epochs,
            segmentation_steps=chosen.segmentation_steps,
        ),
        segmentation=chosen.segmentation,
        seed=chosen.seed,
    )


def _lines(file: Path | None, flag: str) -> tuple[str, ...]:
    """Return the stripped lines of a text file; none for no file."""
    return () if file is None else tuple(map(str.strip, read_lines(file, flag)))


def _record(results: Results) -> None:
    from m3i_fast.benchmarks.ledger.rows import append_row

    found = results.as_dict()
    kept = ("name", "digest", "dtype")
    encoders = [
        {name: encoder[name] for name in kept}
        | {measure: row["figures"] for measure, row in encoder["measures"].items()}
        for encoder in found["encoders"]
    ]
    figures = {"data": found["data"], "settings": found["settings"], "encoders": encoders}
    file = append_row("evaluation", figures)
    console.print(f"appended a row to {file}", soft_wrap=True)
