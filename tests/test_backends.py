"""Choosing a backend, saying why another cannot run, and what the native library is made of."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import sage_kernels
from sage_kernels import backends
from sage_kernels.testing import ISAS, isa_refusal, random_case

ROOT = Path(__file__).resolve().parent.parent
needs_native = pytest.mark.skipif(backends.available()["cpu"] is not None, reason=str(backends.available()["cpu"]))


def library():
    return Path(sys.modules["sage_kernels._C"].__file__)


def test_every_backend_is_listed_with_its_reason():
    available = backends.available()
    assert available["reference"] is None
    assert set(available) == {"reference", "cpu", "cuda", "triton"}
    assert all(reason is None or len(reason) > 10 for reason in available.values())


def test_resolve():
    assert backends.resolve("reference", "cpu") == "reference"
    assert backends.resolve("auto", torch.device("cpu")) == ("cpu" if backends.available()["cpu"] is None else "reference")
    assert backends.resolve("auto", "mps") == "reference"
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, cuda, triton; got 'rocm'"):
        backends.resolve("rocm", "cpu")
    for name in ("cuda", "triton"):
        with pytest.raises(ValueError, match=f"backend '{name}' cannot run on cpu tensors; use backend='auto' or 'reference'"):
            backends.resolve(name, "cpu")


@pytest.mark.parametrize(
    ("refused", "chosen"), [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "reference"), (("triton",), "cuda")]
)
def test_auto_takes_the_first_backend_of_the_device_that_can_run(monkeypatch, refused, chosen):
    monkeypatch.setattr(backends, "_CHOSEN", {})
    monkeypatch.setattr(backends, "available", lambda: {name: "out of order" if name in refused else None for name in backends._KINDS})
    assert backends.resolve("auto", "cuda:3") == chosen
    for name in refused:
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run: out of order"):
            backends.resolve(name, "cuda")


class Card:
    """torch.cuda of a machine with one GPU."""

    def __init__(self, capability):
        self.capability = capability

    def is_available(self):
        return self.capability is not None

    def device_count(self):
        return 1

    def get_device_capability(self, i):
        return self.capability

    def get_device_name(self, i):
        return "Some GPU"


BUILT = {"native": ["cpu", "cuda"], "cuda_archs": ["80", "90"], "cuda_reason": None, "mend": None}


@pytest.mark.parametrize(
    ("capability", "info", "hip", "reason"),
    [
        ((9, 0), BUILT | {"attached": False}, None, "the library that is installed has no CUDA kernels, though it was to have them"),
        ((9, 0), BUILT, None, None),
        ((12, 0), BUILT, None, None),
        ((7, 5), BUILT, None, r"built for sm_80 and newer, and Some GPU \(cuda:0\) is sm_75"),
        (None, BUILT, None, "torch finds no GPU here|built without CUDA or ROCm"),
        ((9, 4), BUILT, "6.4", "for NVIDIA GPUs, and this torch is built for ROCm"),
        ((9, 0), BUILT | {"native": ["cpu"], "cuda_reason": "no nvcc"}, None, "built without CUDA kernels: no nvcc"),
    ],
)
def test_why_the_cuda_kernels_cannot_run(monkeypatch, capability, info, hip, reason):
    monkeypatch.setattr(backends, "_NATIVE_REFUSAL", None)
    monkeypatch.setattr(backends, "build_info", lambda: info)
    monkeypatch.setattr(backends, "_cuda_is_attached", lambda: info.get("attached", True))
    monkeypatch.setattr(torch, "cuda", Card(capability))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", hip)
    refusal = backends.available()["cuda"]
    assert refusal is None if reason is None else re.search(reason, refusal)
    assert (backends.available()["triton"] is None) == (capability is not None)


def test_importing_the_package_does_not_import_triton():
    code = """
import sys, torch
before = "triton" in sys.modules  # some torch imports it
import sage_kernels
sage_kernels.backends.available()
assert before or "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@needs_native
def test_forced_cpu_refuses_other_devices():
    with pytest.raises(ValueError, match="backend 'cpu' cannot run on cuda tensors"):
        backends.resolve("cpu", "cuda")


@needs_native
def test_instruction_sets_can_be_forced_and_given_back():
    best = backends.cpu_isa()
    try:
        for name in ISAS:
            if isa_refusal(name) is None:
                assert backends.cpu_isa(name) == name == backends.cpu_isa()
            else:
                with pytest.raises(RuntimeError, match='cannot run that instruction set; use "auto"'):
                    backends.cpu_isa(name)
        with pytest.raises(ValueError, match="force must be one of auto, baseline, avx2, avx512; got 'neon'"):
            backends.cpu_isa("neon")
    finally:
        assert backends.cpu_isa("auto") == best


