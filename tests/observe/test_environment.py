"""The command of a run is one that a shell reads back."""

import shlex

import pytest

from m3i_fast.observe.environment import environment


def test_the_command_is_read_back_by_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "demo", "--out", "runs/o'neill", "--data.path", 'my "own" data']
    monkeypatch.setattr("sys.argv", ["/anywhere/m3i-fast", *words])
    assert shlex.split(environment().command) == ["m3i-fast", *words]
