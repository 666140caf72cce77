"""The calls whose times are predicted: those of the benchmarks' rows, and those that are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m3i_fast.config.data import ViewConfig
from m3i_fast.costs.kernels import boltzmann, dcnv3, elementwise
from m3i_fast.costs.kernels.constants import Rates
from m3i_fast.costs.kernels.gather import Sampling
from m3i_fast.costs.kernels.model import CallPrediction, Phase, predict
from m3i_fast.costs.view_cost import PICTURE

Figures = Mapping[str, Any]
HALF = ("bfloat16", "float16")

# The groups of views that `m3i-fast bench views` cuts, by the name of its rows.
_SSL: dict[str, Any] = {"blur_probability": 0.5, "solarize_probability": 0.1}
_LOCAL = ViewConfig(count=8, size=96, scale=(0.05, 0.3), **_SSL)
VIEWS: dict[str, tuple[ViewConfig, ...]] = {
    "2 x 224, resize alone": (ViewConfig(count=2, jitter_probability=0.0, gray_probability=0.0),),
    "2 x 224": (ViewConfig(count=2, **_SSL),),
    "2 x 224 + 8 x 96": (ViewConfig(count=2, **_SSL), _LOCAL),
    "2 x 64": (ViewConfig(count=2, size=64, **_SSL),),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call of an op, by the name that tables have for it."""

    op: str
    name: str
    phases: Callable[[Rates], tuple[Phase, ...]]

    def predict(self, rates: Rates) -> CallPrediction:
        """Predict the call on a card."""
        return predict(self.phases(rates), rates)


class NotDescribed(Exception):
    """Tell why a row of a benchmark has no prediction."""


# ---- Of a row ------------------------------------------------------------------------------------


def _expect(figures: Figures, field: str, expected: tuple[object, ...]) -> None:
    if figures[field] not in expected:
        raise NotDescribed(
            f"{field} {figures[field]}, described is {', '.join(map(str, expected))}"
        )


def _is_backward(figures: Figures) -> bool:
    return bool(figures["pass"] == "forward+backward")


def _dcnv3(figures: Figures) -> Call:
    _expect(figures, "dtype", HALF)
    channels, groups = figures["channels"], figures["groups"]
    if channels % groups or channels // groups not in (16, 32):
        raise NotDescribed(f"groups of {channels / groups:g} channels, described are 16 and 32")
    sampling = Sampling(
        batch=figures["batch_size"],
        height=figures["height"],
        width=figures["width"],
        channels=channels,
        groups=groups,
        size=2,
        reach=3**0.5 * figures["offset_px"],
    )

    def phases(rates: Rates) -> tuple[Phase, ...]:
        forward = dcnv3.forward(sampling, rates)
        return forward + dcnv3.backward(sampling, rates) if _is_backward(figures) else forward

    size = f"{sampling.batch}x{sampling.height}x{sampling.width}x{channels} / {groups}"
    name = f"{size}, {figures['offset_px']:g} px, {figures['pass']}"
    return Call(op="dcnv3", name=name, phases=phases)


def _boltzmann(figures: Figures) -> Call:
    if figures.get("kind") != "speed":
        raise NotDescribed(f"kind {figures.get('kind')}, described is speed")
    _expect(figures, "form", ("softmax", "classes"))
    _expect(figures, "dtype", HALF)
    call = boltzmann.Call(
        rows=figures["rows"],
        columns=figures["columns"],
        dim=figures["dim"],
        symmetric=figures["form"] == "softmax",
    )

    def phases(rates: Rates) -> tuple[Phase, ...]:
        if not call.symmetric:
            return boltzmann.rows_alone(call, rates, backward=_is_backward(figures))
        made = boltzmann.sums(call, rates)
        if _is_backward(figures):
            made += boltzmann.logit_grads(call, rates) + boltzmann.feature_grads(call, rates)
        return made

    size = f"{figures['form']}, {call.rows}x{call.columns}x{call.dim}"
    return Call(op="boltzmann", name=f"{size}, {figures['pass']}", phases=phases)


