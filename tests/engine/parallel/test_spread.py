"""FSDP2: blocks gathered ahead change no bit, and bf16 gradients are averaged in fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.recipes import demo, shrink
from tests.engine.parallel.spread_work import with_prefetch, work
from tests.engine.parallel.test_meta_init import TEXT
from tests.shared.engine.two_ranks import NUM_RANKS
from tests.shared.ranks import start_ranks

DEPTH = 5


def _config() -> TrainConfig:
    cfg = shrink(demo(), path=Path("data"), num_classes=9, text=TEXT)
    vision = replace(cfg.vision, depth=DEPTH)
    return replace(cfg, vision=vision, optim=replace(cfg.optim, matrices="adamw"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    cfg = _config()
    cases = {str(count): with_prefetch(cfg, count) for count in (0, 2)}
    cases |= {f"{count} by chunks": with_prefetch(cfg, count, chunk=2) for count in (0, 2)}
    start_ranks(work, (cases, folder), NUM_RANKS)
    return folder


Steps = tuple[dict[str, Tensor], list[str]]


def _of(ranks: Path, name: str) -> list[Steps]:
    files = [ranks / f"{name}-{rank}.pt" for rank in range(NUM_RANKS)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("how", ["", " by chunks"])
def test_what_is_gathered_ahead_changes_no_bit(how: str, ranks: Path) -> None:
    for (ours, _), (theirs, _) in zip(_of(ranks, f"2{how}"), _of(ranks, f"0{how}"), strict=True):
        assert ours.keys() == theirs.keys() and len(ours) > 2 * DEPTH
        assert [n for n, value in theirs.items() if not torch.equal(ours[n], value)] == []


def _ahead(events: list[str], way: list[int]) -> list[int]:
    """How many blocks behind it had been asked for when each first ran."""
    runs = [events.index(f"run {number}") for number in way]
    asked = [events.index(f"gather {number}") for number in way]
    return [sum(a < run for a in asked[place + 1 :]) for place, run in enumerate(runs)]


def test_so_many_blocks_are_asked_for_ahead(ranks: Path) -> None:
    way = list(range(DEPTH))
    for (_, ahead), (_, default) in zip(_of(ranks, "2"), _of(ranks, "0"), strict=True):
        for order, backward in ((way, False), (way[::-1], True)):
            passes = [
                events[events.index("backward") :] if backward else events
                for events in (ahead, default)
            ]
            assert _ahead(passes[0], order) == [2, 2, 2, 1, 0]
            assert max(_ahead(passes[1], order)) <= 1


def test_bf16_gradients_are_averaged_in_fp32(ranks: Path) -> None:
    """By mean, since a sum over many ranks leaves the range; in bf16 it would be another one."""
    found = [torch.load(ranks / f"bf16-{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]
    own = [of_rank["own"] for of_rank in found]
    differ = 0
    for of_rank in found:
        assert of_rank["spread"].keys() == own[0].keys()
        for name, gradient in of_rank["spread"].items():
            assert gradient.dtype == torch.float32
            mean = torch.stack([part[name].float() for part in own]).mean(0)
            assert torch.equal(gradient, mean), name
            in_bf16 = (own[0][name] + own[1][name]) / NUM_RANKS
            differ += not torch.equal(in_bf16.float(), mean)
    assert differ


def test_the_residual_stream_is_in_fp32_as_where_weights_are_whole(ranks: Path) -> None:
    """Positions and tokens are not rounded to bf16, though their blocks are gathered so."""
    for rank in range(NUM_RANKS):
        found = torch.load(ranks / f"bf16-{rank}.pt", weights_only=True)["stream"]
        assert found["spread"].dtype == torch.float32
        assert torch.equal(found["spread"], found["whole"])


def test_the_norm_of_spread_and_whole_gradients_waits_for_no_index(ranks: Path) -> None:
    for rank in range(NUM_RANKS):
        found = torch.load(ranks / f"bf16-{rank}.pt", weights_only=True)
        gradients = [g.flatten() for g in found["spread"].values()]
        expected = torch.cat([*gradients, torch.ones(3)]).norm()
        torch.testing.assert_close(found["norm"]["total"], expected)
        assert found["norm"]["indexed"] == 0


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="parallel.prefetch: expected 0 to 1024, got -1"):
        ParallelConfig(prefetch=-1)
