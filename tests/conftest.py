"""Shared by all tests: outputs that no kernel wrote are NaN, and every device and backend that is here is tested."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sage_kernels import allocation, backends
from sage_kernels.testing import ISAS, isa_refusal, poisoned

pytest_plugins = ["support_matrix"]

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """An output element that a kernel forgets to write cannot pass for a result."""
    empty = allocation.empty

    def filled(*args):
        result = empty(*args)
        return result if torch.compiler.is_compiling() else poisoned(result)

    monkeypatch.setattr(allocation, "empty", filled)


@pytest.fixture
def one_thread():
    """For tests of many small tensors, where a second thread mostly waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device the ops run on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def cuobjdump():
    """The tool that reads compiled CUDA kernels: from the CUDA toolkit, or the one that comes with Triton."""
    on_path = shutil.which("cuobjdump")
    if on_path is None:
        triton = pytest.importorskip("triton", reason="cuobjdump comes with the CUDA toolkit or with triton")
        on_path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not Path(on_path).exists():
        pytest.skip("no cuobjdump")
    return str(on_path)


class Runner(NamedTuple):
    """A backend under test and where its tensors live."""

    backend: str
    device: str


@pytest.fixture(params=[*ISAS, pytest.param("cuda", marks=GPU), pytest.param("triton", marks=GPU)])
def runner(request):
    """Every fast backend, the C++ one once per instruction set that this processor has."""
    if request.param not in ISAS:
        refusal = backends.available()[request.param] or (None if torch.cuda.is_available() else "no GPU: tested interpreted")
        if refusal:
            pytest.skip(f"{request.param}: {refusal}")
        yield Runner(request.param, "cuda")
        return
    refusal = isa_refusal(request.param)
    if refusal:
        pytest.skip(refusal)
    backends.cpu_isa(request.param)
    yield Runner("cpu", "cpu")
    backends.cpu_isa("auto")
