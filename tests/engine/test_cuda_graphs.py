"""Replayed encoders and decoders: the losses, gradients and weights of those that are not.

Without a GPU a stand-in captures: its inputs, output and gradients have memory of their own that
each replay writes over, as a CUDA graph's have, and between its two passes it keeps one call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine import cuda_graphs as graphs
from m3i_fast.engine.cuda_graphs import (
    CapturedCall,
    GraphedMethod,
    capture_on_gpu,
    replay_with_graphs,
)
from m3i_fast.engine.trainer import Trainer
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, Block
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.heads import DenseDecoder
from m3i_fast.pipelines.loader import Loader
from m3i_fast.recipes import recipes, shrink

TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)
CPU = torch.device("cpu")


class _Pass:
    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


def places(module: nn.Module) -> list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]]:
    return [
        (owner._parameters, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p is not None
    ]


class Captures:
    """`Capture` without a GPU; counts its replays. These read the parameters of the capture."""

    def __init__(self) -> None:
        self.num_captured = self.num_backward = self.num_replayed = 0

    def __call__(
        self, module: nn.Module, method: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> CapturedCall:
        self.num_captured += 1
        own = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
        parameters = tuple(p for p in module.parameters() if p.requires_grad)
        wanted = [x for x in (*own, *parameters) if x.requires_grad]
        with_grad = torch.is_grad_enabled() and bool(wanted)
        self.num_backward += with_grad
        with torch.random.fork_rng():
            live = method(*own)
            output = torch.full_like(live, torch.nan).detach()
            grad_output = torch.full_like(output, torch.nan)
            if with_grad:
                found = torch.autograd.grad(live, wanted, live, allow_unused=True)
        kept: list[Tensor] = []
        captured = places(module)

        def forward() -> None:
            self.num_replayed += 1
            now = places(module)
            for owner, name, p in captured:
                owner[name] = p
            with torch.set_grad_enabled(with_grad):
                kept[:] = [method(*own)]
            for owner, name, p in now:
                owner[name] = p
            output.copy_(kept[0].detach())

        if not with_grad:
            return CapturedCall(
                inputs=own, parameters=(), output=output, grad_output=None, grads=(),
                forward=_Pass(forward), backward=None,
            )  # fmt: skip
        static = iter([None if g is None else torch.full_like(g, torch.nan) for g in found])
        grads = tuple(next(static) if x.requires_grad else None for x in (*own, *parameters))

        def backward() -> None:
            again = torch.autograd.grad(kept.pop(), wanted, grad_output, allow_unused=True)
            for mine, got in zip([g for g in grads if g is not None],
                                 [g for g in again if g is not None], strict=True):  # fmt: skip
                mine.copy_(got)

        return CapturedCall(
            inputs=own, parameters=parameters, output=output, grad_output=grad_output,
            grads=grads, forward=_Pass(forward), backward=_Pass(backward),
        )  # fmt: skip


def _config(name: str, dataset: Path, **changes: Any) -> TrainConfig:
    cfg = shrink(recipes()[name](), path=dataset, num_classes=9, text=TEXT)
    cfg = replace(cfg, data=replace(cfg.data, batch_size=8), num_steps=6, log_every=1)
    return replace(cfg, checkpoint_every=6, **changes)


def _train(cfg: TrainConfig, out: Path, captures: Captures | None) -> tuple[list[float], Any]:
    trainer, losses = Trainer(cfg, out), []

    def keep(_: int, values: dict[str, float]) -> None:
        losses.extend(v for k, v in values.items() if k.startswith(("loss/total", "gradient")))

    if captures is not None:
        replay_with_graphs(trainer.train_step.model, CPU, captures)
    trainer.train(keep)
    return losses, {k: v.clone() for k, v in trainer.objective.state_dict().items()}


NAMES = ["demo", "demo_dino", "demo_moco_v3", "demo_mae", "demo_clip", "demo_cappa"]


@pytest.mark.parametrize(
    ("name", "freeze"), [*((name, False) for name in NAMES), ("demo_clip", True)]
)
def test_a_run_is_that_of_a_run_without_graphs_bit_for_bit(
    name: str, freeze: bool, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without graphs views and questions are calls by themselves too, or products round apart."""
    monkeypatch.setattr(ViT, "calls_apart", True)
    monkeypatch.setattr(DenseDecoder, "calls_apart", True)
    cfg, captures = _config(name, dataset), Captures()
    cfg = replace(cfg, optim=replace(cfg.optim, freeze_encoder=freeze))
    if name == "demo":
        vision = replace(cfg.vision, drop_path_rate=0.3, num_registers=2, position="rotary")
        cfg = replace(cfg, vision=vision)
    losses, weights = _train(cfg, tmp_path / "without", None)
    replayed, replayed_weights = _train(cfg, tmp_path / "with", captures)
    assert replayed == losses
    assert weights.keys() == replayed_weights.keys()
    assert [k for k, v in weights.items() if not torch.equal(v, replayed_weights[k])] == []
    # every call of a shape is replayed from its second step on
    assert captures.num_replayed == (cfg.num_steps - 1) * captures.num_captured > 0
    if freeze:  # of image and text encoder the latter alone goes backward
        assert (captures.num_captured, captures.num_backward) == (2, 1)


