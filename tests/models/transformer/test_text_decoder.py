"""The decoder of captions against torch.nn.TransformerDecoder with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m3i_fast.config.fields import Recompute
from m3i_fast.config.objective.heads import CaptionerConfig
from m3i_fast.models.transformer.text_decoder import TextDecoder
from tests.shared.torch_decoder import hidden_of

B, T, V, CELLS = 3, 7, 20, 5


def build(*, width: int = 24, parallel: float = 0.0, recompute: Recompute = "none") -> TextDecoder:
    torch.manual_seed(0)
    cfg = CaptionerConfig(
        dim=24, depth=2, num_heads=3, parallel=parallel, activation_checkpointing=recompute
    )
    decoder = TextDecoder(cfg, vocab_size=V, context_length=T + 2, input_dim=width)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder


def inputs(width: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    cells = torch.randn(B, CELLS, width, generator=rng, dtype=torch.float64).to(dtype)
    return cells.requires_grad_(), torch.randint(0, V, (B, T), generator=rng)


def with_gradients(output: Tensor, *by: Tensor) -> list[Tensor]:
    weight = torch.arange(output.numel(), dtype=output.dtype).sin().view_as(output)
    grads = torch.autograd.grad((output * weight).sum(), by, allow_unused=True)
    pairs = zip(grads, by, strict=True)
    return [output, *(g if g is not None else torch.zeros_like(x) for g, x in pairs)]


@pytest.mark.parametrize("parallel", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("width", [24, 40])
def test_it_is_torchs(width: int, dtype: torch.dtype, error: float, parallel: float) -> None:
    decoder = build(width=width, parallel=parallel).to(dtype)
    cells, ids = inputs(width, dtype)
    alone = torch.tensor([True, False, True]) | (parallel == 1) if parallel else None
    by = cells, *decoder.parameters()
    ours = with_gradients(decoder(cells, ids, alone), *by)
    theirs = with_gradients(hidden_of(decoder, cells, ids, alone), *by)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= error * max(b.norm(), 1)


def test_no_token_sees_a_later_one() -> None:
    decoder, (cells, ids) = build().double(), inputs()
    changed = ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % V
    before, after = decoder(cells, ids), decoder(cells, changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:, 4:], after[:, 4:]).all(-1).any()


def test_parallel_captions_are_read_from_no_token() -> None:
    decoder, (cells, ids) = build(parallel=0.75).double(), inputs()
    alone = torch.tensor([True, False, True])
    before, after = decoder(cells, ids, alone), decoder(cells, ids.flip(1), alone)
    same = (before == after).flatten(1).all(1)
    assert same.tolist() == [True, False, True]
    cells = torch.cat([cells[:1], cells[1:].flip(0)])
    assert not torch.isclose(decoder(cells, ids, alone)[2], before[2]).all()


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_no_bit(recompute: Recompute) -> None:
    found = []
    for how in ("none", recompute):
        decoder = build(recompute=how).double()
        cells, ids = inputs()
        found.append(with_gradients(decoder(cells, ids), cells, *decoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_all_parameters_are_reset_to_those_of_a_new_one() -> None:
    decoder = build(parallel=0.5)
    torch.manual_seed(3)
    new = TextDecoder(decoder.cfg, vocab_size=V, context_length=T + 2, input_dim=24)
    torch.manual_seed(3)
    decoder.reset_parameters()
    for name, value in new.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], value), name


def test_wrong_inputs_are_refused() -> None:
    decoder, (cells, ids) = build().double(), inputs()
    with pytest.raises(ValueError, match=r"2 <= T <= context_length = 9, got \[3, 10\]"):
        decoder(cells, torch.zeros(3, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match="parallel: expected none with captioner.parallel = 0"):
        decoder(cells, ids, torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match=r"parallel: expected \[B\] bool .* got None"):
        build(parallel=0.5).double()(cells, ids)
