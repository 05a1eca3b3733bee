"""What `pip install` makes: a package that works without a compiler, says what is missing, and refuses what it cannot build."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import sage_kernels

ROOT = Path(__file__).resolve().parent.parent
MADE = ("build", "dist", "*.egg-info", "*.so", "_build_info.json", "__pycache__", "*out")
LEFT_OUT = shutil.ignore_patterns(".*", *MADE, "tests", "weights")
COMMAND = "pip install --no-build-isolation --force-reinstall --no-deps ."


@pytest.fixture
def tree(tmp_path):
    """A fresh copy of the source tree."""
    copy = tmp_path / "tree"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    return copy


def build(tree, mode, **variables):
    """`setup.py bdist_wheel` with SAGE_BUILD=mode."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"SAGE_BUILD": mode} | variables
    command = [sys.executable, "setup.py", "bdist_wheel"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def the_wheel(folder):
    (wheel,) = folder.glob("*.whl")
    return wheel


def record(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("sage_kernels/_build_info.json")), archive.namelist()


def use(site):
    """Import the installed package away from any source tree and take a step; what it prints and warns."""
    code = """
import sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]  # of a development install
import torch, sage_kernels
from sage_kernels import backends, grouping
from sage_kernels.testing import random_case
print(sage_kernels.__file__)
print(backends.available()["cpu"])
print(grouping.refusal)
positional, keyword = random_case(torch.Generator().manual_seed(0), 3, 4, (20,))
sage_kernels.branch_step(*positional, **keyword)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", code], cwd=site, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    file, refusal, core = run.stdout.strip().split("\n")
    assert Path(file).is_relative_to(site) and core == refusal
    return refusal, run.stderr


def test_pure_python_package_by_pip_works_and_names_the_mending_command(tree, tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target", site, tree]
    run = subprocess.run(command, env=os.environ | {"SAGE_BUILD": "none"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not list(site.rglob("_C*.so"))
    refusal, said = use(site)
    assert refusal == "SAGE_BUILD=none was asked for"
    assert said.count("RuntimeWarning") == 1 and refusal in said and COMMAND in said


def test_auto_without_a_compiler_is_pure_python_and_keeps_the_reason(tree):
    run = build(tree, "auto", CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr
    wheel = the_wheel(tree / "dist")
    facts, names = record(wheel)
    assert wheel.name.endswith("-py3-none-any.whl") and not [n for n in names if n.endswith(".so")]
    assert facts["native"] == [] and facts["reason"] == "there is no C++ compiler ('no-such-compiler' is not on PATH)"
    assert facts["mend"] == f"apt install g++ && {COMMAND}"
    assert facts["reason"] in run.stderr and facts["mend"] in run.stderr
    assert "sage_kernels/coefficients/table.py" in names and "sage/cli.py" in names


def test_auto_with_a_failing_compilation_is_pure_python_and_keeps_the_reason(tree):
    (tree / "csrc" / "ops.cpp").write_text("#error broken on purpose\n")
    (tree / "csrc" / "cpu" / "kernels_cpu.cpp").write_text("\n")
    run = build(tree, "auto")
    assert run.returncode == 0, run.stderr
    facts, names = record(the_wheel(tree / "dist"))
    assert facts["native"] == [] and facts["reason"].startswith("compiling failed")
    assert facts["mend"] == f"SAGE_BUILD=cpu pip install -v{COMMAND.removeprefix('pip install')}"
    assert not [n for n in names if n.endswith(".so")]


def test_auto_with_a_failing_grouping_core_keeps_the_kernels(tree):
    (tree / "csrc" / "grouping" / "module.cpp").write_text("#error broken on purpose\n")
    run = build(tree, "auto")
    assert run.returncode == 0, run.stderr
    facts, names = record(the_wheel(tree / "dist"))
    assert facts["native"][:1] == ["cpu"] and "grouping" not in facts["native"] and facts["reason"] is None
    assert facts["grouping_reason"].startswith("compiling it failed") and "no grouping core" in run.stderr
    assert [n for n in names if n.endswith(".so")] == ["sage_kernels/_C.abi3.so"]
    assert build(tree, "cpu").returncode != 0


def test_auto_with_a_compiler_that_does_not_run_is_pure_python(tree):
    run = build(tree, "auto", CXX="false")
    assert run.returncode == 0, run.stderr
    facts, _ = record(the_wheel(tree / "dist"))
    assert facts["native"] == [] and facts["compiler"] is None
    assert facts["reason"] == "the C++ compiler does not run ('false' --version: exit status 1)"
    assert facts["mend"] == f"apt install g++ && CXX=g++ {COMMAND}"


def test_auto_on_another_platform_is_pure_python(tree):
    run = build(tree, "auto", _PYTHON_HOST_PLATFORM="linux-aarch64")
    assert run.returncode == 0, run.stderr
    facts, _ = record(the_wheel(tree / "dist"))
    assert facts["native"] == [] and facts["mend"] == f"SAGE_BUILD=cpu {COMMAND}"
    assert facts["reason"] == "SAGE_BUILD=auto builds native kernels on linux-x86_64 only, and this is linux-aarch64"


@pytest.mark.parametrize(
    ("mode", "variables", "message"),
    [
        ("cpu", {"CXX": "no-such-compiler"}, "there is no C++ compiler ('no-such-compiler' is not on PATH). To mend it: apt install g++"),
        ("cuda", {"CUDACXX": "no-such-compiler"}, "there is no CUDA compiler ('no-such-compiler' is not on PATH). To mend it: install the"),
        ("gpu", {}, "SAGE_BUILD must be one of auto, cpu, cuda, none; got 'gpu'"),
    ],
)
def test_an_explicit_choice_fails_loudly(tree, mode, variables, message):
    run = build(tree, mode, **variables)
    assert run.returncode != 0 and message in run.stderr
    assert not (tree / "dist").exists()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_native_wheel_is_for_this_python_and_runs(tree, tmp_path):
    run = build(tree, "cpu")
    assert run.returncode == 0, run.stderr
    wheel = the_wheel(tree / "dist")
    facts, names = record(wheel)
    here = f"cp3{sys.version_info.minor}"
    assert f"-{here}-{here}-" in wheel.name and "sage_kernels/_C.abi3.so" in names
    assert f"sage_kernels/_grouping{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert facts["native"] == ["cpu", "grouping"] and facts["reason"] is None and facts["version"] == sage_kernels.__version__
    assert facts["cuda_reason"] == "SAGE_BUILD=cpu was asked for" and facts["cuda_archs"] == []
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    refusal, said = use(site)
    assert refusal == "None" and "Warning" not in said


def test_importing_neither_builds_nor_loads_anything_heavy():
    code = "import sys, sage_kernels; print([m for m in ('diffusers', 'transformers', 'triton', 'setuptools') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_pins_and_ranges_agree():
    """Every requirement has a lower bound, the pins of constraints.txt satisfy them all, and the CI's versions are the pins."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    requirement = pytest.importorskip("packaging.requirements").Requirement
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [requirement(r) for group in (project["dependencies"], *project["optional-dependencies"].values()) for r in group]
    for need in wanted:
        if need.name == project["name"]:
            continue
        assert need.name in ("ninja",) or any(s.operator == ">=" for s in need.specifier), need
        if need.name in pins:
            assert need.specifier.contains(pins[need.name]), (need, pins[need.name])
    assert {r.name for r in map(requirement, project["dependencies"])} <= set(pins)
    assert metadata.version("torch").split("+")[0].split(".")[0] == pins["torch"].split(".")[0]