def test_an_evaluation_is_no_call_of_a_step_and_captures_nothing(
    dataset: Path, tmp_path: Path
) -> None:
    """Its batches have the shapes of a step's, and would else take graphs and their places."""
    cfg, plain, evaluated = _config("demo", dataset), Captures(), Captures()
    losses, weights = _train(cfg, tmp_path / "without", plain)
    cfg = replace(cfg, evaluate_every=1)
    assert _train(cfg, tmp_path / "with", evaluated)[0] == losses
    counts = [(each.num_captured, each.num_replayed) for each in (plain, evaluated)]
    assert counts[0] == counts[1]


def test_calls_of_one_shape_within_a_step_keep_what_each_computed() -> None:
    captures, layer = Captures(), nn.Linear(3, 3)
    graphed = GraphedMethod(layer, layer.forward, captures)
    for step in range(4):
        graphed.begin_step()
        first, second = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
        out = graphed(first).tanh() * graphed(second).sin()
        out.square().sum().backward()
        got = [first.grad, second.grad, layer.weight.grad, layer.bias.grad]
        wanted = [first, second, layer.weight, layer.bias]
        plain = layer(first).tanh() * layer(second).sin()
        expected = torch.autograd.grad(plain.square().sum(), wanted)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        layer.zero_grad()
        assert captures.num_captured == (2 if step else 0)


def test_an_argument_that_is_none_is_none_in_the_replay() -> None:
    captures, layer = Captures(), nn.Linear(3, 3)

    def method(x: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor | None) -> Any:
        out = layer(x) if shift is None else layer(x) + shift
        return out if scale is None else out * scale

    graphed = GraphedMethod(layer, method, captures)
    for step in range(3):
        graphed.begin_step()
        x, given = torch.randn(2, 3), torch.randn(2, 3)
        for arguments in ((x, None, given), (x, given, None), (x, given, given), (x, None, None)):
            assert torch.equal(graphed(*arguments), method(*arguments))
        assert captures.num_captured == (4 if step else 0)


class Bound(Captures):
    """Records the nodes that accumulate gradients in a capture, and the memory of parameters."""

    def __call__(
        self, module: nn.Module, method: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> CapturedCall:
        self.nodes = {name: accumulates(p) for name, p in module.named_parameters()}
        self.memory = {name: p.data_ptr() for name, p in module.named_parameters()}
        return super().__call__(module, method, inputs)


def accumulates(parameter: nn.Parameter) -> torch.autograd.graph.Node:
    return torch.autograd.graph.get_gradient_edge(parameter).node


def test_a_capture_goes_backward_through_no_node_that_is_alive() -> None:
    """DDP and a call before it in the step keep the nodes of the parameters alive; torch refuses to
    capture these, which belong to another stream.
    """
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight  # shared
    own = dict(model.named_parameters())
    captures = Bound()
    graphed = GraphedMethod(model, model.forward, captures)
    x = torch.randn(2, 3)
    for _ in range(3):
        graphed.begin_step()
        alive = model(x).sum()
        held = {name: accumulates(p) for name, p in own.items()}
        (graphed(x).sum() + alive).backward()
    assert captures.num_captured == 1 and captures.num_replayed == 2
    assert all(captures.nodes[name] is not node for name, node in held.items())
    assert captures.memory == {name: p.data_ptr() for name, p in own.items()}
    assert all(p is own[name] for name, p in model.named_parameters())
    assert model[1].weight is model[0].weight
    grads = [p.grad for p in own.values()]
    expected = torch.autograd.grad(6 * model(x).sum(), list(own.values()))
    for grad, value in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, value)


def test_a_capture_that_fails_leaves_the_parameters_in_their_places() -> None:
    def fails(*_: Any) -> CapturedCall:
        raise RuntimeError("no capture")

    layer = nn.Linear(3, 3)
    own = dict(layer.named_parameters())
    graphed = GraphedMethod(layer, layer.forward, fails)
    graphed(torch.randn(2, 3))
    graphed.begin_step()
    with pytest.raises(RuntimeError, match="no capture"):
        graphed(torch.randn(2, 3))
    assert all(p is own[name] for name, p in layer.named_parameters())


