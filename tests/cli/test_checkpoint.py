"""m3i-fast checkpoint: what it shows, and its exit codes."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from m3i_fast.benchmarks.faults.failing_files import flip_byte, truncate
from m3i_fast.cli import main
from m3i_fast.engine.checkpoint.saver import Saver
from tests.shared.engine.checkpoint_cases import assert_equal, save, trained

OLD = Path(__file__).parents[1] / "engine" / "checkpoint" / "old_checkpoint"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        save(tmp_path / "run" / "checkpoints", step, keep=3)
    return tmp_path / "run"


def _say(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["checkpoint", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


def test_a_run_is_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_byte(run / "checkpoints" / "step_00000002" / "model" / "00001-of-00001.safetensors")
    (run / "checkpoints" / "step_00000001" / "manifest.json").unlink()
    code, said = _say(capsys, "ls", run)
    assert code == 0 and "3 20" in said and said.endswith("latest")
    assert "manifest.json: missing" in said and "SHA" not in said  # not read
    assert _say(capsys, "ls", run / "checkpoints")[1] == said
    assert "layout without a manifest" in _say(capsys, "ls", OLD)[1]


def test_the_best_checkpoint_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run" / "checkpoints"
    for step, score in ((1, -0.25), (2, -0.75), (3, -0.5)):
        model, optimizer = trained(step)
        with Saver(directory, keep=3) as saver:
            state = {"log": {"score": score}}
            saver.save(step=step, model=model, optimizer=optimizer, state=state)
    assert "best" not in _say(capsys, "ls", directory)[1]
    (tmp_path / "run" / "config.json").write_text('{"keep_best": "+evaluate/knn_top1"}')
    code, said = _say(capsys, "ls", tmp_path / "run")
    assert code == 0 and said.count("best") == 1 and said.endswith("latest")
    assert re.search(r" 2 20\d\d-[-0-9: .]* best by evaluate/knn_top1: 0\.75 3 20\d\d-", said)


def test_verify_says_what_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = _say(capsys, "verify", run)
    assert code == 0 and said.count("good") == 3
    file = "model/00001-of-00001.safetensors"
    truncate(run / "checkpoints" / "step_00000002" / file)
    code, said = _say(capsys, "verify", run)
    assert code == 1 and said.count("good") == 2 and f"2 {file}: damaged" in said
    assert _say(capsys, "verify", run / "checkpoints" / "step_00000002")[0] == 1
    assert _say(capsys, "verify", run / "checkpoints" / "step_00000003")[0] == 0
    assert _say(capsys, "verify", OLD)[0] == 0


def test_consolidate_writes_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "model.safetensors"
    flip_byte(run / "checkpoints" / "step_00000003" / "state" / "00001-of-00001.json")
    code, said = _say(capsys, "consolidate", run, out)
    assert code == 0 and "step_00000002" in said
    assert_equal(load_file(out), trained(2)[0].state_dict())
    assert _say(capsys, "consolidate", run, out) == (
        2,
        f"error: {out} exists already: name another file",
    )
    newest = run / "checkpoints" / "step_00000003"
    code, said = _say(capsys, "consolidate", newest, run / "b.safetensors")
    assert code == 2 and "SHA-256" in said and not (run / "b.safetensors").exists()
    assert _say(capsys, "consolidate", run, run / "model.bin")[0] == 2


def test_what_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ls", "verify"):
        code, said = _say(capsys, command, tmp_path / "absent")
        assert code == 2 and "no run in" in said
        code, said = _say(capsys, command, tmp_path)
        assert code == 2 and "no run in" in said
    (tmp_path / "config.json").touch()
    code, said = _say(capsys, "ls", tmp_path)
    assert code == 2 and "no checkpoint in" in said
    with pytest.raises(SystemExit) as refused:
        main(["checkpoint", "list"])
    assert refused.value.code == 2
