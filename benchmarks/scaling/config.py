"""What `bench scaling` is asked for, and the config of each rank that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
import tyro

from m3i_fast.benchmarks.core.command import read_recipe_command
from m3i_fast.benchmarks.core.harness import parse_counts
from m3i_fast.config import TrainConfig
from m3i_fast.costs.gpus import CARDS, Card, card_of
from m3i_fast.engine.precision.arithmetic import resolve_device
from m3i_fast.recipes import demo

Mode = Literal["weak", "strong"]


@dataclass(frozen=True, kw_only=True)
class Config:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=demo)
    recipe: Annotated[str, tyro.conf.Suppress] = "demo"
    gpus: str = ""
    """Numbers of GPUs, of processes on a CPU, rising from 1: 1,2,4,8. Unless given powers of two up
    to all GPUs; 1,2 on a CPU."""
    mode: Literal["weak", "strong", "both"] = "both"
    """A batch a rank that stays, a batch of all ranks that stays, or one after the other."""
    global_batch: int | None = None
    """Batch of all ranks in strong scaling; data.batch_size unless given."""
    windows: int = 7
    """Samples of each kind of step."""
    window_steps: int = 10
    """Steps of a sample."""
    warmup_steps: int = 5
    """Of each kind, before any sample."""
    card: str = ""
    """A card as `m3i-fast plan` names them: whose published rates predictions take. The one of
    this machine unless given."""
    gpus_per_node: int = 8
    """Of the predicted nodes."""
    predict: str = "16,32,64,128,256,512,1024"
    """Numbers of GPUs that are predicted."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/scaling.jsonl, and draw it there."""

    def __post_init__(self) -> None:
        for name in ("windows", "window_steps", "warmup_steps", "gpus_per_node"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected at least 1, got {getattr(self, name)}")
        if (count := self.config.parallel.accumulate) != 1:
            raise ValueError(
                f"parallel.accumulate: expected 1, a step of one batch, got {count}; a batch of "
                "several times the size is what to compare with"
            )
        for count in parse_counts(self.predict, "--predict"):
            if count > self.gpus_per_node and count % self.gpus_per_node:
                raise ValueError(
                    f"--predict: expected multiples of --gpus-per-node {self.gpus_per_node}, got "
                    f"{count}"
                )

    @property
    def modes(self) -> tuple[Mode, ...]:
        return ("weak", "strong") if self.mode == "both" else (self.mode,)

    @property
    def cuda(self) -> bool:
        return resolve_device(self.config.device).type == "cuda"

    @property
    def counts(self) -> list[int]:
        """Return the numbers of ranks. Raises ValueError for what this machine cannot start."""
        there = torch.cuda.device_count()
        if not self.gpus:
            return [2**power for power in range(there.bit_length())] if self.cuda else [1, 2]
        counts = parse_counts(self.gpus, "--gpus")
        if counts[0] != 1:
            raise ValueError(
                "--gpus: expected 1 among them, which the others are compared with, got "
                f"{self.gpus}"
            )
        if self.cuda and counts[-1] > there:
            raise ValueError(f"--gpus: expected at most {there}, which torch sees, got {self.gpus}")
        return counts

    def of_ranks(self, mode: Mode, num_ranks: int) -> TrainConfig:
        """Return the config of each of so many ranks."""
        cfg = replace(self.config, device="cuda" if self.cuda else "cpu")
        if not self.cuda:
            cfg = replace(cfg, num_threads=1)
        if mode == "weak":
            return cfg
        batch = (self.global_batch or cfg.data.batch_size) // num_ranks
        return replace(cfg, data=replace(cfg.data, batch_size=batch))

    def expect_divisible(self, counts: list[int]) -> None:
        """Raise ValueError, with the nearest batch that divides, where ranks cannot share one."""
        if "strong" not in self.modes:
            return
        whole = self.global_batch or self.config.data.batch_size
        multiple = self.config.objective.mixing.images_per_input * math.lcm(*counts)
        if whole < 1 or whole % multiple:
            nearest = max(round(whole / multiple), 1) * multiple
            raise ValueError(
                f"--global-batch: expected a multiple of {multiple}, which "
                f"{', '.join(map(str, counts))} ranks share, as {nearest}, got {whole}"
            )


def parse(argv: list[str]) -> Config:
    """Return what `RECIPE --flag value ...` asks for; raises as `read_recipe_command`."""
    return read_recipe_command(
        "scaling", argv, lambda name, config: Config(config=config, recipe=name), "demo"
    )


def find_card(cfg: Config) -> Card:
    """Return the named card, or this machine's. Raises ValueError where its rates are not known."""
    if not cfg.card and not cfg.cuda:
        return CARDS["cpu"]
    if not cfg.card:
        card = card_of(torch.cuda.get_device_name(0))
        if isinstance(card, str):
            raise ValueError(f"--card: expected the one whose rates to predict with, got {card}")
        return card
    if cfg.card not in CARDS:
        raise ValueError(f"--card: expected one of {', '.join(CARDS)}, got {cfg.card!r}")
    return CARDS[cfg.card]
