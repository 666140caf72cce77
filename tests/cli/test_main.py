"""What m3i-fast says before any verb, and how much of the package that takes."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from m3i_fast.cli import VERBS, main
from m3i_fast.cli.train import tell_whole_batch
from m3i_fast.config import TrainConfig
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.loader import Loader
from m3i_fast.recipes import RECIPES


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"m3i-fast {version('m3i-fast')}\n"


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_load_no_torch(flag: str) -> None:
    code = (
        "import sys; from m3i_fast.cli import main; "
        f"code = main([{flag!r}]); sys.exit(code or ('torch' in sys.modules) * 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if flag == "--help":
        assert all(f"  {verb} " in done.stdout for verb in VERBS)


HERE = "expected a path of this machine"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demo", "--num-steps", "0"], "num_steps: expected"),
        (["demo", "--seconds", "0"], "seconds: expected > 0, got 0"),
        (["evaluate", "timm:vit_tiny_patch16_224"], "MODEL: no run in timm:vit_tiny_patch16_224"),
        (["evaluate", "pixels", "--data", "none"], "--data: expected a file or folder, got none"),
        # A Path takes s3://bucket/run for ./s3:/bucket/run, which is lost with the machine.
        (["evaluate", "pixels", "--data", "s3://bucket/set"], f"--data: {HERE}"),
        (["train", "demo", "--out", "s3://bucket/run"], f"--out: {HERE}"),
        (["profile", "demo", "--out", "gs://bucket/profile"], f"--out: {HERE}"),
        (["demo", "--out", "s3://bucket/run"], f"--out: {HERE}"),
        (["evaluate", "pixels", "--data", ".", "--out", "s3://bucket/found"], f"--out: {HERE}"),
        (["export", "runs/demo", "s3://bucket/model", "--to", "timm"], f"OUT: {HERE}"),
        (["data", "synthetic", "s3://bucket/data", "--num-samples", "2"], f"OUT: {HERE}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_names_the_flag_and_writes_nothing(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


NO_RUN = [
    ["train", "--resume", "absent"],
    ["train", "demo", "--out", "absent", "--resume"],
    ["train", "demo", "--init", "run:absent"],
    ["evaluate", "absent"],
    ["report", "absent"],
    ["search", "absent", "--data", "{dataset}", "--port", "0"],
    ["export", "absent", "out", "--to", "safetensors"],
    *(["checkpoint", *words] for words in (["ls", "absent"], ["verify", "absent"])),
    ["checkpoint", "consolidate", "absent", "out.safetensors"],
]


@pytest.mark.parametrize("argv", NO_RUN, ids=" ".join)
def test_all_verbs_say_alike_that_there_is_no_run(
    argv: list[str],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--init" in argv:
        argv = [*argv, "--data.path", "{dataset}", "--device", "cpu"]
    assert main([word.format(dataset=dataset) for word in argv]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no run in absent: expected a folder that m3i-fast train --out has written" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("out", ["file", "file/inside", "/proc/none"])
@pytest.mark.parametrize(
    "argv",
    [["train", "demo"], ["demo"], ["profile", "demo"], ["evaluate", "pixels", "--data", "."]],
)
def test_a_folder_that_cannot_be_made_is_refused_first(
    argv: list[str],
    out: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before data or a model: neither is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("years of work")
    assert main([*argv, "--out", out]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"error: --out: expected a folder that can be written, got {out} (" in said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["years of work"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["export", "a", "b", "--to", "onxx"], "--to: expected one of timm, .* Did you mean onnx"),
        (
            ["search", "a", "--data", "b", "--which=emma"],
            "--which: .* got 'emma'. Did you mean ema",
        ),
        (["report", "a", "--device", "gpu"], "--device: expected one of cpu, cuda, got 'gpu'"),
        (["evaluate", "a", "--data", "b", "--dtype", "bf16"], "--dtype: .* mean bfloat16"),
    ],
)
def test_a_misspelt_choice_gets_the_nearest_one(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


COMMANDS = Path(__file__).parents[2] / "docs" / "reference" / "commands.md"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("ex", "export"),
        ("export --la", "--layout"),
        ("train demo --optim.lr-", "--optim.lr-decay --optim.lr-decay-fraction"),
    ],
)
def test_the_completion_that_is_documented_completes(words: str, completed: str) -> None:
    [script] = re.findall(r"```bash\n(.*?)```", COMMANDS.read_text(), re.DOTALL)
    typed = f"COMP_WORDS=(m3i-fast {words}); COMP_CWORD={len(words.split())}; COMPREPLY=()"
    program = f'm3i-fast() {{ {sys.executable} -m m3i_fast.cli "$@"; }}\n{script}\n{typed}\n'
    program += '_m3i_fast; echo "${COMPREPLY[*]}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == completed, done.stderr


def test_a_run_in_another_batch_than_the_recipes_says_what_to_add(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = RECIPES["vit_ti"]()  # for 384 pictures a step
    loader = Loader(replace(recipe.data, path=dataset, batch_size=16))
    eight = SimpleNamespace(loader=loader, world=World(torch.device("cpu"), 0, 8), step=0)

    def told(cfg: TrainConfig, step: int = 0) -> list[str]:
        caplog.clear()
        eight.step = step
        with caplog.at_level("INFO"):
            tell_whole_batch("vit_ti", cfg, cast(Trainer, eight))
        return [record.getMessage() for record in caplog.records]

    cfg = replace(recipe, data=replace(recipe.data, batch_size=16))
    epochs = 50_000 * 128 / loader.num_rows
    pace, advice = told(cfg)
    assert pace.startswith("a step takes 128 pictures (8 ranks x 16); 50,000 steps are ")
    assert float(pace.split(" steps are ")[1].split(" epochs")[0]) == pytest.approx(epochs, 1e-2)
    assert advice == (
        "recipe vit_ti is for 384 pictures a step, not 128: add --num-steps 150000 for as many "
        "epochs, and --optim.lr 3.13e-05 (linear in the batch) or 5.41e-05 (in its root)"
    )
    assert len(told(cfg, step=1)) == 1  # it goes on
    chosen = replace(cfg, num_steps=10, optim=replace(cfg.optim, lr=1e-4))
    assert len(told(chosen)) == 1
    whole = replace(recipe, data=replace(recipe.data, batch_size=48))
    assert len(told(whole)) == 1
    loader.close()


@pytest.mark.parametrize("words", [[], ["train"], ["launch"], ["plan"], ["profile"], ["bench"]])
def test_help_that_was_asked_for_can_be_piped(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main([*words, "--help"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("usage: m3i-fast") and told.err == ""
    assert main(words) == 2
    without = capsys.readouterr()
    assert without.out == "" and without.err == told.out


def test_what_a_verb_does_is_told_beside_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    main(["--help"])
    _, *lines = capsys.readouterr().out.strip().split("\n\n")[1].splitlines()
    assert all(len(line) <= 60 for line in lines)
    assert all(line[:14].isspace() or line[2:14].split()[0] in VERBS for line in lines)
