"""What `make install` decides, from the CUDA version of a driver to packages of one CUDA major."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import install

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("driver", "major", "data"),
    [
        (None, 13, "data"),
        ((12, 0), 12, "data-cu12"),
        ((12, 9), 12, "data-cu12"),
        ((13, 0), 13, "data"),
        ((14, 1), 13, "data"),
    ],
)
def test_everything_is_of_the_drivers_cuda_major(
    driver: tuple[int, int] | None, major: int, data: str
) -> None:
    plan = install.plan_for(driver)
    assert plan.cuda_major == major
    assert plan.build_cuda == (driver is not None)
    assert data in plan.extras
    # PyPI's torch 2.10 is a CUDA 12 build, 2.11 and newer are CUDA 13 builds.
    torch = Requirement(plan.torch).specifier
    assert ("2.10.0" in torch) == (major == 12 or driver is None)
    assert ("2.13.0" in torch) == (major == 13)
    assert set(plan.extras) <= set(metadata("m3i-fast").get_all("Provides-Extra") or [])


@pytest.mark.parametrize("extras", [(), ("data", "dev"), ("data-cu12", "fp8", "eval")])
def test_requirements_are_those_of_the_package(extras: tuple[str, ...]) -> None:
    """As packaging reads them from what the build wrote."""

    def wanted(chosen: tuple[str, ...]) -> Iterator[Requirement]:
        for row in metadata("m3i-fast").get_all("Requires-Dist") or []:
            found, marker = Requirement(row), Requirement(row).marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *chosen)):
                continue
            if found.name == "m3i-fast":
                yield from (row for row in wanted(tuple(found.extras)) if row.marker)
            else:
                yield found

    def named(rows: Iterable[Requirement]) -> set[tuple[str, ...]]:
        return {(row.name, *sorted(row.extras), str(row.specifier)) for row in rows}

    here = (row for text in install.requirements(extras) if (row := Requirement(text)))
    assert named(row for row in here if not row.marker or row.marker.evaluate()) == named(
        wanted(extras)
    )


def test_a_driver_too_old_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected CUDA 12 or newer, got 11\.8"):
        install.plan_for((11, 8))


def test_environment_overrules_the_build_of_cuda_kernels() -> None:
    plan = install.plan_for(None)
    assert install.overruled(plan, "ON").build_cuda
    assert not install.overruled(install.plan_for((13, 0)), "OFF").build_cuda
    assert install.overruled(plan, "") == install.overruled(plan, "AUTO") == plan
    with pytest.raises(ValueError, match="M3I_CUDA: expected AUTO, ON or OFF, got 'yes'"):
        install.overruled(plan, "yes")


def test_compiler_follows_torch() -> None:
    assert Requirement(install.nvcc_requirement("13.2")).specifier.contains("13.2.2")
    assert not Requirement(install.nvcc_requirement("13.2")).specifier.contains("13.0.3")
    assert Requirement(install.nvcc_requirement(None)).specifier.contains(
        f"{install.TESTED_CUDA}.3"
    )


def test_nvcc_major() -> None:
    assert (
        install.nvcc_major("nvcc: NVIDIA (R)\nCuda compilation tools, release 12.8, V12.8.93") == 12
    )
    assert install.nvcc_major("nvcc: command not found") == 0
    if nvcc := shutil.which("nvcc"):
        shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        assert install.nvcc_major(shown) >= 12


def test_toolkit_gets_the_names_that_nvcc_looks_for(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart.so.13").write_text("runtime")
    for _ in range(2):
        install.complete_toolkit(tmp_path)
    assert (tmp_path / "lib64" / "libcudart.so").read_text() == "runtime"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A checkout in which an installation only writes down what it was asked to do."""
    steps: list[str] = []
    for name, content in {
        "pyproject.toml": "",
        "constraints.txt": "",
        "CMakeLists.txt": "",
    }.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "cuda" / "op").mkdir(parents=True)
    (tmp_path / "cuda" / "op" / "op.cu").write_text("")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "install.py").write_text("")

    def everything(plan: install.Plan) -> None:
        fresh = not install.VENV.exists()
        install.VENV.mkdir(exist_ok=True)
        steps.append("fresh" if fresh else "packages")

    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "STAMP", tmp_path / ".venv" / "installed.json")
    monkeypatch.setattr(install, "__file__", str(tmp_path / "scripts" / "install.py"))
    monkeypatch.setattr(install, "install_everything", everything)
    monkeypatch.setattr(
        install, "install_package", lambda plan, *arguments: steps.append("rebuild")
    )
    return steps


