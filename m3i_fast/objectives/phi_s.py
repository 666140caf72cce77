"""PHI-S: standardise a teacher's features by one scale, in a basis that shares out their variance.

arXiv 2410.01680, section 3.4. Legend: N rows, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from m3i_fast.durable_files import write_atomically
from m3i_fast.objectives.row_statistics import full_precision, sum_over_ranks, wide

Statistics = tuple[Tensor, Tensor]
"""Mean [C] and covariance [C, C] of features, fp64."""


class PhiStandardise(nn.Module):
    """Map features to a H V^T (z - mean), without gradient: each channel has variance 1.

    V are the eigenvectors of the features' covariance, H is a Hadamard matrix over sqrt(C), which
    gives every channel the mean of all eigenvalues, and a is one over the root of that mean.
    Lengths and angles of centred features are kept up to the factor a, and nothing is divided by a
    small eigenvalue.

    statistics: mean and covariance that are known beforehand. None: those of the rows of all steps
    and ranks so far, to which `fold` adds a step's, while `collects` is true. The map follows them
    at `renew` alone, which is to be called seldom, since eigenvectors turn as statistics change; up
    to the first call it leaves features as they are.

    Raises ValueError for a width of which no Hadamard matrix is known here.
    """

    centre: Tensor  # [C] fp32
    rotation: Tensor  # [C, C] fp32, a H V^T
    mean: Tensor  # [C] fp32
    covariance: Tensor  # [C, C] fp32, over N
    count: Tensor  # [] fp64, rows so far
    pending_mean: Tensor  # [C], of the rows since the last fold, as the next two
    pending_scatter: Tensor  # [C, C]
    pending_count: Tensor  # []

    def __init__(
        self,
        dim: int,
        process_group: dist.ProcessGroup | None,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__()
        hadamard(dim)  # raises
        self.process_group, self.known = process_group, statistics
        self.collects = statistics is None
        self.register_buffer("centre", torch.empty(dim))
        self.register_buffer("rotation", torch.empty(dim, dim))
        if statistics is None:
            self.register_buffer("mean", torch.empty(dim))
            self.register_buffer("covariance", torch.empty(dim, dim))
            self.register_buffer("count", torch.empty((), dtype=torch.float64))
            self.register_buffer("pending_mean", torch.empty(dim), persistent=False)
            self.register_buffer("pending_scatter", torch.empty(dim, dim), persistent=False)
            self.register_buffer("pending_count", torch.empty(()), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every buffer, as after `to_empty`."""
        for buffer in self.buffers():
            buffer.zero_()
        self.rotation.fill_diagonal_(1.0)
        if self.known is not None and not self.rotation.is_meta:
            self._follow(*self.known)

    @property
    def scale(self) -> Tensor:  # []
        """Return a, by which centred features are multiplied; 1 before the first `renew`."""
        return torch.linalg.vector_norm(self.rotation[0])

    @torch.no_grad()
    @full_precision
    def forward(self, z: Tensor) -> Tensor:  # [..., C] -> [..., C] in the dtype of z
        rows = wide(z).flatten(0, -2)
        if self.training and self.collects:
            self._note(rows)
        return ((rows - self.centre) @ self.rotation.T).to(z.dtype).view_as(z)

    def _note(self, rows: Tensor) -> None:  # [N, C]
        """Add rows to those since the last fold."""
        own = rows.new_full((), len(rows))
        mean = rows.sum(0) / own.clamp_min(1)
        total = self.pending_count + own
        share = own / total.clamp_min(1)
        delta = mean - self.pending_mean
        centred = rows - mean
        self.pending_scatter += centred.T @ centred
        self.pending_scatter.addr_(delta, delta * self.pending_count * share)
        self.pending_mean += share * delta
        self.pending_count.copy_(total)

    @torch.no_grad()
    def fold(self) -> None:
        """Add the rows since the last call to the statistics; to be called once a step.

        All-reduces C^2 numbers over the process group, so that every rank has to call it. Does not
        synchronise with the host.
        """
        if not self.collects:
            return
        group, own = self.process_group, self.pending_count
        count = sum_over_ranks(own, group)
        mean = sum_over_ranks(own * self.pending_mean, group) / count.clamp_min(1)
        apart = self.pending_mean - mean
        scatter = torch.addr(self.pending_scatter, apart, own * apart)
        of_step = sum_over_ranks(scatter, group) / count.clamp_min(1)
        total = self.count + count
        share = (count / total.clamp_min(1)).to(mean.dtype)
        delta = mean - self.mean
        self.covariance.lerp_(of_step, share).addr_(delta, share * (1 - share) * delta)
        self.mean += share * delta
        self.count.copy_(total)
        for buffer in (self.pending_mean, self.pending_scatter, self.pending_count):
            buffer.zero_()

    @torch.no_grad()
    def renew(self) -> None:
        """Let the map follow the statistics so far; waits for the device.

        The eigenvectors are computed on the CPU, and all ranks take those of the first: another
        kind of CPU may turn close ones otherwise. All ranks have to call it.
        """
        if self.known is None and float(self.count) > 0:
            self._follow(self.mean, self.covariance)

    def _follow(self, mean: Tensor, covariance: Tensor) -> None:
        values, vectors = torch.linalg.eigh(covariance.cpu().double())
        # Of either sign: the one whose largest entry is positive.
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0)[None]).sign()
        scale = values.clamp_min(0).mean().clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        self.centre.copy_(mean)
        self.rotation.copy_(scale * hadamard(len(mean)) @ vectors.T)
        if self.process_group is not None:
            dist.broadcast(self.rotation, group=self.process_group, group_src=0)


