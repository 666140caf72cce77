"""Twelve steps of any optimiser on a small ViT with drawn gradients, and the same in fp64 loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from m3i_fast.config.models.vit import vit_demo
from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.optim.optimizers import Optimizers, build_optimizer, set_schedules
from m3i_fast.engine.optim.schedules import lr_schedule, weight_decay_schedule
from m3i_fast.models.transformer.vit import ViT

NUM_STEPS = 12
DEPTH = 2


def small_vit(device: str = "cpu") -> ViT:
    """Two blocks, a table, a prefix; one matrix of zeros, whose norm scales nothing at first."""
    torch.manual_seed(0)
    cfg = vit_demo(image_size=16, dim=16, depth=DEPTH, num_heads=2, class_token=True)
    model = ViT(cfg)
    nn.init.zeros_(model.blocks[0].proj.weight)
    return model.to(device)


def gradients(model: nn.Module, step: int) -> dict[str, Tensor | None]:
    """Equal for models of equal names: of one parameter none on odd steps, of another 0 once."""
    rng = torch.Generator().manual_seed(step)
    found: dict[str, Tensor | None] = {
        name: 0.3 * torch.randn(p.shape, generator=rng) for name, p in model.named_parameters()
    }
    if step % 2:
        found["norm.bias"] = None
    if step == 3:
        found["blocks.1.proj.weight"] = torch.zeros_like(model.blocks[1].proj.weight)
    return found


def set_gradients(model: nn.Module, step: int) -> None:
    for name, gradient in gradients(model, step).items():
        p = model.get_parameter(name)
        if p.requires_grad:
            p.grad = None if gradient is None else gradient.to(p.device)


def run(
    cfg: OptimConfig,
    model: nn.Module,
    optimizer: Optimizers | None = None,
    *,
    steps: range = range(NUM_STEPS),
    clip: bool = False,
) -> Optimizers:
    """The trainer's way: schedules, gradients, clipping where `clip`, a step."""
    optimizer = optimizer or build_optimizer(cfg, model)
    lr, decay = lr_schedule(cfg, NUM_STEPS), weight_decay_schedule(cfg, NUM_STEPS)
    for step in steps:
        set_schedules(optimizer, lr=lr[step], weight_decay=decay[step])
        set_gradients(model, step)
        if clip:
            with_gradient = [p for p in model.parameters() if p.grad is not None]
            optimizer.clip_grad_norm(with_gradient, cfg.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@dataclass
class Walk:
    """One parameter in fp64: its value, and what a rule remembers."""

    x: Tensor
    steps: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)

    def recall(self, name: str) -> Tensor:
        return self.memory.get(name, torch.zeros_like(self.x))


# Changes a parameter by its gradient: walk, gradient, lr, decay (None: spared), config.
Rule = Callable[[Walk, Tensor, float, "float | None", OptimConfig], None]


def adamw(walk: Walk, g: Tensor, lr: float, decay: float | None, cfg: OptimConfig) -> None:
    """arXiv 1711.05101, algorithm 2."""
    walk.x -= lr * (decay or 0.0) * walk.x
    walk.x -= lr * _adam(walk, g, cfg, eps=1e-8)


def lamb(walk: Walk, g: Tensor, lr: float, decay: float | None, cfg: OptimConfig) -> None:
    """arXiv 1904.00962, algorithm 2, phi the identity."""
    update = _adam(walk, g, cfg, eps=1e-6)
    if decay is not None:
        update = update + decay * walk.x
        x_norm, u_norm = walk.x.norm(), update.norm()
        update = update * (x_norm / u_norm if x_norm > 0 and u_norm > 0 else 1.0)
    walk.x -= lr * update


def lars(walk: Walk, g: Tensor, lr: float, decay: float | None, cfg: OptimConfig) -> None:
    """arXiv 1708.03888, equation 6, with a momentum that does not hold the learning rate."""
    if decay is not None:
        x_norm, g_norm = walk.x.norm(), g.norm()
        trusted = x_norm > 0 and g_norm > 0
        ratio = 0.001 * x_norm / (g_norm + decay * x_norm) if trusted else 1.0
        g = ratio * (g + decay * walk.x)
    walk.memory["v"] = cfg.betas[0] * walk.recall("v") + g
    walk.x -= lr * walk.memory["v"]


