"""Shared by all tests: outputs that no kernel wrote are NaN, and every device that is here is tested."""

import pytest
import torch

from sage_kernels import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """An output element that a kernel forgets to write cannot pass for a result."""
    empty = ops._empty

    def poisoned(*args):
        result = empty(*args)
        return result if torch.compiler.is_compiling() else result.fill_(float("nan"))

    monkeypatch.setattr(ops, "_empty", poisoned)


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