def _gaussian(figures: Figures) -> Call:
    _expect(figures, "dtype", HALF)
    _expect(figures, "decorrelation_weight", (0,))
    rows, width = figures["batch_size"] * figures["queries"], figures["width"]

    def phases(_: Rates) -> tuple[Phase, ...]:
        forward = elementwise.gaussian(rows, width, backward=False)
        backward = elementwise.gaussian(rows, width, backward=True)
        return forward + backward if _is_backward(figures) else forward

    return Call(op="gaussian", name=f"{rows}x{width}, {figures['pass']}", phases=phases)


def _mask_mix(figures: Figures) -> Call:
    _expect(figures, "dtype", HALF)
    pictures, size, cell = (figures[name] for name in ("batch_size", "image_size", "patch_size"))
    if cell % elementwise.MASK_MIX_PIXELS:
        raise NotDescribed(f"patch_size {cell}, described are multiples of 16")
    name = f"{pictures}x{size}x{size}, cells of {cell}"
    return Call(
        op="mask_mix", name=name, phases=lambda _: elementwise.mask_mix(pictures, size, cell)
    )


def _views(figures: Figures) -> Call:
    height, width = PICTURE
    _expect(figures, "picture", (f"{height} x {width}",))
    _expect(figures, "views", tuple(VIEWS))
    pictures, groups = figures["batch_size"], VIEWS[figures["views"]]
    return Call(
        op="views",
        name=f"{figures['views']}, {pictures} pictures",
        phases=lambda _: elementwise.views(groups, height, width, pictures),
    )


_OF_ROW: dict[str, Callable[[Figures], Call]] = {
    describe.__name__.removeprefix("_"): describe
    for describe in (_dcnv3, _boltzmann, _gaussian, _mask_mix, _views)
}
OPS = tuple(_OF_ROW)


def call_of(subject: str, figures: Figures) -> Call:
    """Return the call that a benchmark's row measured.

    Raises NotDescribed where the model has no description of it.
    """
    if subject not in _OF_ROW:
        raise NotDescribed(f"{subject}, described are {', '.join(_OF_ROW)}")
    return _OF_ROW[subject](figures)


# ---- Shown ---------------------------------------------------------------------------------------


def shown_calls() -> list[Call]:
    """Return what `m3i-fast bench roofline` predicts: both passes of the calls of interest."""
    half: dict[str, Any] = {"dtype": "bfloat16"}
    found = []
    for shape, offset in (
        ((64, 56, 56, 128, 8), 1.5),
        ((64, 56, 56, 128, 4), 1.5),
        ((64, 56, 56, 64, 4), 1.5),
        ((64, 14, 14, 256, 16), 1.5),
    ):
        names = ("batch_size", "height", "width", "channels", "groups")
        sizes = dict(zip(names, shape, strict=True)) | half | {"offset_px": offset}
        found += [_dcnv3({**sizes, "pass": done}) for done in ("forward", "forward+backward")]
    pairs = {"kind": "speed", "form": "softmax", "rows": 32768, "columns": 32768, **half}
    classes = {"kind": "speed", "form": "classes", "rows": 16384, "columns": 21841, **half}
    for sizes in ({**pairs, "dim": 512}, {**pairs, "dim": 1024}, {**classes, "dim": 1024}):
        found += [_boltzmann({**sizes, "pass": done}) for done in ("forward", "forward+backward")]
    rows = {"batch_size": 128, "queries": 196, "width": 768, "decorrelation_weight": 0.0, **half}
    found += [_gaussian({**rows, "pass": done}) for done in ("forward", "forward+backward")]
    found.append(_mask_mix({"batch_size": 512, "image_size": 224, "patch_size": 16, **half}))
    views: dict[str, Any] = {"picture": "375 x 500", "views": "2 x 224 + 8 x 96", "batch_size": 128}
    return [*found, _views(views)]