def lars_of_the_paper(
    walk: Walk, g: Tensor, lr: float, decay: float | None, cfg: OptimConfig
) -> None:
    """arXiv 1708.03888, algorithm 1, to the letter: the learning rate is in the momentum."""
    local_lr = 1.0
    if decay is not None:
        local_lr = 0.001 * walk.x.norm() / (g.norm() + decay * walk.x.norm())
        g = g + decay * walk.x
    walk.memory["v"] = cfg.betas[0] * walk.recall("v") + lr * local_lr * g
    walk.x -= walk.memory["v"]


def muon(walk: Walk, g: Tensor, lr: float, decay: float | None, cfg: OptimConfig) -> None:
    """Muon with Nesterov's momentum; Newton-Schulz to the letter. Of matrices of blocks alone."""
    if walk.x.ndim != 2:
        return
    rate = lr * cfg.muon_lr / cfg.lr
    walk.memory["b"] = 0.95 * walk.recall("b") + 0.05 * g
    direction = orthogonal(0.05 * g + 0.95 * walk.memory["b"])
    walk.x -= rate * (decay or 0.0) * walk.x
    walk.x -= rate * max(1.0, g.shape[0] / g.shape[1]) ** 0.5 * direction


def orthogonal(g: Tensor) -> Tensor:  # [M, K] fp64
    """Five iterations of https://kellerjordan.github.io/posts/muon/."""
    x = (g.mT if g.shape[0] > g.shape[1] else g) / g.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if g.shape[0] > g.shape[1] else x


def _adam(walk: Walk, g: Tensor, cfg: OptimConfig, *, eps: float) -> Tensor:
    b1, b2 = cfg.betas
    eps = eps if cfg.eps is None else cfg.eps
    walk.steps += 1
    walk.memory["m"] = b1 * walk.recall("m") + (1 - b1) * g
    walk.memory["v"] = b2 * walk.recall("v") + (1 - b2) * g * g
    mean = walk.memory["m"] / (1 - b1**walk.steps)
    return mean / ((walk.memory["v"] / (1 - b2**walk.steps)).sqrt() + eps)


def loop(rule: Rule, cfg: OptimConfig, model: nn.Module) -> dict[str, Tensor]:
    """Every parameter after all steps of `rule`, by itself and in fp64."""
    lr, decay = lr_schedule(cfg, NUM_STEPS), weight_decay_schedule(cfg, NUM_STEPS)
    walks = {name: Walk(p.detach().double().clone()) for name, p in model.named_parameters()}
    for step in range(NUM_STEPS):
        for name, gradient in gradients(model, step).items():
            if gradient is not None:
                spared = walks[name].x.ndim <= 1 or name in ("pos_embed", "class_token")
                own_decay = None if spared else float(decay[step])
                rate = float(lr[step]) * cfg.layer_decay ** _power(name)
                rule(walks[name], gradient.double(), rate, own_decay, cfg)
    return {name: walk.x for name, walk in walks.items()}


def _power(name: str) -> int:
    """Layers above one of small_vit's parameters."""
    first, *rest = name.split(".")
    return {"blocks": DEPTH - int(rest[0]) if first == "blocks" else 0, "norm": 1}.get(
        first, DEPTH + 1
    )


def assert_same_change(got: nn.Module, expected: dict[str, Tensor], start: nn.Module) -> None:
    """What the steps did to every expected parameter, apart from where it began."""
    for name, value in expected.items():
        begin = start.get_parameter(name).detach().cpu().double()
        change = got.get_parameter(name).detach().cpu().double() - begin
        wanted = value.detach().cpu().double() - begin
        assert float(wanted.abs().max()) > 1e-4, name
        torch.testing.assert_close(
            change, wanted, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