def test_only_what_changed_is_redone(checkout: list[str]) -> None:
    cpu = install.plan_for(None)
    install.bring_up_to_date(cpu)
    install.bring_up_to_date(cpu)
    assert checkout == ["fresh"]
    (install.ROOT / "cuda" / "op" / "op.cu").write_text("// changed")
    install.bring_up_to_date(cpu)
    (install.ROOT / "cuda" / "op" / "new.cuh").write_text("")
    install.bring_up_to_date(cpu)
    for apart in ("emulator", "null"):  # compiled by what runs them
        (install.ROOT / "cuda" / apart).mkdir()
        (install.ROOT / "cuda" / apart / "runtime.cpp").write_text("")
        install.bring_up_to_date(cpu)
    module = install.ROOT / "pipelines" / "sources" / "new.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    install.bring_up_to_date(cpu)
    module.write_text("changed = True")
    install.bring_up_to_date(cpu)
    assert checkout[1:] == ["rebuild", "rebuild", "rebuild"]
    (install.ROOT / "pyproject.toml").write_text("changed = true")
    install.bring_up_to_date(cpu)
    assert checkout[4:] == ["packages"]
    install.bring_up_to_date(install.plan_for((12, 8)))
    assert checkout[5:] == ["fresh"], "another torch needs a new .venv"


def test_an_environment_is_made_anew_by_its_own_python(tmp_path: Path) -> None:
    """It is removed first, as where another torch is wanted."""
    made = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    anew = (
        f"import shutil, sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        f"from scripts import install; there = Path({str(made)!r})\n"
        "assert Path(sys.executable).is_relative_to(there)\n"
        "shutil.rmtree(there); install.make_environment(there)"
    )
    subprocess.run([made / "bin" / "python", "-c", anew], check=True)
    assert (made / "bin" / "python").exists()


