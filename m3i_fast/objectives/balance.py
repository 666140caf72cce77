"""Weights of the terms of L = sum_k w_k L_k: fixed, by gradient norms, or learnt.

Legend: K terms, in one order throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.objectives.row_statistics import wide

# The gradient of a term that is nearly solved is noise, so that its factor is bounded.
MAX_SCALE = 1e4


class Balance(nn.Module):
    """The weighted sum over terms in one of three modes; w_k > 0 is the configured weight.

    fixed:          L = sum_k w_k L_k
    gradient_norm:  L = sum_k w_k (g / n_k) L_k,  n_k = running |dL_k / dz|,
                    g = sum_k w_k n_k / sum_k w_k
    uncertainty:    L = sum_k w_k (exp(-s_k) L_k + s_k),  s_k learnt, 0 at first

    gradient_norm: z are the shared encoder's outputs. The gradient of term k by z then has the norm
    w_k g, so that weights are priorities, and the norms add up to those of the unbalanced sum. n_k
    is a bias-corrected exponential average, set by its first measurement; until then the term has
    the factor w_k. g / n_k is at most 10^4. In a process group z are the outputs of all ranks. A
    term that is a mean over all rows, of which only a share has its target, has a gradient whose
    norm is sqrt(share) of that with all targets: the norm is divided by sqrt(share), so that the
    factor does not make up for missing annotations.

    uncertainty: Kendall, Gal and Cipolla, arXiv 1705.07115, section 3.2. With a variance exp(s)
    each term is the negative log-likelihood  exp(-s) L_k + s / 2.  For a Gaussian, a dimension of
    `ops.gaussian` is (t - z_hat)^2 / (2 sigma^2), and exp(s) multiplies sigma^2. For a Boltzmann
    likelihood, logits divided by exp(s) raise P to the power exp(-s), with their approximation of
    its partition function, whose logarithm is then s / 2. Twice that, with s shifted by log 2, is
    the form above: the same minimum for the network and one form for both likelihoods. Its optimum
    is s_k = log L_k, where term k has the factor w_k / L_k. The learnt temperature of a Boltzmann
    term stays in L_k. A batch in which L_k is not above 0, such as one without a target of the
    term, gives s_k no gradient.

    State: gradient_norm has buffers `norm` [K] fp32 and `num_measured` [K] int64; uncertainty has
    the parameter `log_variance` [K] fp32; fixed has none. No method synchronises with the host.
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
        """Set up the weights of the active terms, by name in the order of the sum.

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
        """Return whether step `step`, counted from 0, has to call `measure` before its backward."""
        return self.cfg.mode == "gradient_norm" and step % self.cfg.every == 0

    def forward(
        self,
        losses: Mapping[str, Tensor],  # name -> [] fp32 or fp64
    ) -> tuple[Tensor, dict[str, Tensor]]:  # [], name -> [] fp32
        """Return the sum, and each term's factor in it without gradient.

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
        """Update the running norms by |dL_k / dz| of every term; the graphs are kept.

        Backpropagates to `shared` only. A term keeps its norm where its gradient is zero or not
        finite, or where it depends on none of `shared`. shares: the share of this rank's rows that
        have the term's target; every rank has the same number of rows.

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
        usable = (newest > 0) & newest.isfinite()
        count = self.num_measured + usable
        # (1 - m) / (1 - m^t) is 1 at first and keeps the average bias-corrected.
        rate = (1 - self.cfg.momentum) / (1 - self.cfg.momentum ** count.clamp_min(1))
        self.norm.copy_(torch.where(usable, torch.lerp(self.norm, newest, rate), self.norm))
        self.num_measured.copy_(count)

    def _of_all_rows(self, norms: Tensor, share: Tensor) -> Tensor:  # [K], [K] -> [K]
        """Return the norms of the gradients of all ranks' mean loss, as if all rows had a target.

        0 or NaN where no row has one.
        """
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
    """Return the norm of the gradient by `shared`; 0 where the loss does not depend on it."""
    grads: tuple[Tensor | None, ...] = ()
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(wide(grad)) for grad in grads if grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else wide(loss.detach()) * 0
