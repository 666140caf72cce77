"""The contract of the ops with torch, equal bits on all instruction sets and threads, bad input."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_fast.config.data import ViewConfig
from m3i_fast.ops import reference
from m3i_fast.ops.views import VIEW_PARAMS, draw_views, make_views, view_specs
from tests.shared.ops.cpu_capability import run_held_to

VIEWS = view_specs(
    ViewConfig(count=2, size=33, blur_probability=0.5, solarize_probability=0.3),
    ViewConfig(count=3, size=16, scale=(0.05, 0.3), interpolation="linear", blur_probability=0.5),
)
GEOMETRY = [number for view in VIEWS for number in view.geometry()]


def call(batch: int = 3, pictures: int = 1) -> dict[str, Any]:
    """Arguments of make_views, of pictures of several sizes."""
    rng = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 90, (batch, pictures, 2), generator=rng)
    num_bytes = sizes.prod(-1).flatten() * 3
    offset = (num_bytes.cumsum(0) - num_bytes).view(batch, pictures)
    pixels = torch.randint(256, (int(num_bytes.sum()),), dtype=torch.uint8, generator=rng)
    params = draw_views(sizes, torch.arange(batch), seed=0, views=VIEWS)
    return {"pixels": pixels, "offset": offset, "image_size": sizes, "params": params}


def run(**arguments: Any) -> list[Tensor]:
    return list(make_views(**{"views": VIEWS, **arguments}))


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "pictures"), [(3, 1), (2, 2), (0, 1)])
def test_opcheck(batch: int, pictures: int) -> None:
    arguments = call(batch, pictures)
    torch.library.opcheck(torch.ops.m3i.make_views.default, (*arguments.values(), GEOMETRY, 1))
    numbers = [number for view in VIEWS for number in view.distribution]
    torch.library.opcheck(
        torch.ops.m3i.draw_views.default,
        (arguments["image_size"], torch.arange(batch), 0, numbers),
    )


def test_compiles_in_one_graph() -> None:
    arguments = call()

    def views(image_size: Tensor, pixels: Tensor, offset: Tensor) -> list[Tensor]:
        params = draw_views(image_size, torch.arange(3), seed=0, views=VIEWS)
        return run(pixels=pixels, offset=offset, image_size=image_size, params=params)

    compiled = torch.compile(views, fullgraph=True, backend="aot_eager")
    made = compiled(arguments["image_size"], arguments["pixels"], arguments["offset"])
    assert all(map(torch.equal, made, run(**arguments)))


def test_shapes_and_memory() -> None:
    made = run(**call())
    assert [list(view.shape) for view in made] == [[3, 3, of.size, of.size] for of in VIEWS]
    assert all(view.is_contiguous() and view.dtype == torch.uint8 for view in made)
    assert len({view.untyped_storage().data_ptr() for view in made}) == 1
    assert [view.shape[0] for view in run(**call(batch=0))] == [0] * len(VIEWS)


# ---- The same bits -------------------------------------------------------------------------------

_DIGEST = """
import hashlib
from tests.ops.views.test_contract import digest
print(digest())
"""


def digest() -> str:
    """Of all bytes of views of every kind of size, and of their parameters."""
    views = view_specs(
        *(
            ViewConfig(
                size=size,
                interpolation="cubic" if size % 2 else "linear",
                blur_probability=0.6,
                solarize_probability=0.3,
                scale=(0.02, 1.0),
                ratio=(0.3, 3.0),
            )
            for size in (1, 2, 7, 16, 31, 64, 96, 117, 224)
        )
    )
    arguments = call(batch=12)
    arguments["params"] = draw_views(
        arguments["image_size"], torch.arange(12) + 2**33, seed=-5, views=views
    )
    parts = [arguments["params"], *run(**arguments, views=views)]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_gives_the_same_bits(capability: str) -> None:
    assert run_held_to(capability, _DIGEST).strip() == digest()


def test_any_threads_and_any_batch_give_the_same_bits() -> None:
    arguments = call(batch=4, pictures=2)
    together = run(**arguments)
    for num_threads in (2, 3, 64):
        assert all(map(torch.equal, together, run(**arguments, num_threads=num_threads)))
    for b in range(4):
        alone = {
            name: arguments[name][b : b + 1].contiguous() for name in arguments if name != "pixels"
        }
        made = run(pixels=arguments["pixels"], **alone)
        assert all(torch.equal(view[0], of[b]) for view, of in zip(made, together, strict=True))


def test_views_are_those_of_plain_torch() -> None:
    """The resize has the same bits, colours are in float64 there: another rounding is rare."""
    arguments = call(batch=6, pictures=2)
    made, expected = run(**arguments), reference.views(**arguments, views=VIEWS)
    assert [view.shape for view in made] == [view.shape for view in expected]
    for ours, theirs in zip(made, expected, strict=True):
        assert ((ours.int() - theirs.int()).abs() > 1).float().mean() < 0.005


@pytest.mark.gpu
def test_cuda_gives_the_bits_of_the_cpu() -> None:
    for batch, pictures in ((1, 1), (7, 2)):
        arguments = call(batch, pictures)
        on_device = {name: tensor.cuda() for name, tensor in arguments.items()}
        made = [view.cpu() for view in run(**on_device)]
        assert all(map(torch.equal, made, run(**arguments)))


# ---- Wrong input ---------------------------------------------------------------------------------


def changed(name: str, place: tuple[int, ...], value: float) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        arguments = call()
        arguments[name][place] = value
        return arguments

    return make


def param(name: str, value: float) -> Callable[[], dict[str, Any]]:
    return changed("params", (1, 2, VIEW_PARAMS.index(name)), value)


def replaced(**arguments: Any) -> Callable[[], dict[str, Any]]:
    return lambda: call() | arguments


NAN, INF = float("nan"), float("inf")
WRONG = {
    "pixels of float": (replaced(pixels=torch.zeros(9)), r"pixels: expected dtype \S*uint8"),
    "offset of int32": (
        replaced(offset=torch.zeros(3, 1).int()),
        r"offset: expected dtype \S*int64",
    ),
    "flat offset": (replaced(offset=torch.zeros(3).long()), r"offset: expected shape \[\*, \*\]"),
    "three pictures": (
        replaced(offset=torch.zeros(3, 3).long()),
        r"offset: expected one picture .* got 3 for 5",
    ),
    "sizes short": (
        replaced(image_size=torch.ones(2, 1, 2).long()),
        r"image_size: expected shape \[3, 1, 2\], got \[2, 1, 2\]",
    ),
    "a view less": (
        replaced(views=VIEWS[:4]),
        r"params: expected shape \[3, 4, 13\], got \[3, 5, 13\]",
    ),
    "no views": (replaced(views=[]), r"geometry: expected four numbers a view, got 0"),
    "no threads": (replaced(num_threads=0), r"num_threads: expected at least 1, got 0"),
    "strided params": (
        replaced(params=call()["params"].transpose(0, 1).contiguous().transpose(0, 1)),
        r"params: expected a contiguous tensor",
    ),
    "a negative offset": (changed("offset", (2, 0), -1), r"offset\[2, 0\]: .* got one from -1"),
    "past the pixels": (changed("offset", (2, 0), 10**9), r"offset\[2, 0\]: .* from 1000000000"),
    "an offset that overflows": (changed("offset", (0, 0), 2**63 - 1), r"offset\[0, 0\]"),
    "a picture of no rows": (changed("image_size", (1, 0, 0), 0), r"image_size\[1, 0\]: .* 0 x"),
    "a picture too long": (changed("image_size", (1, 0, 1), 2**40), r"image_size\[1, 0\]"),
    "a picture larger than its bytes": (changed("image_size", (2, 0, 0), 10**6), r"offset\[2, 0\]"),
    "y outside": (param("y", 89), r"params\[1, 2\]: y"),
    "y negative": (param("y", -1), r"params\[1, 2\]: y"),
    "x between pixels": (param("x", 0.5), r"params\[1, 2\]: x"),
    "no height": (param("height", 0), r"params\[1, 2\]: height"),
    "width past the picture": (param("width", 91), r"params\[1, 2\]: width"),
    "infinite height": (param("height", INF), r"params\[1, 2\]: height"),
    "NaN width": (param("width", NAN), r"params\[1, 2\]: width"),
    "half a flip": (param("flip", 0.5), r"params\[1, 2\]: flip"),
    "NaN brightness": (param("brightness", NAN), r"params\[1, 2\]: brightness"),
    "negative contrast": (param("contrast", -0.1), r"params\[1, 2\]: contrast"),
    "infinite saturation": (param("saturation", INF), r"params\[1, 2\]: saturation"),
    "hue past half a turn": (param("hue", 0.51), r"params\[1, 2\]: hue"),
    "a 25th order": (param("order", 24), r"params\[1, 2\]: order"),
    "gray 2": (param("gray", 2), r"params\[1, 2\]: gray"),
    "negative sigma": (param("sigma", -1), r"params\[1, 2\]: sigma"),
    "NaN sigma": (param("sigma", NAN), r"params\[1, 2\]: sigma"),
    "solarize -1": (param("solarize", -1), r"params\[1, 2\]: solarize"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_named(make: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(**make())


SEEN_BY_THE_FAKE = (
    *("pixels of float", "offset of int32", "flat offset", "three pictures", "sizes short"),
    "a view less",
)


@pytest.mark.parametrize("name", SEEN_BY_THE_FAKE)
def test_fake_names_wrong_input_too(name: str) -> None:
    make, message = WRONG[name]
    arguments = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in make().items()}
    with pytest.raises(RuntimeError, match=message):
        run(**arguments)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ([0, 0, 1, 1], r"view 0: expected a size of 1 to 16384 pixels, got 0"),
        ([8, 0, 1, 1], r"view 0: expected a size of 1 to 16384 pixels, got 0"),
        ([20000, 8, 1, 1], r"got 20000"),
        ([8, 8, 4, 1], r"odd blur_kernel_size of 1 to 15"),
        ([8, 9, 17, 1], r"half is less than its 8 pixels, got 17"),
        ([9, 8, 17, 1], r"half is less than its 8 pixels, got 17"),
        ([8, 8, 3], r"four numbers a view, got 3"),
    ],
)
def test_wrong_geometry_is_named(geometry: list[int], message: str) -> None:
    arguments = call()
    arguments["params"] = arguments["params"][:, :1].contiguous()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.m3i.make_views(*arguments.values(), geometry, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 1, 2).long(), torch.zeros(3).long()), r"image_size: expected shape \[3"),
        ((torch.ones(2, 1, 2), torch.zeros(2).long()), r"image_size: expected dtype int64"),
        ((torch.ones(2, 1, 2).long(), torch.zeros(2)), r"position: expected dtype int64"),
        ((torch.ones(2, 3, 2).long(), torch.zeros(2).long()), r"one picture a sample"),
        ((torch.zeros(1, 1, 2).long(), torch.zeros(1).long()), r"image_size\[0, 0\]: .* 0 x 0"),
        ((torch.ones(1, 1, 2).long(), torch.tensor([-1])), r"position\[0\]: expected 0 or more"),
    ],
)
def test_wrong_draws_are_named(arguments: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        draw_views(*arguments, seed=0, views=VIEWS)


def test_wrong_distributions_are_named() -> None:
    right = list(VIEWS[0].distribution)
    names = "scale scale ratio ratio flip jitter brightness contrast saturation hue gray blur"
    for at, name in enumerate(f"{names} blur_sigma blur_sigma solarize".split()):
        for value in (-1.0, NAN, INF):
            numbers = [*right, *right[:at], value, *right[at + 1 :]]
            with pytest.raises(RuntimeError, match=f"view 1, {name}"):
                torch.ops.m3i.draw_views(
                    torch.ones(1, 1, 2).long(), torch.zeros(1).long(), 0, numbers
                )


@pytest.mark.parametrize("wrong", [{"blur_kernel_size": 4}, {"size": 8, "blur_kernel_size": 17}])
def test_configs_of_an_impossible_blur_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="blur_kernel_size: expected an odd number"):
        ViewConfig(**wrong)


def test_the_blurs_kernel_is_a_tenth_of_the_side() -> None:
    sizes = {1: 1, 9: 1, 64: 7, 96: 9, 224: 23}
    assert {size: ViewConfig(size=size).blur_kernel for size in sizes} == sizes
