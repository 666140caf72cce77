"""The draws of a view in plain Python, from Philox-4x32-10 on."""

from __future__ import annotations

import math

import numpy as np

from m3i_fast.ops.views import VIEW_PARAMS, ViewSpec

_WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Ten rounds, on Python's whole numbers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def draw(
    spec: ViewSpec, height: int, width: int, seed: int, position: int, view: int
) -> list[float]:
    """A row of draw_views, by its docstring and torchvision's make_params."""
    numbers = list(spec.distribution)
    scale, ratio, numbers = numbers[:2], numbers[2:4], numbers[4:]
    flip, jitter, brightness, contrast, saturation, hue, gray, blur, low, high, solarize = numbers
    seed &= 2**64 - 1

    def block(number: int) -> tuple[int, ...]:
        counter = (position & _WORD, position >> 32, view, number)
        return philox(counter, (seed & _WORD, seed >> 32))

    def uniform(word: int, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * (word >> 8) / 2**24

    params = dict.fromkeys(VIEW_PARAMS, 0.0)
    params |= {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
    coins, factors, order = block(0), block(1), block(2)
    params["flip"] = uniform(coins[0]) < flip
    if uniform(coins[1]) < jitter:
        params["brightness"] = uniform(factors[0], 1 - brightness, 1 + brightness)
        params["contrast"] = uniform(factors[1], 1 - contrast, 1 + contrast)
        params["saturation"] = uniform(factors[2], 1 - saturation, 1 + saturation)
        params["hue"] = uniform(factors[3], -hue, hue)
        params["order"] = order[0] * 24 >> 32
    params["gray"] = uniform(coins[2]) < gray
    params["sigma"] = uniform(order[1], low, high) if uniform(coins[3]) < blur else 0.0
    params["solarize"] = uniform(order[2]) < solarize
    for attempt in range(10):
        words = block(3 + attempt)
        area = height * width * uniform(words[0], *scale)
        aspect = math.exp(uniform(words[1], math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            y, x = words[2] * (height - h + 1) >> 32, words[3] * (width - w + 1) >> 32
            break
    else:
        w, h = width, height
        if width / height < ratio[0]:
            h = round(w / ratio[0])
        elif width / height > ratio[1]:
            w = round(h * ratio[1])
        y, x = (height - h) // 2, (width - w) // 2
    params |= {"y": y, "x": x, "height": h, "width": w}
    return np.array([params[name] for name in VIEW_PARAMS], dtype=np.float32).tolist()
