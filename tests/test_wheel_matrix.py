"""What a wheel's symbols say of the Linux that it needs."""

from __future__ import annotations

import pytest

from scripts.wheel_matrix import PLATFORM, is_old_enough


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        *[(PLATFORM, True), ("manylinux_2_17_x86_64", True), ("manylinux_2_5_i686", True)],
        *[("manylinux_2_28_aarch64", True), ("manylinux_2_29_x86_64", False)],
        *[("manylinux_2_34_aarch64", False), ("manylinux_3_1_x86_64", False)],
        *[("linux_x86_64", False), ("linux_aarch64", False), ("musllinux_1_2_x86_64", False)],
    ],
)
def test_what_is_no_old_manylinux_is_too_new(tag: str, expected: bool) -> None:
    assert is_old_enough(tag) == expected
