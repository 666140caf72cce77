"""A model that is made on the meta device is the one that is made directly, on one rank and two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.build import blocks_of, build_objective
from m3i_fast.engine.parallel.meta_init import initialise, is_on_meta
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.recipes import recipes, shrink
from tests.engine.parallel.meta_work import NUM_RANKS, Made, held, values, work
from tests.shared.ranks import start_ranks

CPU = torch.device("cpu")
TEXT = TextConfig(vocab_size=50, context_length=8, dim=32, depth=2, num_heads=2, embed_dim=32)
NAMES = (*(f"demo_{name}" for name in METHODS), "demo", "demo_internimage")


def _config(name: str) -> TrainConfig:
    cfg = shrink(recipes()[name](), path=Path("data"), num_classes=9, text=TEXT)
    if cfg.objective.uses(encoder="frozen"):
        cfg = replace(cfg, objective=replace(cfg.objective, teacher="timm:vit_tiny_patch16_224"))
    return cfg


def _balanced(mode: Any) -> TrainConfig:
    cfg = _config("demo")
    return replace(cfg, objective=replace(cfg.objective, balance=BalanceConfig(mode=mode)))


def _frozen(name: str, **what: bool) -> TrainConfig:
    cfg = _config(name)
    return replace(cfg, optim=replace(cfg.optim, **what))


CONFIGS: dict[str, Callable[[], TrainConfig]] = {
    **{name: lambda name=name: _config(name) for name in NAMES},  # type: ignore[misc]
    "gradient_norm": lambda: _balanced("gradient_norm"),
    "uncertainty": lambda: _balanced("uncertainty"),
    "frozen patches": lambda: _frozen("demo", freeze_patch_embed=True),
    "frozen stem": lambda: _frozen("demo_internimage", freeze_patch_embed=True),
    "frozen encoder": lambda: _frozen("demo", freeze_encoder=True),
}


@pytest.fixture(autouse=True)
def teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of random weights: it is no part of what is initialised."""
    from m3i_fast.config.models.vit import vit_demo
    from m3i_fast.engine import build as model
    from m3i_fast.models.transformer.vit import ViT

    monkeypatch.setattr(model, "load_teacher", lambda spec, vision: ViT(vit_demo()))


def _direct(cfg: TrainConfig) -> MutualInformation:
    torch.manual_seed(cfg.seed)
    return build_objective(cfg)


def _by_meta(cfg: TrainConfig) -> MutualInformation:
    torch.manual_seed(cfg.seed)
    objective = build_objective(cfg, on_meta=True)
    assert is_on_meta(objective) and held(objective) == 0
    assert not any(map(is_on_meta, objective.teachers.values()))
    copies = [copy for copy, _ in objective.copies()]
    initialise(objective, blocks_of(objective), CPU, copies=copies)
    return objective


def _different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert list(ours) == list(theirs)
    return [name for name, value in theirs.items() if not torch.equal(ours[name], value)]


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_direct_build_bit_for_bit(name: str) -> None:
    cfg = CONFIGS[name]()
    direct = _direct(cfg)
    next_draw = torch.rand(4)
    ours = _by_meta(cfg)
    assert torch.equal(torch.rand(4), next_draw)  # as many draws, too
    assert not _different(dict(values(ours)), dict(values(direct)))
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (ours, direct)]
    assert trained[0] == trained[1]
    for average, online in ours.copies():
        assert not _different(dict(values(average)), dict(values(online)))
    assert ours.state_dict().keys() == direct.state_dict().keys()
    assert not any("reset_parameters" in vars(module) for module in ours.modules())


class Forgetful(nn.Module):
    """Sets one of its tensors, and a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.set = nn.Parameter(torch.empty(2))
        self.part = nn.Parameter(torch.empty(2))
        self.unset = nn.Parameter(torch.empty(2, 2))
        self.register_buffer("table", torch.empty(3), persistent=False)
        self.register_buffer("count", torch.empty(1, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.set.fill_(1)
        self.part[:1].fill_(1)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Forgetful()])

    def reset_parameters(self) -> None:
        self.inner[0].reset_parameters()  # type: ignore[operator]


@pytest.mark.parametrize("as_block", [True, False])
def test_what_initialisation_forgets_is_named(as_block: bool) -> None:
    with torch.device("meta"):
        model = Holder()
    blocks = [model.inner[0]] if as_block else []
    with pytest.raises(RuntimeError) as error:
        initialise(model, blocks, CPU)
    names = "inner.0.part, inner.0.unset, inner.0.table, inner.0.count: expected"
    assert str(error.value).startswith(f"not initialised: {names}")


# ---- Two ranks, FSDP2 ----------------------------------------------------------------------------

SPREAD = ("demo", "demo_internimage", "demo_dino", "demo_densecl")


def _spread(name: str) -> TrainConfig:
    cfg = _config(name)
    deep = {"depths": (2, 2, 2, 2)} if name == "demo_internimage" else {"depth": 6}
    cfg = replace(cfg, vision=replace(cfg.vision, **deep))  # type: ignore[arg-type]
    optim = replace(cfg.optim, matrices="adamw")
    return replace(cfg, optim=optim, parallel=ParallelConfig(shard=-1))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    cases = {name: _spread(name) for name in SPREAD}
    start_ranks(work, (cases, folder), NUM_RANKS)
    return folder


def _part(tensor: Tensor, rank: int) -> Tensor:
    """What a rank has of it: rows, dealt out as evenly as they can be."""
    parts = tensor.chunk(NUM_RANKS)
    return parts[rank] if rank < len(parts) else tensor[:0]


@pytest.mark.parametrize("name", SPREAD)
def test_two_ranks_make_the_direct_build_and_never_hold_it(name: str, ranks: Path) -> None:
    direct = _direct(replace(_spread(name), parallel=ParallelConfig()))
    whole = dict(values(direct))
    blocks = blocks_of(direct)
    rest = held(direct) - sum(map(held, blocks))
    for rank in range(NUM_RANKS):
        made = Made(**torch.load(ranks / f"{name}-{rank}.pt", weights_only=True))
        assert not _different(made.values, whole)
        spread = {n: p for n, p in direct.named_parameters() if p.ndim > 0}
        assert made.shapes == {n: tuple(_part(p, rank).shape) for n, p in spread.items()}
        parts = sum(_part(p, rank).numel() for block in blocks for p in block.parameters())
        assert made.most_held <= rest + parts + max(map(held, blocks)) < held(direct)
