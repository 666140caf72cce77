"""Linear layers and MLPs that begin with a LayerNorm, with Transformer Engine's parameter names.

Legend: D width, F hidden width of the MLP.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.config.fields import Mlp
from m3i_fast.ops.add_layer_norm import MAX_WIDTH, add_layer_norm

LAYER_NORM_EPS = 1e-6  # timm, MAE and DINO; Transformer Engine's own default is 1e-5
INIT_STD = 0.02
QUICK_GELU = 1.702  # OpenAI's CLIP

# (x [..., K], weight [N, K], bias [N] or None) -> [..., N], as F.linear
Matmul = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def init_weight(weight: Tensor) -> None:
    """Draw a weight from a truncated normal of standard deviation 0.02, as timm does for ViTs."""
    nn.init.trunc_normal_(weight, std=INIT_STD)


def reset_children(module: nn.Module, *, but: Collection[nn.Module] = ()) -> None:
    """Initialise all children of `module` again, in the order of construction, except `but`."""
    for child in module.children():
        if child not in but:
            reset(child, but=but)


def reset(module: nn.Module, *, but: Collection[nn.Module] = ()) -> None:
    """Initialise `module` again by its `reset_parameters`, or else by those of its children."""
    own = getattr(module, "reset_parameters", None)
    if own is None:
        reset_children(module, but=but)
    else:
        own()


class Linear(nn.Linear):
    """A linear layer with a ViT's initialisation: weight [out, in], bias [out]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, matmul: Matmul = F.linear
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.matmul = matmul

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        return self.matmul(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        init_weight(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a product of `x` is computed: that of autocast where it is on."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class Residual(NamedTuple):
    """The residual stream of a stack of blocks, whose last branch is still to be added."""

    x: Tensor  # [..., D]
    branch: Tensor | None = None  # [..., D]

    def total(self) -> Tensor:
        """Return x + branch."""
        return self.x if self.branch is None else self.x + self.branch


Stream = TypeVar("Stream", Tensor, Residual)


class Normed(nn.Module, ABC):
    """A module that begins with a LayerNorm, and can add a branch on the way to it."""

    layer_norm_weight: nn.Parameter  # [in_features]
    layer_norm_bias: nn.Parameter  # [in_features]
    eps: float

    def norm(self, stream: Residual) -> tuple[Tensor, Tensor]:
        """Return the sum of the stream, and its norm in the dtype of the products after it."""
        x, branch = stream
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        dtype = product_dtype(x)
        if branch is not None and branch.dtype != dtype:
            x, branch = x + branch, None
        if len(weight) <= MAX_WIDTH:
            return add_layer_norm(x, branch, weight, bias, eps=self.eps, dtype=dtype)
        x = Residual(x, branch).total()
        return x, F.layer_norm(x, weight.shape, weight, bias, self.eps)

    @abstractmethod
    def products(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        """Compute what follows the norm."""

    def forward(self, x: Tensor | Residual) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the layer: [..., in_features] -> [..., out_features].

        Of a `Residual` return its sum as well, which comes first.
        """
        if isinstance(x, Tensor):
            return self.products(self.norm(Residual(x))[1])
        total, normed = self.norm(x)
        return total, self.products(normed)


class LayerNormLinear(Normed):
    """A LayerNorm and a linear layer: [..., in_features] -> [..., out_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = LAYER_NORM_EPS,
        *,
        matmul: Matmul = F.linear,
    ) -> None:
        super().__init__()
        self.eps, self.matmul = eps, matmul
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features))
        self.layer_norm_bias = nn.Parameter(torch.empty(in_features))
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.layer_norm_weight)
        nn.init.zeros_(self.layer_norm_bias)
        init_weight(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def products(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight, self.bias)


def fc1_features(hidden_dim: int, activation: Mlp) -> int:
    """Return how many features an MLP's first layer computes: twice as many with a gate."""
    return hidden_dim * (2 if activation == "swiglu" else 1)


def activate(x: Tensor, activation: Mlp) -> Tensor:  # [..., F or 2 F] -> [..., F]
    """Apply an MLP's activation to what its first layer computes.

    quick_gelu: x sigmoid(1.702 x), as CLIP. swiglu: silu(gate) * value, the gate first.
    """
    match activation:
        case "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return F.silu(gate) * value
        case "quick_gelu":
            return x * torch.sigmoid(QUICK_GELU * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class LayerNormMLP(Normed):
    """A LayerNorm and an MLP of two linear layers: [..., dim] -> [..., dim].

    gelu: fc2(gelu(fc1(x))), exact, and likewise with the other GELUs of `activate`. swiglu (arXiv
    2002.05202): fc2(silu(gate) * value), where fc1 computes the gate, F features, and then the
    value, as many.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Mlp = "gelu",
        eps: float = LAYER_NORM_EPS,
        *,
        matmul: Matmul = F.linear,
    ) -> None:
        super().__init__()
        self.activation, self.eps, self.matmul = activation, eps, matmul
        fc1_dim = fc1_features(hidden_dim, activation)
        self.layer_norm_weight = nn.Parameter(torch.empty(dim))
        self.layer_norm_bias = nn.Parameter(torch.empty(dim))
        self.fc1_weight = nn.Parameter(torch.empty(fc1_dim, dim))
        self.fc1_bias = nn.Parameter(torch.empty(fc1_dim))
        self.fc2_weight = nn.Parameter(torch.empty(dim, hidden_dim))
        self.fc2_bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.layer_norm_weight)
        init_weight(self.fc1_weight)
        init_weight(self.fc2_weight)
        for bias in (self.layer_norm_bias, self.fc1_bias, self.fc2_bias):
            nn.init.zeros_(bias)

    def products(self, x: Tensor) -> Tensor:
        x = activate(self.matmul(x, self.fc1_weight, self.fc1_bias), self.activation)
        return self.matmul(x, self.fc2_weight, self.fc2_bias)
