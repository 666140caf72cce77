"""Relative positions against pictures of coordinates; the decoder's use of positions."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from m3i_fast.config.objective.heads import DecoderConfig
from m3i_fast.models.transformer.positions import relative_positions
from m3i_fast.objectives.heads import DenseDecoder, GlobalHead

NUM_CASES = 2000
CFG = DecoderConfig(dim=32, depth=2, num_heads=4)


def random_box(rng: np.random.Generator, height: int, width: int, flip: int) -> list[int]:
    h, w = int(rng.integers(8, height + 1)), int(rng.integers(8, width + 1))
    y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    return [y, x, h, w, flip]


def view_axes(picture: Tensor, box: list[int], side: int) -> list[np.ndarray]:
    """Crop, resize, then mirror a picture of coordinates and read image = a + b * view.

    Returns (b, a) of the row and of the column, in pixels of the image and of the view. Fitted
    to the middle of the view, for the resize clamps at its border.
    """
    y, x, height, width, flip = box
    view = transforms.resized_crop(picture, y, x, height, width, [side, side], antialias=False)
    if flip:
        view = transforms.horizontal_flip(view)
    middle = np.arange(side // 4, side - side // 4)
    rows, columns = view[0, :, side // 2].numpy(), view[1, side // 2, :].numpy()
    return [np.polyfit(middle + 0.5, line[middle], 1) for line in (rows, columns)]


def test_relative_positions_are_where_the_picture_says() -> None:
    """2,000 pairs of crops, every combination of mirrorings, grids of input and target unlike."""
    rng = np.random.default_rng(0)
    patch = 8
    for case in range(NUM_CASES):
        height, width = (int(n) for n in rng.integers(8, 200, 2))
        rows, columns = torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5
        picture = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))  # [2, H, W]
        input_grid, target_grid = (int(n) for n in rng.choice([4, 7, 8], 2))
        input_box = random_box(rng, height, width, case & 1)
        target_box = random_box(rng, height, width, case >> 1 & 1)
        index = rng.integers(0, target_grid**2, 5)

        input_axes = view_axes(picture, input_box, input_grid * patch)
        target_axes = view_axes(picture, target_box, target_grid * patch)
        cells = np.stack(np.divmod(index, target_grid))  # row and column in the target view
        expected = np.empty((5, 4))
        for axis in range(2):
            in_image = np.polyval(target_axes[axis], (cells[axis] + 0.5) * patch)
            slope, offset = input_axes[axis]
            in_view = (in_image - offset) / slope  # pixels of the input view
            expected[:, axis] = in_view / patch - 0.5
            expected[:, 2 + axis] = np.log(abs(target_axes[axis][0] / slope))

        got = relative_positions(
            torch.tensor([input_box], dtype=torch.float32),
            torch.tensor([target_box], dtype=torch.float32),
            torch.from_numpy(index)[None],
            input_grid=input_grid,
            target_grid=target_grid,
        )
        assert got.shape == (1, 5, 4) and got.dtype == torch.float32
        np.testing.assert_allclose(got[0].numpy(), expected, atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_same_view_gives_its_own_cells(flip: float) -> None:
    boxes = torch.tensor([[3.5, 7.25, 31.0, 12.5, flip]])
    index = torch.arange(49)[None]
    position = relative_positions(boxes, boxes, index, input_grid=7, target_grid=7)[0]
    cells = torch.cartesian_prod(torch.arange(7.0), torch.arange(7.0))
    torch.testing.assert_close(position[:, :2], cells, atol=1e-5, rtol=0)
    torch.testing.assert_close(position[:, 2:], torch.zeros(49, 2))


def test_rows_do_not_mix() -> None:
    torch.manual_seed(0)
    boxes = torch.rand(2, 6, 5) * 50 + 10
    boxes[..., 4] = torch.randint(0, 2, (2, 6))
    index = torch.randint(0, 64, (6, 9))
    together = relative_positions(*boxes, index, input_grid=4, target_grid=8)
    for i in range(6):
        one = relative_positions(
            *boxes[:, i : i + 1], index[i : i + 1], input_grid=4, target_grid=8
        )
        assert torch.equal(together[i : i + 1], one)


def test_boxes_without_a_flip_are_refused() -> None:
    index = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target_boxes: expected \[2, 5\], got \[2, 4\]"):
        relative_positions(
            torch.ones(2, 5), torch.ones(2, 4), index, input_grid=4, target_grid=4
        )  # fmt: skip


def make_decoder(cfg: DecoderConfig = CFG) -> DenseDecoder:
    torch.manual_seed(0)
    decoder = DenseDecoder(cfg, input_dim=24, output_dim=20, input_grid=6)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return decoder


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randn(3, 10, 24)
    token_index = torch.stack([torch.randperm(36)[:10] for _ in range(3)])
    return tokens, token_index, torch.randn(3, 7, 4)


def test_own_tokens_are_a_set_and_asked_positions_are_answered_in_order() -> None:
    decoder = make_decoder()
    tokens, token_index, position = make_inputs()
    out = decoder(tokens, token_index, position)
    assert out.shape == (3, 7, 20)
    order, asked = torch.randperm(10), torch.randperm(7)
    permuted = decoder(tokens[:, order], token_index[:, order], position[:, asked])
    torch.testing.assert_close(permuted, out[:, asked], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("component", range(4))
def test_every_component_of_the_position_matters(component: int) -> None:
    decoder = make_decoder()
    tokens, token_index, position = make_inputs()
    moved = position.clone()
    moved[:, 0, component] += 0.5
    change = decoder(tokens, token_index, moved) - decoder(tokens, token_index, position)
    assert change[:, 0].abs().amax(-1).min() > 1e-2


def test_the_cell_of_a_token_matters() -> None:
    decoder = make_decoder()
    tokens, token_index, position = make_inputs()
    moved = decoder(tokens, token_index.roll(1, 1), position)
    assert (moved - decoder(tokens, token_index, position)).abs().max() > 1e-2


def test_asked_and_own_cells_speak_one_language() -> None:
    """Asking for cell (2, 5) at the same size embeds it as the token of cell (2, 5) is."""
    decoder = make_decoder()
    seen: list[Tensor] = []
    decoder.position.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decoder(*make_inputs()[:2], torch.tensor([2.0, 5.0, 0.0, 0.0]).expand(3, 1, 4))
    torch.testing.assert_close(seen[0][0, 0, :32], decoder.own_position[2 * 6 + 5])


def test_gradients_reach_every_parameter_and_every_token() -> None:
    decoder = make_decoder()
    tokens, token_index, position = make_inputs()
    tokens.requires_grad_()
    decoder(tokens, token_index, position).square().sum().backward()
    assert tokens.grad is not None and tokens.grad.abs().amax(-1).min() > 0
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_it_learns_to_read_the_token_at_the_asked_cell() -> None:
    torch.manual_seed(0)
    decoder = DenseDecoder(CFG, input_dim=8, output_dim=8, input_grid=3)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=4e-3)
    index = torch.arange(9).expand(64, 9)
    losses = []
    for _ in range(300):
        tokens = torch.randn(64, 9, 8)
        asked = torch.randint(0, 9, (64, 4))
        cell = torch.stack([asked // 3, asked % 3], -1).float()
        out = decoder(tokens, index, torch.cat([cell, torch.zeros_like(cell)], -1))
        loss = (out - tokens.gather(1, asked[..., None].expand(-1, -1, 8))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.3, losses[::30]  # the tokens' variance is 1


def test_the_decoder_built_on_meta_equals_one_built_directly() -> None:
    torch.manual_seed(0)
    direct = DenseDecoder(CFG, input_dim=24, output_dim=20, input_grid=6)
    with torch.device("meta"):
        decoder = DenseDecoder(CFG, input_dim=24, output_dim=20, input_grid=6)
    decoder.to_empty(device="cpu")
    torch.manual_seed(0)
    decoder.reset_parameters()
    assert torch.equal(decoder.own_position, direct.own_position)
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, direct.state_dict()[name]), name


@pytest.mark.parametrize(("field", "value"), [("dim", 30), ("depth", 0), ("mlp_ratio", -1.0)])
def test_bad_decoder_sizes_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected .*got {value}"):
        DecoderConfig(**{field: value})


def test_global_head_is_a_mean_and_an_mlp() -> None:
    torch.manual_seed(0)
    head = GlobalHead(24, 40, 16)
    tokens = torch.randn(5, 9, 24)
    hidden = tokens.mean(1) @ head.hidden.weight.T + head.hidden.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden @ head.output.weight.T + head.output.bias
    torch.testing.assert_close(head(tokens), expected)
    torch.testing.assert_close(head(tokens[:, torch.randperm(9)]), expected)


def test_global_head_without_hidden_layer_is_a_mean_and_a_product() -> None:
    head = GlobalHead(24, 0, 16)
    assert list(head.state_dict()) == ["output.weight"]
    tokens = torch.randn(5, 9, 24)
    torch.testing.assert_close(head(tokens), tokens.mean(1) @ head.output.weight.T)