@needs_native
def test_build_info_says_what_was_built():
    info = backends.build_info()
    assert info["native"] in (["cpu", "grouping"], ["cpu", "grouping", "cuda"]) and info["reason"] is None and info["version"] == sage_kernels.__version__
    assert info["torch"] and info["compiler"] and "-ffp-contract=off" in info["flags"]
    assert bool(info["nvcc"] and info["cuda_archs"]) == ("cuda" in info["native"]) == (info["cuda_reason"] is None)
    json.dumps(info)


@pytest.mark.parametrize("reason", ["SAGE_BUILD=none was asked for", None])
def test_a_library_left_by_an_earlier_build_is_not_loaded(monkeypatch, reason):
    info = backends.build_info() | {"mode": "none", "native": [], "reason": reason}
    monkeypatch.setattr(backends, "build_info", lambda: info)
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: pytest.fail(f"loaded {name}"))
    assert backends._load() == (reason or "this installation was built without native kernels")


WITHOUT_NATIVE = """
import sys, warnings
sys.modules["sage_kernels._C"] = None
import torch, sage_kernels
from sage_kernels import backends
from sage_kernels.testing import random_case
positional, keyword = random_case(torch.Generator().manual_seed(0), 3, 4, (20,))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        result = sage_kernels.branch_step(*positional, **keyword)
    sage_kernels.normals(keyword["seed"], keyword["call"], 5)
    sage_kernels.branch_step(*positional, **keyword, backend="reference")
caught = [w for w in caught if issubclass(w.category, RuntimeWarning)]
assert len(caught) == 1, caught
print(caught[0].message)
for call in (lambda: backends.resolve("cpu", "cpu"), backends.cpu_isa):
    try:
        call()
    except RuntimeError as error:
        print(error)
print(result.sample.double().sum().item().hex())
"""


def test_without_native_kernels_everything_works_and_one_warning_says_so():
    run = subprocess.run([sys.executable, "-c", WITHOUT_NATIVE], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    warning, forced, isa, total = run.stdout.strip().split("\n")
    assert "no native kernels for cpu tensors" in warning and "reference runs instead" in warning
    for message in (warning, forced, isa):
        assert re.search(r"To get (them|it|the native kernels): .*pip install .*--no-build-isolation", message), message
    positional, keyword = random_case(torch.Generator().manual_seed(0), 3, 4, (20,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a native or forced call has nothing to say
        expected = sage_kernels.branch_step(*positional, **keyword, backend="reference")
        assert expected.sample.double().sum().item().hex() == total


@needs_native
def test_the_library_keeps_to_the_stable_interfaces():
    """One binary for every torch from 2.10 and Python from 3.10: no C++ symbol of torch, no Python outside the stable ABI's tag."""
    assert library().name.endswith(".abi3.so")
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    symbols = subprocess.run(["nm", "-D", "-C", library()], capture_output=True, text=True, check=True).stdout
    undefined = [line.split(" U ", 1)[1] for line in symbols.splitlines() if " U " in line]
    assert not [name for name in undefined if re.match(r"(at|c10|torch|caffe2)::", name)]
    assert [name for name in undefined if name.startswith(("aoti_torch_", "torch_"))]
    assert {name for name in undefined if name.startswith("Py")} <= {"PyModule_Create2"}


@needs_native
def test_products_and_sums_are_never_fused():
    """A fused multiply-add rounds once where the specification rounds twice."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library()], capture_output=True, text=True, check=True).stdout
    assert "vmulps" in code and "%zmm" in code, "the AVX2 or AVX-512 copy is missing"
    assert not re.findall(r"\bvf[n]?m(?:add|sub)", code)


def test_kernels_touch_no_memory_that_is_not_theirs(tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer over exactly sized buffers, on every instruction set that runs here."""
    compiler = shutil.which("c++")
    sanitizers = "-fsanitize=address,undefined"
    if compiler is None or subprocess.run(
        [compiler, sanitizers, "-x", "c++", "-", "-o", tmp_path / "probe"], input="int main() {}", text=True, capture_output=True
    ).returncode:
        pytest.skip("no C++ compiler with sanitizers")
    program = tmp_path / "sanitize"
    sources = ["csrc/tests/sanitize.cpp", "csrc/cpu/kernels_cpu.cpp"]
    flags = ["-std=c++17", "-O0", "-w", "-ffp-contract=off", sanitizers, "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, *sources, "-o", program], cwd=ROOT, check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "baseline" in run.stdout.split()