def test_a_failed_step_is_repeated(checkout: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = install.plan_for(None)
    install.bring_up_to_date(cpu)
    (install.ROOT / "CMakeLists.txt").write_text("changed")
    with monkeypatch.context() as broken, pytest.raises(SystemExit):
        broken.setattr(install, "install_package", lambda plan, *arguments: exit(1))
        install.bring_up_to_date(cpu)
    install.bring_up_to_date(cpu)
    assert checkout == ["fresh", "rebuild"]


@pytest.mark.parametrize("source", ["int one() { return 1; }", "int one() { return unknown; }"])
def test_the_progress_of_the_compiler_is_shown(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By pip, scikit-build-core and ninja, on a package of two objects."""
    backend = 'requires = []\nbuild-backend = "scikit_build_core.build"'
    for name, text in {
        "constraints.txt": "",
        "pyproject.toml": f'[build-system]\n{backend}\n[project]\nname="small"\nversion="1"\n',
        "CMakeLists.txt": "cmake_minimum_required(VERSION 3.26)\nproject(small LANGUAGES CXX)\n"
        "add_library(small OBJECT one.cpp two.cpp)\n",
        "one.cpp": source,
        "two.cpp": "int two() { return 2; }",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "PYTHON", Path(sys.executable))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # restored, after the install has changed it
    wanted = ("--no-deps", "--target", str(tmp_path / "site"), str(tmp_path))
    if "unknown" in source:
        with pytest.raises(SystemExit):
            install.install_package(install.plan_for(None), *wanted)
        assert re.search("error: .unknown. was not declared", capfd.readouterr().out)
    else:
        install.install_package(install.plan_for(None), *wanted)
        shown = r"  1 of 2 objects, \d+ s\n  2 of 2 objects, \d+ s\n  \d+ s\n"
        assert re.search(shown, capfd.readouterr().out)


# ---- One resolution ------------------------------------------------------------------------------

NVCC = "nvidia/cu13/bin/nvcc"


def add_wheel(folder: Path, name: str, version: str, files: dict[str, str], *wants: str) -> None:
    """A wheel of these files that requires these packages."""
    stem = name.replace("-", "_")
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    about += "".join(f"Provides-Extra: {e}\n" for e in ("nvcc", "nvrtc", "cudart", "cccl"))
    about += "".join(f"Requires-Dist: {want}\n" for want in wants)
    info = f"{stem}-{version}.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents = {**files, f"{info}/METADATA": about, f"{info}/WHEEL": tags, f"{info}/RECORD": ""}
    with zipfile.ZipFile(folder / f"{stem}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in contents.items():
            member = zipfile.ZipInfo(path)
            member.external_attr = 0o100755 << 16
            wheel.writestr(member, text)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that pip installs from, into a venv of its own.

    The newest torch has no torchvision yet, as in the days after a release. torch names its CUDA in
    the version that it says, and not in that of its package, as PyPI's builds do.
    """
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version, cuda in (("2.14.0", "13.0"), ("2.15.0", "13.2")):
        said = f"{version}+cu{cuda.replace('.', '')}"
        text = f"from types import SimpleNamespace\n__version__ = {said!r}\n"
        text += f"version = SimpleNamespace(cuda={cuda!r})\n"
        add_wheel(wheels, "torch", version, {"torch/__init__.py": text})
        shown = f"#!/bin/sh\necho release {cuda}, V{cuda}\n"
        toolkit = {NVCC: shown, "nvidia/cu13/lib/libcudart.so.13": ""}
        add_wheel(wheels, "cuda-toolkit", f"{cuda}.1", toolkit)
    add_wheel(wheels, "torchvision", "0.29.0", {}, "torch==2.14.0")
    add_wheel(wheels, "open_clip_torch", "3.3.0", {}, "torch>=2.0", "torchvision")
    add_wheel(wheels, "extras", "1.0", {}, "open_clip_torch")
    for name in install.BUILD_WITH:
        add_wheel(wheels, name, "1.0", {})
    for name in ("nvidia-cuda-nvdisasm", "nvidia-cuda-cuobjdump"):
        add_wheel(wheels, name, "13.5", {})
    add_wheel(wheels, "nvidia-dali-cuda130", "2.4.0", {})
    (tmp_path / "constraints.txt").write_text("")

    def make_venv(*command: str | Path, compiles: bool = False) -> None:
        if "venv" not in command:
            real_run(*command, compiles=compiles)
            return
        venv.create(install.VENV)
        (site,) = install.VENV.glob("lib/python*/site-packages")
        # A venv with pip takes ten seconds; imported here, it would keep setuptools from distutils.
        (site / "pip").symlink_to(Path(str(distribution("pip").locate_file("pip"))))

    real_run = install.run
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(install, "run", make_venv)
    monkeypatch.setattr(install, "requirements", lambda _: ["extras", "nvidia-dali-cuda130"])
    monkeypatch.setattr(install, "install_package", lambda *_: None)
    return wheels


def test_torch_is_chosen_once_with_what_wants_it(index: Path) -> None:
    """pip itself resolves: the extras move no torch that nvcc was chosen by."""
    install.install_everything(install.plan_for((13, 2)))
    assert install.installed_torch() == ("2.14.0", "13.0")
    shown = subprocess.check_output([install.VENV / "bin" / "nvcc", "--version"], text=True)
    assert shown == "release 13.0, V13.0\n"


def test_a_torch_of_another_cuda_is_named(index: Path) -> None:
    text = "from types import SimpleNamespace\n__version__ = '2.14.0'\n"
    text += "version = SimpleNamespace(cuda='12.8')\n"
    add_wheel(index, "torch", "2.14.0", {"torch/__init__.py": text})
    with pytest.raises(
        SystemExit, match=r"expected 2\.14\.0 of CUDA 13, .* 2\.14\.0 of CUDA 12\.8"
    ):
        install.install_everything(install.plan_for((13, 2)))


def test_extras_that_want_another_torch_are_named_by_pip(
    index: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add_wheel(index, "newest", "1.0", {}, "torch==2.15.0")
    monkeypatch.setattr(install, "requirements", lambda _: ["newest"])
    with pytest.raises(SystemExit):
        install.install_everything(install.plan_for((13, 2)))
    assert "Cannot install newest==1.0 and torch==2.14.0" in capfd.readouterr().err
