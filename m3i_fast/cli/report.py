"""m3i-fast report RUN: the page of a run, finished or going on."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from m3i_fast.cli import console
from m3i_fast.config.fields import BATCHES, Checked, Conflict, unmet
from m3i_fast.config.run_encoder import expect_run
from m3i_fast.durable_files import expect_folder, make_directories
from m3i_fast.flags import read_verb

if TYPE_CHECKING:  # torch takes seconds: help and refusals come before it
    from collections.abc import Iterator

    from m3i_fast.config import TrainConfig
    from m3i_fast.engine.run.status import RunStatus

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportCommand(Checked):
    """Write one page of a run: curves, samples, what it finds, what bounds its speed.

    A run that is going on is not disturbed.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run directory that `m3i-fast train` wrote."""
    out: Path | None = None
    """Page to write; none: report.html in the run directory."""
    data: Path | None = None
    """Where the run's data lie now; none: where its config.json has them. Of a mixture the first
    data set is shown."""
    profile: Path | None = None
    """Folder that `m3i-fast profile` wrote, for what bounds the speed; none: RUN/profile, if there
    is one."""
    pictures: Annotated[int, BATCHES] = 500
    """Most pictures of the held-out split that the newest checkpoint encodes."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device that encodes them; a run that is going on may need all of a GPU."""
    watch: float = 0.0
    """Seconds after which the page is written again, until the run ends or Ctrl-C; 0: once."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from unmet(self, watch=(self.watch >= 0, "seconds, or 0"))


def main(argv: list[str]) -> int:
    command = read_verb(ReportCommand, "report", argv)
    expect_run(command.run, "RUN")
    out = command.out or command.run / "report.html"
    expect_folder(out.parent, "--out")
    if out.is_dir():
        raise ValueError(f"--out: expected a file, got the folder {out}: type {out}/report.html")
    make_directories(out.parent)
    while True:
        status = write(command, out)
        console.print(f"{' '.join(status.sentences)} Open {out}", soft_wrap=True, highlight=False)
        if not command.watch or status.state != "training":
            return 0
        time.sleep(command.watch)


def write(command: ReportCommand, out: Path, *, beside_untrained: bool = False) -> RunStatus:
    """Write the page of a run, and return how far it is.

    beside_untrained: also show what the encoder finds that the run started from.
    """
    from m3i_fast.config import TrainConfig
    from m3i_fast.engine.checkpoint.checkpoints import checkpoints
    from m3i_fast.engine.run.status import status_of
    from m3i_fast.observe.metrics import last_step
    from m3i_fast.report.evaluations.files import evaluations_of
    from m3i_fast.report.run.gather import gather
    from m3i_fast.report.run.page import write_report

    run = command.run
    cfg = TrainConfig.load(run / "config.json")
    if command.data is not None:
        cfg = replace(cfg, data=replace(cfg.data, path=command.data, mixture=()))
    saved = [checkpoint.step for checkpoint in checkpoints(run / "checkpoints")]
    status = status_of(
        run,
        num_steps=cfg.num_steps,
        logged_step=last_step(run / "metrics.jsonl"),
        saved_step=saved[-1] if saved else None,
    )
    encoders, class_names = _encoders(run, command.device)
    if beside_untrained and isinstance(encoders, dict):
        encoders["untrained"] = _untrained(cfg)
    recipe, changed = nearest_recipe(cfg)
    inputs = gather(
        run,
        cfg,
        encoders,
        title=f"Run {run.resolve().name}",
        num_steps=status.step,
        class_names=class_names,
        most=command.pictures,
        notes=status.sentences,
        evaluation=_evaluation(run),
        data_evaluations=evaluations_of(run),
        recipe=recipe,
        changed=changed,
        data=_data(run, cfg),
        initial_weights=_initial_weights(run),
        speed_notes=_profile(command),
    )
    write_report(inputs, out)
    return status


def _encoders(run: Path, device: str) -> tuple[Any, tuple[str, ...]]:
    """Return the encoder of the newest checkpoint with its classes, or the reason for none."""
    import torch

    from m3i_fast.inference.loading import load
    from m3i_fast.report.run.gather import ShownEncoder

    try:
        model = load(run, device=device, dtype=torch.float32)
    except (OSError, ValueError) as error:
        return f"No checkpoint can be shown: {error}.", ()
    shown = ShownEncoder(
        encoder=model.encoder,
        caption=model.caption,
        category=model.category,
        device=model.device,
    )
    try:
        return {"trained": shown}, model.class_names if model.category is not None else ()
    except ValueError as error:  # an older run without a record, whose data have gone
        logger.warning("classes: %s", error)
        return {"trained": shown}, ()


def _untrained(cfg: TrainConfig) -> Any:
    """Return the encoder that a run started from, with its caption head, on the CPU.

    A GPU draws other weights of the seed: where the run's was one and none is here, it is another.
    """
    from m3i_fast.engine.evaluator import build_untrained
    from m3i_fast.objectives.terms import Caption
    from m3i_fast.report.run.gather import ShownEncoder

    device = cfg.device if cfg.device == "cpu" else "auto"
    objective = build_untrained(replace(cfg, device=device)).to("cpu")
    captions = objective.terms_of(Caption)
    return ShownEncoder(encoder=objective.encoder, caption=captions[0] if captions else None)


def nearest_recipe(cfg: TrainConfig) -> tuple[str, list[tuple[str, Any, Any]]]:
    """Return the recipe that a config differs from in the fewest fields, and those fields.

    Each field is (name, the recipe's value, the config's value).
    """
    from m3i_fast.config.convert import to_tree
    from m3i_fast.recipes import recipes

    own = _fields("", to_tree(cfg))
    found: dict[str, list[tuple[str, Any, Any]]] = {}
    for name, make in recipes().items():
        usual = _fields("", to_tree(make()))
        names = dict.fromkeys([*usual, *own])
        found[name] = [
            (field, usual.get(field), own.get(field))
            for field in names
            if usual.get(field) != own.get(field)
        ]
    name = min(found, key=lambda each: len(found[each]))
    return name, found[name]


def _fields(path: str, tree: Any) -> dict[str, Any]:
    """Return the values of a config's tree by their flags' names."""
    pairs = enumerate(tree) if isinstance(tree, list) else tree.items()
    fields: dict[str, Any] = {}
    for key, value in pairs:
        name = f"{path}.{key}" if path else str(key)
        is_nested = isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(each, dict) for each in value)
        )
        fields |= _fields(name, value) if is_nested else {name: value}
    return fields


def _evaluation(run: Path) -> dict[str, Any] | None:
    """Return evaluation.json of a run; None without one, and with a warning for a damaged one."""
    from m3i_fast.json_files import read_json

    try:
        return dict(read_json(run / "evaluation.json", {"held_out_concepts": int}))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s; it is left out", error)
        return None


def _data(run: Path, cfg: TrainConfig) -> dict[str, Any]:
    """Return what the run keeps of its data, and the counts of the data if they are there."""
    from m3i_fast.engine.run.data_record import read_record
    from m3i_fast.pipelines.storage.objects import place_of
    from m3i_fast.pipelines.storage.remote import manifest_at

    told: dict[str, Any] = {}
    try:
        record = read_record(run)
    except ValueError as error:
        record, told = None, {"data.json": str(error)}
    if record is not None:
        told |= {f"{d.name}, {d.split}": f"sha256 {d.digest}" for d in record.datasets}
        tokenizer = record.tokenizer
        told |= {
            "classes": len(record.class_names),
            "tokenizer": f"{tokenizer.vocab_size} ids, {tokenizer.context_length} a caption",
            "pixels of a view": record.preprocessing.size,
        }
    for part in cfg.data.members or (cfg.data,):
        place = place_of(part.path)
        try:
            splits = manifest_at(part).splits.items()
        except (OSError, ValueError) as error:
            told[place] = f"not there: {error}"
            continue
        told |= {
            f"{place}, {name}": f"{split.num_samples:,} pictures, {split.num_captions:,} with a "
            f"caption, {split.num_labels:,} with a class"
            for name, split in splits
        }
    return told


def _initial_weights(run: Path) -> dict[str, Any]:
    """Return what init.json says of the weights that a run began from; {} without one."""
    from m3i_fast.engine.initial_weights import INIT_FILE
    from m3i_fast.json_files import read_json

    try:
        told = read_json(run / INIT_FILE, {"source": str, "taken": dict, "new": list})
    except FileNotFoundError:
        return {}
    except ValueError as error:
        return {INIT_FILE: str(error)}
    changed = [name for name, of in told["taken"].items() if of.get("change")]
    return {
        "source": told["source"],
        "sha256": told.get("sha256", ""),
        "architecture": told.get("nearest_architecture", ""),
        "weights taken": len(told["taken"]),
        "of these changed": ", ".join(changed) or "none",
        "new": ", ".join(told["new"]) or "none",
        "left out": ", ".join(told.get("left_out", ())) or "none",
    }


def _profile(command: ReportCommand) -> list[str]:
    """Return what a profile of the run says; of RUN/profile only where there is one."""
    from m3i_fast.profiling.summary import read_summary
    from m3i_fast.profiling.summary_text import sentences

    folder = command.profile or command.run / "profile"
    if command.profile is None and not folder.is_dir():
        return []
    try:
        return [f"As profiled in {folder.name}:", *sentences(read_summary(folder))]
    except (FileNotFoundError, ValueError) as error:
        if command.profile is not None:
            raise
        return [f"What {folder.name} holds cannot be read: {error}."]
