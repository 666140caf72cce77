"""How the terms of L = sum_k w_k L_k are weighted: as configured, by gradient norms, or learnt.

Legend: K terms, in one order throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.config.balance import BalanceConfig
from m3i_fast.objectives.row_statistics import wide

# A term that is all but solved has a gradient of noise: it is raised no further than this.
MAX_SCALE = 1e4


class Balance(nn.Module):
    """The sum over terms, L = sum_k w_k L_k, with what stands in for w_k; w_k > 0 is configured.

    fixed:          L = sum_k w_k L_k
    gradient_norm:  L = sum_k w_k (g / n_k) L_k,  n_k = running |dL_k / dz|,
                    g = sum_k w_k n_k / sum_k w_k
    uncertainty:    L = sum_k w_k (exp(-s_k) L_k + s_k),  s_k learnt, 0 at first

    gradient_norm: z are the shared encoder's outputs. A term then pulls on them with norm w_k g, so
    that weights are priorities, and the norms add up to those of the unbalanced sum. n_k is a
    bias-corrected exponential average, set by its first measurement; before that the term counts
    w_k. g / n_k is at most 10^4. In a process group z are the outputs of all ranks. Of a term that
    is a mean over all rows while only a share of them has its target, the gradients of these rows
    stand side by side, and the norm is sqrt(share) of what it were with all: it is divided by that,
    so that few annotations pull like few, and not like as many rows as there are.

    uncertainty: Kendall, Gal and Cipolla, arXiv 1705.07115, section 3.2. With a variance exp(s) of
    its own each term is the negative log-likelihood  exp(-s) L_k + s / 2.  Of a Gaussian: a
    dimension of `ops.gaussian` is (t - z_hat)^2 / (2 sigma^2), and exp(s) multiplies sigma^2. Of a
    Boltzmann: logits divided by exp(s) raise P to the power exp(-s), with their approximation of
    its partition function, whose logarithm is then s / 2. Twice that is, with s moved by log 2, the
    form above: the same minimum for the network, one form for both likelihoods, and its optimum is
    s_k = log L_k, where term k weighs w_k / L_k. The learnt temperature of a Boltzmann term stays
    in L_k. A batch in which L_k is not above 0, such as one without a member of the term, does not
    move s_k.

    State: gradient_norm has buffers `norm` [K] fp32 and `num_measured` [K] int64; uncertainty has
    the parameter `log_variance` [K] fp32; fixed has none. Nothing here waits for the device.
    """

    weight: Tensor  # [K] fp32
    norm: Tensor  # [K] fp32
    num_measured: Tensor  # [K] int64

    def __init__(
        self,
        cfg: BalanceConfig,
        weights: Mapping[str, float],
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """weights: configured weight by name of the active terms, in the order of the sum.

        Raises ValueError without a term, or where a weight is not positive.
        """
        super().__init__()
        if not weights:
            raise ValueError("weights: expected at least one term, got none")
        for name, value in weights.items():
            if not value > 0:
                raise ValueError(f"weights[{name!r}]: expected > 0, got {value}")
        self.cfg, self.weights, self.process_group = cfg, dict(weights), process_group
        count = len(weights)
        self.register_buffer("weight", torch.empty(count), persistent=False)
        if cfg.mode == "gradient_norm":
            self.register_buffer("norm", torch.empty(count))
            self.register_buffer("num_measured", torch.empty(count, dtype=torch.int64))
        elif cfg.mode == "uncertainty":
            self.log_variance = nn.Parameter(torch.empty(count))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer, as after `to_empty`."""
        for state in (*self.parameters(), *self.buffers()):
            state.zero_()
        self.weight.copy_(torch.tensor(list(self.weights.values())))

    def due(self, step: int) -> bool:
        """Whether `measure` is to be called in this step, from 0, before its backward."""
        return self.cfg.mode == "gradient_norm" and step % self.cfg.every == 0

    def forward(
        self,
        losses: Mapping[str, Tensor],  # name -> [] fp32 or fp64
    ) -> tuple[Tensor, dict[str, Tensor]]:  # [], name -> [] fp32
        """The sum, and each term's factor in it, without gradient.

        Raises ValueError where the names are not those of the terms.
        """
        self._expect_terms(losses)
        match self.cfg.mode:
            case "fixed":
                # A Python number: a term in fp64 is multiplied by all of its digits.
                total = _sum(losses[name] * value for name, value in self.weights.items())
                factors = self.weight
            case "gradient_norm":
                factors = self.weight * self._scales()
                terms = zip(self.weights, factors.unbind(), strict=True)
                total = _sum(factor * losses[name] for name, factor in terms)
            case "uncertainty":
                total = self._uncertain_sum(losses)
                factors = self.weight * (-self.log_variance.detach()).exp()
        return total, dict(zip(self.weights, factors.unbind(), strict=True))

    @torch.no_grad()
    def measure(
        self,
        losses: Mapping[str, Tensor],  # name -> [], with its graph
        shared: Sequence[Tensor],  # any shapes, outputs of the encoder that the losses are made of
        shares: Mapping[str, Tensor] | None = None,  # name -> [] fp64, 1 of the terms left out
    ) -> None:
        """Take |dL_k / dz| of every term into the running norms; the graphs are kept.

        Gradients go as far as `shared` and no further. A term keeps its norm where its gradient is
        zero or not finite, or where it does not depend on any of them. shares: of this rank's rows,
        those that have the term's target, as many rows on each rank.

        Raises ValueError in another mode than gradient_norm, where the names are not those of the
        terms, and where `shared` is empty or holds a tensor without gradient.
        """
        if self.cfg.mode != "gradient_norm":
            raise ValueError(
                f"balance.mode: expected gradient_norm to measure, got {self.cfg.mode}"
            )
        self._expect_terms(losses)
        if not shared or not all(tensor.requires_grad for tensor in shared):
            got = [tensor.requires_grad for tensor in shared]
            raise ValueError(f"shared: expected tensors that require a gradient, got {got}")
        norms = torch.stack([_gradient_norm(losses[name], shared) for name in self.weights])
        one = norms.new_ones(())
        share = torch.stack([(shares or {}).get(name, one).to(norms) for name in self.weights])
        newest = self._of_all_rows(norms, share).to(self.norm.dtype)
        found = (newest > 0) & newest.isfinite()
        count = self.num_measured + found
        # (1 - m) / (1 - m^t): 1 at first, and then the bias-corrected average stays one.
        rate = (1 - self.cfg.momentum) / (1 - self.cfg.momentum ** count.clamp_min(1))
        self.norm.copy_(torch.where(found, torch.lerp(self.norm, newest, rate), self.norm))
        self.num_measured.copy_(count)

    def _of_all_rows(self, norms: Tensor, share: Tensor) -> Tensor:  # [K], [K] -> [K]
        """Of the gradient of the mean over the ranks' losses, by all ranks' outputs together, as if
        all rows had a target; 0 or NaN where none has."""
        if self.process_group is not None:
            both = torch.stack([norms.square(), share])
            dist.all_reduce(both, group=self.process_group)
            count = dist.get_world_size(self.process_group)
            norms, share = both[0].sqrt() / count, both[1] / count
        return norms / share.sqrt()

    def _scales(self) -> Tensor:  # [K], g / n_k; 1 where nothing is measured yet
        known = self.num_measured > 0
        weight = self.weight * known
        mean = (weight * self.norm).sum() / weight.sum()
        return torch.where(known, (mean / self.norm).clamp_max(MAX_SCALE), 1.0)

    def _uncertain_sum(self, losses: Mapping[str, Tensor]) -> Tensor:  # []
        terms = []
        for s, (name, weight) in zip(self.log_variance.unbind(), self.weights.items(), strict=True):
            loss = losses[name]
            s = torch.where(loss.detach() > 0, s, s.detach())
            terms.append(weight * ((-s).exp() * loss + s))
        return _sum(terms)

    def _expect_terms(self, losses: Mapping[str, Tensor]) -> None:
        if losses.keys() != self.weights.keys():
            raise ValueError(f"losses: expected the terms {list(self.weights)}, got {list(losses)}")


def _sum(terms: Iterable[Tensor]) -> Tensor:  # [] each -> []
    first, *rest = terms
    return sum(rest, start=first)


def _gradient_norm(loss: Tensor, shared: Sequence[Tensor]) -> Tensor:  # []
    """0 where the loss does not depend on `shared`."""
    found: tuple[Tensor | None, ...] = ()
    if loss.requires_grad:
        found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(wide(grad)) for grad in found if grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else wide(loss.detach()) * 0
