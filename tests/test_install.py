"""What `make install` decides, from the CUDA version of a driver to packages of one CUDA major."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import install


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
    assert checkout[1:] == ["rebuild", "rebuild"]
    (install.ROOT / "pyproject.toml").write_text("changed = true")
    install.bring_up_to_date(cpu)
    assert checkout[3:] == ["packages"]
    install.bring_up_to_date(install.plan_for((12, 8)))
    assert checkout[4:] == ["fresh"], "another torch needs a new .venv"


def test_a_failed_step_is_repeated(checkout: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = install.plan_for(None)
    install.bring_up_to_date(cpu)
    (install.ROOT / "CMakeLists.txt").write_text("changed")
    with monkeypatch.context() as broken, pytest.raises(SystemExit):
        broken.setattr(install, "install_package", lambda plan, *arguments: exit(1))
        install.bring_up_to_date(cpu)
    install.bring_up_to_date(cpu)
    assert checkout == ["fresh", "rebuild"]