def test_other_modes_of_a_call_have_graphs_of_their_own() -> None:
    captures, block = Captures(), Block(16, 2, drop_path=0.5)
    graphed = GraphedMethod(block, block.forward, captures)
    x = torch.randn(4, 3, 16)

    def calls() -> list[Tensor]:
        graphed.begin_step()
        found = [graphed(x)]
        with torch.no_grad():
            found.append(graphed(x))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(graphed(x))
        block.eval()
        found.append(graphed(x))
        block.train()
        return [out.clone() for out in found]

    torch.manual_seed(1)
    eager = calls()
    calls()
    torch.manual_seed(1)
    for again, first in zip(calls(), eager, strict=True):
        assert torch.equal(again, first) and again.requires_grad == first.requires_grad
    assert captures.num_captured == 4


def test_further_shapes_are_not_captured_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    captures, layer = Captures(), nn.Linear(3, 3)
    graphed = GraphedMethod(layer, layer.forward, captures)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            for rows in range(1, graphs.MAX_GRAPHS + 5):
                graphed.begin_step()
                x = torch.randn(rows, 3)
                assert torch.equal(graphed(x), layer(x))
    assert captures.num_captured == graphs.MAX_GRAPHS
    assert [r.getMessage() for r in caplog.records] == [
        "cuda_graphs modules: Linear has 16 graphs already; calls of other shapes are launched "
        "kernel by kernel"
    ]


def test_what_a_graph_cannot_hold_is_refused(dataset: Path, tmp_path: Path) -> None:
    cfg = _config("demo", dataset)
    cfg = replace(cfg, optim=replace(cfg.optim, matrices="adamw"))
    vision, objective = cfg.vision, cfg.objective
    for changes, reason in (
        ({"compile": True}, "compile: expected False"),
        ({"precision": "fp8_current"}, "precision: expected auto, fp32 or bf16"),
        ({"parallel": ParallelConfig(shard=-1)}, "parallel.shard: expected 1 .*, got -1"),
        ({"parallel": ParallelConfig(chunk=2)}, "parallel.chunk: expected 0"),
        ({"parallel": ParallelConfig(accumulate=2)}, "parallel.accumulate: expected 1"),
        ({"vision": replace(vision, drop_path_mode="subset")}, "drop_path_mode: expected mask"),
        ({"text": replace(TEXT, activation_checkpointing="full")}, "got none and full"),
        ({"objective": replace(objective, balance=BalanceConfig(mode="gradient_norm"))},
         "objective.balance.mode: expected fixed or uncertainty"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            replace(cfg, cuda_graphs="modules", **changes)
    with pytest.raises(ValueError, match="vision: expected a ViT .*, got InternImageConfig"):
        _config("demo_internimage", dataset, cuda_graphs="modules")
    with pytest.raises(ValueError, match="cuda_graphs: expected a GPU, got cpu"):
        Trainer(replace(cfg, cuda_graphs="modules", device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


# ---- On a GPU ------------------------------------------------------------------------------------


def _through(vit: ViT, encode: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    with torch.autocast("cuda", torch.bfloat16):
        out = encode(x)
    wanted = [x, *(p for n, p in vit.named_parameters() if n.startswith(("blocks", "norm")))]
    return [out.detach(), *torch.autograd.grad(out.float().square().mean(), wanted)]


@pytest.mark.gpu
@pytest.mark.parametrize("body", ["torch", "te"])
def test_a_captured_encoder_computes_what_it_did(body: str) -> None:
    layers = TORCH_LAYERS
    if body == "te":
        pytest.importorskip("transformer_engine.pytorch")
        from m3i_fast.models.transformer.te_layers import te_layers

        layers = te_layers()
    torch.manual_seed(0)
    vit = ViT(vit_demo(drop_path_rate=0.3, dim=256, num_heads=4), layers=layers).cuda()
    encode = vit.encode
    graphed = GraphedMethod(vit, encode, capture_on_gpu)
    for step in range(4):
        graphed.begin_step()
        for call in range(2):
            x = torch.randn(16, 17, 256, device="cuda", requires_grad=True)
            seed = 10 * step + call
            torch.manual_seed(seed)
            got = _through(vit, graphed, x)
            torch.manual_seed(seed)
            for a, b in zip(got, _through(vit, encode, x), strict=True):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=5e-2)


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_that_without_graphs_while_the_loader_works(
    dataset: Path, tmp_path: Path
) -> None:
    cfg = _config("demo", dataset, device="cuda", precision="bf16")
    found = []
    for on in (False, True):
        losses: list[float] = []
        trainer = Trainer(replace(cfg, cuda_graphs="modules" if on else "none"), tmp_path / str(on))
        assert isinstance(trainer.loader, Loader)
        trainer.train(lambda _, values, to=losses: to.append(values["loss/total"]))
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-2)
