"""Evaluation of a run while it trains: the live model on a split of the run's own data.

Training is the same to the bit with it and without: the model is in evaluation mode, its buffers
stay, random generators and CUDA graphs are as they were afterwards, and no clock of the step runs.

Legend: N pictures, of all ranks, K classes, T tokens, C encoder width, E embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from m3i_fast.config import TrainConfig
from m3i_fast.config.data import LoaderConfig
from m3i_fast.engine.cuda_graphs import without_graphs
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import autocast
from m3i_fast.engine.run.random_state import random_state, set_random_state
from m3i_fast.evaluation.chosen_rows import ChosenRows, choose_rows
from m3i_fast.evaluation.live_figures import (
    classifier_accuracies,
    knn_accuracies,
    recalls,
    zero_shot_accuracy,
)
from m3i_fast.evaluation.retrieval.zero_shot import prompt_of, says_nothing
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.targets import autocast_dtype, normalise_views
from m3i_fast.objectives.terms import Category
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer, TokenizerInfo
from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.pipelines.opened.mixture import read_described
from m3i_fast.pipelines.samples_to_views import SampleError
from m3i_fast.pipelines.storage.objects import place_of
from m3i_fast.pipelines.storage.remote import manifest_at

logger = logging.getLogger(__name__)

PROMPT = "a photo of a {}."  # as CLIP, arXiv 2103.00020, section 3.1.4
_MOST_RANKED = 5
_MOST_A_BATCH = 256  # pictures of a forward pass on one rank


class UnreadableRowsError(RuntimeError):
    """A rank cannot read the pictures to evaluate; raised on all ranks, at the same batch."""


class LiveEvaluation:
    """kNN, the run's classifier, prompts and retrieval, of `cfg.evaluate_pictures` a split.

    The bank of kNN is `cfg.data.split`, where labelled; queries are `cfg.evaluate_split`. The
    classifier is that of the first term on the data's classes. Classes by prompts, zero-shot, need
    their names and captions that the run learns. What the data lack is left out, with a line that
    says so. A picture that cannot be decoded is left out, named in a warning and counted, unless
    `cfg.data` is strict.

    Raises ValueError where there is nothing to measure, where the chosen pictures of the bank are
    all of one class though its split has others, or where captions have another tokenizer than the
    run's, and as `open_data`.
    """

    def __init__(self, cfg: TrainConfig, world: World) -> None:
        self._cfg, self._world = cfg, world
        data = replace(cfg.data, path=cfg.evaluate_data or cfg.data.path, mixture=())
        most = cfg.evaluate_pictures
        wants_captions = any(term.target == "caption" for term in cfg.objective.active_terms)
        manifest = manifest_at(data)
        self._retrieves = wants_captions and manifest.split(cfg.evaluate_split).num_captions > 0
        queries = replace(data, split=cfg.evaluate_split)
        self._queries = choose_rows(queries, most, labelled=not self._retrieves)
        has_classes = len(self._queries.classes) > 0
        self._bank = _choose_bank(data, most) if has_classes else None
        self._classifier = _classifier_of(cfg, manifest) if has_classes else ""
        self._prompts: Prompts | None = None
        self._no_prompts = ""
        if wants_captions and has_classes:
            self._no_prompts = why_no_prompts(manifest.class_names)
            if not self._no_prompts:
                tokenizer = read_described(cfg.data).tokenizer
                self._prompts = prompts_of(manifest.class_names, tokenizer)
        if not (self._bank or self._prompts or self._retrieves or self._classifier):
            raise ValueError(
                f"evaluate_every: expected split {cfg.evaluate_split} of {place_of(data.path)} to "
                f"have classes, as {data.split} has, or captions that the run learns, got neither: "
                "set --evaluate-data or --evaluate-split, or --evaluate-every 0"
            )
        if self._retrieves:
            _expect_tokenizer(cfg, data)
        largest = max(len(each.rows) for each in (self._queries, self._bank) if each is not None)
        batch_size = min(data.batch_size, _MOST_A_BATCH)
        self._batch_size = min(batch_size, -(-largest // world.size))
        self._skipped: set[tuple[str, int]] = set()  # split and row, of this rank
        if world.is_main:
            logger.info("evaluation every %d steps: %s", cfg.evaluate_every, self._told())
            self._warn_of_missing_classes()

    def _told(self) -> str:
        name, number = self._cfg.evaluate_split, len(self._queries.rows)
        parts = [f"{number:,} pictures of split {name}"]
        if self._bank is None:
            parts.append("no kNN, since one of the splits has no classes, or one alone")
        else:
            parts.append(
                f"kNN of those with a class among {len(self._bank.rows):,} others of "
                f"{len(self._bank.classes):,} classes"
            )
        if self._classifier:
            parts.append(f"the classifier of term {self._classifier}")
        if self._prompts is not None:
            parts.append(f"zero-shot by prompts of {len(self._prompts.token_ids):,} classes")
        elif self._no_prompts:
            parts.append(f"no zero-shot, {self._no_prompts}")
        if not self._retrieves:
            parts.append("no retrieval, without captions that the run learns")
        return ", ".join(parts)

    def _warn_of_missing_classes(self) -> None:
        if self._bank is None:
            return
        missing = np.setdiff1d(self._queries.classes, self._bank.classes)
        if len(missing):
            share = np.isin(self._queries.label, missing).sum() / (self._queries.label >= 0).sum()
            logger.warning(
                "evaluation: %d of %d classes of split %s, %.0f %% of its labelled pictures, are "
                "not among the %d pictures of split %s, so kNN cannot get them right: raise "
                "--evaluate-pictures",
                len(missing),
                len(self._queries.classes),
                self._cfg.evaluate_split,
                100 * share,
                len(self._bank.rows),
                self._bank.cfg.split,
            )

    def is_due(self, step: int) -> bool:
        """Return whether the model is evaluated after so many steps: the last one is, too."""
        return step % self._cfg.evaluate_every == 0 or step == self._cfg.num_steps

    @torch.no_grad()
    def measure(self, objective: MutualInformation, model: nn.Module) -> dict[str, float]:
        """Return the values of the live model by their logged names, the same on all ranks.

        model: the module that the ranks train, `objective` inside of it. Every rank calls this.
        Raises `UnreadableRowsError`.
        """
        bank, classes = dict[str, Tensor](), None
        with left_as_it_is(model):
            if self._bank is not None:
                bank = self._embed(objective, self._bank)
            queries = self._embed(objective, self._queries)
            if self._prompts is not None:
                classes = self._embed_classes(objective, self._prompts)
        values: dict[str, float] = {}
        skipped = set().union(*self._world.gather(self._skipped))
        if self._world.is_main:
            if bank:
                values |= knn_accuracies(bank, queries, self._world.device)
            if self._classifier:
                values |= classifier_accuracies(queries)
            if classes is not None:
                values |= zero_shot_accuracy(classes, queries)
            if self._retrieves:
                values |= recalls(queries, self._world.device)
            values["evaluate/skipped"] = float(len(skipped))
        return self._world.gather(values)[0]

    def _embed(self, objective: MutualInformation, chosen: ChosenRows) -> dict[str, Tensor]:
        """Embed the pictures of all ranks, queries also beside captions.

        Returns columns of N rows on the CPU of rank 0, in the table's order; {} on other ranks.
        """
        device, parts = self._world.device, []
        rows = chosen.of_rank(self._world.rank, self._world.size, self._batch_size)
        with (
            closing(self._read(chosen, rows)) as batches,
            autocast(self._cfg.precision, device),
        ):
            for _ in range(len(rows) // self._batch_size):
                batch = self._next_of_all(batches).to(device)
                columns = self._embed_batch(objective, batch, queried=chosen is self._queries)
                parts.append(columns)
        of_ranks = self._world.gather_to_main(_joined(parts))
        if not of_ranks:
            return {}
        every = _joined(of_ranks)
        _, first = np.unique(every["position"].numpy(), return_index=True)
        return {name: column[torch.from_numpy(first)] for name, column in every.items()}

    def _embed_classes(
        self, objective: MutualInformation, prompts: Prompts
    ) -> Tensor:  # [K, E] of unit length, fp32 on the CPU
        """Embed the prompt of each class, all of them on every rank; batches are of one size."""
        device, parts, count = self._world.device, [], len(prompts.token_ids)
        with autocast(self._cfg.precision, device):
            for start in range(0, count, self._batch_size):
                rows = torch.arange(start, start + self._batch_size) % count
                ids, lengths = prompts.token_ids[rows], prompts.num_tokens[rows]
                text = objective.embed_captions(ids.to(device), lengths.to(device))
                parts.append(text.float().cpu())
        return torch.cat(parts)[:count]

    def _next_of_all(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch of this rank, once every rank has one; else raise on all ranks."""
        batch, failed = None, None
        try:
            batch = next(batches)
        except Exception as error:  # noqa: BLE001 the other ranks wait for this one
            failed = error
        reasons = self._world.gather(None if failed is None else str(failed))
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise UnreadableRowsError(f"evaluation, rank {rank}: {reason}") from failed
        assert batch is not None
        return batch

    def _read(
        self,
        chosen: ChosenRows,
        rows: NDArray[np.int64],  # [share], whole batches
    ) -> Generator[Batch, None, None]:
        """Yield the batches of some rows; another row, a repeated one, stands for a corrupt one."""
        device, cfg, done = self._world.device, chosen.cfg, 0
        while done < len(rows):
            with closing(
                evaluation_batches(
                    cfg.path,
                    cfg.split,
                    image_size=self._cfg.vision.image_size,
                    batch_size=self._batch_size,
                    num_threads=cfg.num_threads,
                    device_id=(device.index or 0) if device.type == "cuda" else None,
                    max_pixels=cfg.max_pixels,
                    backend=cfg.backend,
                    bucket_fields_of=cfg,
                    rows=self._usable(chosen, rows[done:]),
                )
            ) as batches:
                try:
                    for batch in batches:
                        done += len(batch.position)
                        yield batch
                except RuntimeError as error:
                    self._skip(chosen, error)

    def _usable(self, chosen: ChosenRows, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return rows with one that can be used in place of each that cannot."""
        corrupt = [row for split, row in self._skipped if split == chosen.cfg.split]
        usable = np.setdiff1d(chosen.rows, corrupt)
        if not len(usable):
            raise RuntimeError(f"split {chosen.cfg.split}: no picture of it can be decoded")
        return np.where(np.isin(rows, corrupt), usable[0], rows)

    def _skip(self, chosen: ChosenRows, error: RuntimeError) -> None:
        """Take note of a picture that cannot be decoded; raises as the run's loader would."""
        corrupt, data = error.__cause__, self._cfg.data
        if not isinstance(corrupt, SampleError) or data.strict:
            raise error
        self._skipped.add((chosen.cfg.split, corrupt.position))
        if len(self._skipped) > data.max_skipped:
            raise RuntimeError(
                f"data.max_skipped: expected at most {data.max_skipped} samples that cannot be "
                f"used, got another to evaluate: {error}"
            ) from error
        logger.warning("SKIPPED in evaluations: %s", error)

    def _embed_batch(
        self, objective: MutualInformation, batch: Batch, *, queried: bool
    ) -> dict[str, Tensor]:
        views = batch.global_views[0]
        tokens, image = objective.embed_images(views)
        columns = {
            "position": batch.position,
            "label": batch.label,
            "group": batch.group_id,
            "captioned": batch.num_tokens > 0,
            "": tokens.float().mean(1),
        }
        if objective.cfg.uses(encoder="momentum"):
            every = torch.arange(len(views), device=views.device)
            images = normalise_views(views, every, autocast_dtype(views.device.type))
            columns["_ema"] = objective.target_encoder(images).float().mean(1)
        if queried and image is not None and (self._prompts or self._retrieves):
            columns["image"] = image.float()
        for term in objective.terms_of(Category) if queried else ():
            if term.term.name == self._classifier:
                logits = term.logits(objective.encoder.summarise(tokens))
                kept = _MOST_RANKED if logits.shape[1] > _MOST_RANKED else 1
                columns["ranked"] = logits.topk(kept).indices
                columns["is_finite"] = logits.isfinite().all(1)
        if queried and self._retrieves:
            columns["text"] = objective.embed_captions(batch.token_ids, batch.num_tokens).float()
        return {name: column.cpu() for name, column in columns.items()}


@dataclass(frozen=True, slots=True)
class Prompts:
    """A prompt for each class, in tokens."""

    token_ids: Tensor  # [K, T] int64, zero padded
    num_tokens: Tensor  # [K] int64


def why_no_prompts(class_names: Sequence[str]) -> str:
    """Return why classes cannot be asked for by prompts; empty where they can."""
    if all(map(says_nothing, class_names)):
        return (
            f"since classes are called {', '.join(class_names[:2])} and so on: data pack and data "
            "index take their names by --class-names"
        )
    if find_spec("open_clip") is None:
        return "whose prompts need open_clip: pip install 'm3i-fast[data]'"
    return ""


def prompts_of(class_names: Sequence[str], tokenizer: TokenizerInfo) -> Prompts:
    """Return the prompt of each class in the tokens of the run's captions."""
    texts = [prompt_of(PROMPT, name) for name in class_names]
    tokenize = Tokenizer.from_info(tokenizer)
    lengths = [len(tokenize.encode(text)) for text in texts]
    return Prompts(tokenize(texts), torch.tensor(lengths))


def _choose_bank(cfg: LoaderConfig, most: int) -> ChosenRows | None:
    """Choose the labelled pictures of the bank; None where its split has no two classes.

    Raises ValueError where it has, and all that were chosen are of one: the first shards of a
    bucket may be.
    """
    bank = choose_rows(cfg, most, labelled=True)
    if bank.classes_of_split < 2:
        return None
    if len(bank.classes) < 2:
        raise ValueError(
            f"--evaluate-pictures: expected pictures of two classes or more among the {most} of "
            f"split {cfg.split} of {place_of(cfg.path)}, which has {bank.classes_of_split} "
            "classes, got one: its shards are in the order of the classes, and of a bucket the "
            "first pictures are taken; raise it, or set --evaluate-data to a mixed data set"
        )
    return bank


def _classifier_of(cfg: TrainConfig, manifest: Manifest) -> str:
    """Return the term whose classes are those of the data that are evaluated; empty for none."""
    learnt = read_described(cfg.data)
    columns = {column.name: column.names for column in learnt.columns}
    for term in cfg.objective.active_terms:
        names = columns.get(term.column, ()) if term.column else learnt.class_names
        is_classifier = term.target == "category" and not term.reversal
        if is_classifier and tuple(names) == tuple(manifest.class_names):
            return term.name
    return ""


@contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Let the model be used in evaluation mode; afterwards it and the generators are as before.

    Weights that FSDP2 shards outside of the blocks are gathered meanwhile; blocks gather their own.
    """
    modes = {module: module.training for module in model.modules()}
    random = random_state()
    model.eval()
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        with without_graphs(model):
            yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()
        for module, mode in modes.items():
            module.training = mode
        set_random_state(random)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _expect_tokenizer(cfg: TrainConfig, data: LoaderConfig) -> None:
    """Raise ValueError where the captions to evaluate have another tokenizer than the run's."""
    ours, theirs = read_described(cfg.data).tokenizer, manifest_at(data).tokenizer
    if ours != theirs:
        raise ValueError(
            f"evaluate_data: expected {place_of(data.path)} to have the tokenizer of the run's "
            f"data, {ours.fingerprint[:8]}, got {theirs.fingerprint[:8]}: pack it with the same one"
        )
