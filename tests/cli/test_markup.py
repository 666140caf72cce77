"""Paths, names and errors that hold what rich takes for markup are shown as they are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from m3i_fast.benchmarks.faults.failing_files import truncate
from m3i_fast.cli import VERBS, main
from m3i_fast.terminal import make_console
from tests.shared.engine.checkpoint_cases import save
from tests.shared.engine.small_run import small_run
from tests.shared.source_files import FILES

HOSTILE = "x[/b][bold]:bug:[green"  # a folder "x[", and in it a name
REFUSED = [
    ["{}"],
    ["train", "{}"],
    ["train", "--config", "{}"],
    ["train", "demo", "--resume", "--out", "{}"],
    ["train", "demo", "--out", "{}", "--data.path", "{}"],
    ["profile", "{}"],
    ["profile", "--config", "{}"],
    ["profile", "diff", "{}", "{}"],
    ["plan", "{}"],
    ["plan", "--config", "{}"],
    ["plan", "demo", "--card", "{}"],
    ["methods", "{}"],
    ["recipes", "{}"],
    ["evaluate", "{}"],
    ["report", "{}"],
    ["search", "{}", "--data", "{}"],
    ["export", "{}", "{}", "--to", "timm"],
    ["checkpoint", "ls", "{}"],
    ["checkpoint", "verify", "{}"],
    ["checkpoint", "consolidate", "{}", "{}"],
    ["data", "index", "{}"],
    ["data", "stats", "{}"],
    ["data", "verify", "{}"],
    ["launch", "--retry-code", "{}"],
    ["bench", "{}"],
    ["bench", "node", "--config", "{}"],
    ["faults", "--kills", "{}"],
]
UNKNOWN_FLAG = [
    "train demo",
    "profile demo",
    "plan demo",
    "evaluate run",
    "demo",
    "doctor",
    "faults",
]


def _say(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and what was said, without the spaces that wrapping changes."""
    try:
        code = main(list(map(str, arguments)))
    except SystemExit as ended:  # tyro's
        code = int(ended.code or 0)
    captured = capsys.readouterr()
    return code, "".join((captured.out + captured.err).split())


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_wrong_name_is_refused_with_its_letters(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = _say(capsys, *(part.format(HOSTILE) for part in arguments))
    assert code == 2 and HOSTILE in said


@pytest.mark.parametrize("verb", UNKNOWN_FLAG)
def test_an_unknown_flag_is_refused_with_its_letters(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = _say(capsys, *verb.split(), f"--{HOSTILE}")
    assert code == 2 and HOSTILE in said.replace("│", "")


def test_a_run_of_such_a_name_is_saved_and_goes_on(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / f"{HOSTILE}.json", tmp_path / HOSTILE
    config.parent.mkdir()
    small_run(dataset, num_steps=3, log_every=1).save(config)
    asked = ["train", "--config", config, "--out", out]
    code, said = _say(capsys, *asked, "--max-hours", "1e-9")
    assert code == 75 and f"tocontinue{out}" in said
    code, said = _say(capsys, *asked)
    assert code == 2 and f"{out}holdsarunalready" in said
    assert _say(capsys, *asked, "--auto-resume")[0] == 0
    for verb in ("ls", "verify"):
        assert _say(capsys, "checkpoint", verb, out)[0] == 0


def test_a_checkpoint_of_such_a_name_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = save(tmp_path / HOSTILE, 1)
    out = tmp_path / f"{HOSTILE}.safetensors"
    code, said = _say(capsys, "checkpoint", "consolidate", tmp_path / HOSTILE, out)
    assert code == 0 and str(out) in said and str(saved.path) in said
    assert f"{out}existsalready" in _say(capsys, "checkpoint", "consolidate", saved.path, out)[1]
    stray = Path(HOSTILE).name
    (saved.path / "model" / stray).touch()
    for verb, code in (("ls", 0), ("verify", 1)):
        assert _say(capsys, "checkpoint", verb, tmp_path / HOSTILE)[0] == code
    assert f"model/{stray}:expectednothing" in _say(capsys, "checkpoint", "verify", saved.path)[1]
    truncate(saved.path / "manifest.json")
    assert "manifest.json:damaged" in _say(capsys, "checkpoint", "ls", tmp_path / HOSTILE)[1]


def test_what_is_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / HOSTILE
    code, said = _say(capsys, "data", "synthetic", out, "--num-samples", "4")
    assert code == 0 and f"wrote{out}" in said
    assert f"{out}:good" in _say(capsys, "data", "verify", out)[1]
    page = tmp_path / f"{HOSTILE}.txt"
    code, said = _say(capsys, "bench", "page", "--mllog", page)
    assert code == 0 and f"written:{page}" in said


def test_every_verb_is_walked() -> None:
    walked = {arguments[0] for arguments in REFUSED} | {verb.split()[0] for verb in UNKNOWN_FLAG}
    assert walked >= set(VERBS)


def test_all_that_is_printed_goes_through_such_consoles(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print(f"[b]{HOSTILE}[/b]")
    assert capsys.readouterr().out == f"[b]{HOSTILE}[/b]\n"
    for file, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "rich.markup", f"{file}: escapes, where nothing is read"
            elif isinstance(node, ast.Call):
                name, options = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
                # A data set is packed without the rest of the package, and prints bars alone.
                if name == "Console" and file not in (
                    "m3i_fast/terminal.py",
                    "pipelines/dataset/pack.py",
                ):
                    pytest.fail(f"{file}:{node.lineno}: expected make_console")
                if name == "TextColumn":
                    assert ast.unparse(options["markup"]) == "False", f"{file}:{node.lineno}"