# ---- Statistics in a file ------------------------------------------------------------------------


@torch.no_grad()
def measure(features: Iterable[Tensor]) -> Statistics:  # [..., C] each
    """Compute mean and covariance of features that come in parts, in fp64.

    Raises ValueError where there are none.
    """
    found: PhiStandardise | None = None
    for part in features:
        rows = part.double()
        if found is None:
            found = PhiStandardise(part.shape[-1], None).double().to(part.device)
        found(rows)
        found.fold()
    if found is None:
        raise ValueError("features: expected one part or more, got none")
    return found.mean.cpu(), found.covariance.cpu()


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write statistics as a safetensors file, which `Term.statistics` names, atomically."""
    mean, covariance = (x.double().contiguous() for x in statistics)
    write_atomically(path, save({"mean": mean, "covariance": covariance}))


def read_statistics(path: Path, dim: int) -> Statistics:
    """Read what `write_statistics` wrote, for features of width `dim`.

    Raises FileNotFoundError, and ValueError for another file or another width.
    """
    if not path.is_file():
        raise FileNotFoundError(f"statistics: no such file: {path}")
    try:
        tensors = load_file(path)
        mean, covariance = tensors["mean"], tensors["covariance"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"statistics: expected a file of phi_s.write_statistics, got {path}: {error}"
        ) from error
    if mean.shape != (dim,) or covariance.shape != (dim, dim):
        raise ValueError(
            f"statistics: expected mean [{dim}] and covariance [{dim}, {dim}] of the teacher's "
            f"width, got {list(mean.shape)} and {list(covariance.shape)} in {path}"
        )
    return mean.double(), covariance.double()


# ---- Hadamard matrices ---------------------------------------------------------------------------


def hadamard(size: int) -> Tensor:  # [size, size] fp64
    """Return an orthogonal matrix whose entries are all 1 / sqrt(size) or its negative.

    It is Paley's of a prime, or Sylvester's doubling of a smaller one. Raises ValueError for a size
    that these do not reach: one that is no multiple of 4, or 92, 116 and few more below 2,000.
    """
    signs = _signs(size)
    if signs is None:
        raise ValueError(
            "standardise: expected a teacher of a width for which a Hadamard matrix is known, as "
            f"384, 768, 1024, 1152 and 1280, got {size}; take standardise running"
        )
    return torch.from_numpy(signs / size**0.5)


_DOUBLE = np.array([[1.0, 1.0], [1.0, -1.0]])
_MIXED = np.array([[1.0, -1.0], [-1.0, -1.0]])


def _signs(size: int) -> NDArray[np.float64] | None:  # [size, size] of 1 and -1
    if size == 1:
        return np.ones((1, 1))
    if size == 2:
        return _DOUBLE
    if size % 4 or size < 1:
        return None
    if _is_prime(size - 1):
        return _bordered(size - 1, -1.0) + np.eye(size)
    prime = size // 2 - 1
    if prime % 4 == 1 and _is_prime(prime):
        return np.kron(_bordered(prime, 1.0), _DOUBLE) + np.kron(np.eye(prime + 1), _MIXED)
    half = _signs(size // 2)
    return None if half is None else np.kron(_DOUBLE, half)


def _bordered(prime: int, sign: float) -> NDArray[np.float64]:  # [prime + 1, prime + 1]
    """Return Paley's matrix: whether i - j is a square modulo the prime, with a border of ones."""
    numbers = np.arange(prime)
    residue = np.full(prime, -1.0)
    residue[numbers**2 % prime] = 1.0
    residue[0] = 0.0
    bordered = np.zeros((prime + 1, prime + 1))
    bordered[0, 1:], bordered[1:, 0] = 1.0, sign
    bordered[1:, 1:] = residue[(numbers[:, None] - numbers) % prime]
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, int(number**0.5) + 1))
