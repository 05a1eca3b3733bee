"""Which implementations of the ops can run here, and why the others cannot.

    reference   plain torch, every device: the specification
    cpu         C++, CPU tensors: sage_kernels._C
    cuda        CUDA C++, tensors on NVIDIA GPUs: sage_kernels._C, if it was built with nvcc
    triton      Triton, tensors on NVIDIA and AMD GPUs; compiled by Triton when first used (with TRITON_INTERPRET=1 also CPU
                tensors, slowly, for tests)

"auto" takes the native kernels of the device, else Triton, else the reference with a warning. Loading happens once, when the
package is imported; the native kernels are compiled when it is installed.
"""

import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path

import torch

from sage_kernels.version import __version__

MEND = "pip install --no-build-isolation --force-reinstall --no-deps ."
CUDA_MEND = f"SAGE_BUILD=cuda {MEND}"
_INFO = Path(__file__).with_name("_build_info.json")
_UNBUILT = {
    "mode": None,
    "native": [],
    "reason": "this is a source tree in which nothing was built",
    "mend": "pip install -e . --no-build-isolation --no-deps",
    "torch": None,
    "compiler": None,
    "flags": None,
    "nvcc": None,
    "cuda_archs": [],
    "cuda_reason": "no CUDA kernels were built",
    "grouping_reason": None,
    "version": __version__,
}
# Devices each backend can run on; None: all.
_KINDS = {"reference": None, "cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}


def build_info():
    """What the installation compiled: {"mode", "native", "reason", "mend", "torch", "compiler", "flags", "nvcc", "cuda_archs",
    "cuda_reason", "grouping_reason", "version"}.

    `native` lists the compiled backends, and "grouping" for the grouping core (`grouping_reason`: why it failed, or None); `reason` says why it is empty, or is None; `mend` is the command which changes that;
    `cuda_reason` says why it has no CUDA kernels, or is None; `cuda_archs` are the GPU architectures of those it has.
    """
    return _UNBUILT | (json.loads(_INFO.read_text()) if _INFO.exists() else {})


def _load():
    """None when the native kernels are loaded, else the reason why not."""
    info = build_info()
    if "cpu" not in info["native"]:  # a library of an earlier build may still lie there
        return info["reason"] or "this installation was built without native kernels"
    try:
        importlib.import_module("sage_kernels._C")
    except ImportError as error:
        return f"sage_kernels._C was built against torch {info['torch']} but does not load with torch {torch.__version__}: {error}"
    return None


_NATIVE_REFUSAL = _load()
_MEND = build_info()["mend"] or MEND
_CHOSEN = {}
_WARNED = set()


def available():
    """{backend: None if it can run here, else the reason why not}."""
    return {"reference": None, "cpu": _NATIVE_REFUSAL, "cuda": _cuda_refusal(), "triton": _triton_refusal()}


def _no_gpu():
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    return "torch finds no GPU here" if built else f"torch {torch.__version__} is built without CUDA or ROCm"


def _cuda_is_attached():
    """Whether the loaded library has brought CUDA kernels, whatever the record of its build says."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("sage_kernels::branch_step", "CUDA")


def _cuda_refusal():
    info = build_info()
    if "cuda" not in info["native"]:
        return _NATIVE_REFUSAL or f"built without CUDA kernels: {info['cuda_reason']}"
    if _NATIVE_REFUSAL is None and not _cuda_is_attached():
        return "the library that is installed has no CUDA kernels, though it was to have them"
    reason = _NATIVE_REFUSAL or _no_gpu()
    if reason is None and torch.version.hip:
        reason = "the CUDA kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    if reason is None:
        oldest = min(int(arch) for arch in info["cuda_archs"])
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            if 10 * major + minor < oldest:
                return f"built for sm_{oldest} and newer, and {torch.cuda.get_device_name(i)} (cuda:{i}) is sm_{major}{minor}"
    return reason


def interpreting():
    """True when Triton runs its kernels in Python, on the CPU: set by TRITON_INTERPRET=1 before the first import of triton."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_refusal():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None if interpreting() else _no_gpu()


def warn_reference(kind):
    """Say once per kind of device that "auto" had to take the reference, and what mends that."""
    if kind in _WARNED:
        return
    _WARNED.add(kind)
    fast = [name for name, kinds in _KINDS.items() if kinds and kind in kinds]
    reasons = "; ".join(f"{name}: {available()[name]}" for name in fast) or "no backend is made for it"
    mend = f" To get them: {_MEND}" if fast else ""
    warnings.warn(
        f"sage_kernels: no native kernels for {kind} tensors ({reasons}); the plain-torch reference runs instead, "
        f"with the same results but slower.{mend}",
        RuntimeWarning,
        stacklevel=2,
    )


def _choose(name, kind):
    known = ("auto", *_KINDS)
    if name not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}; got {name!r}")
    if name == "auto":
        fast = [other for other, kinds in _KINDS.items() if kinds and kind in kinds]
        return next((other for other in fast if available()[other] is None), "reference")
    kinds, interpreted = _KINDS[name], name == "triton" and interpreting()
    if kinds and kind not in kinds and not interpreted:
        raise ValueError(f"backend {name!r} cannot run on {kind} tensors; use backend='auto' or 'reference'")
    refusal = available()[name]
    if refusal:
        mend = "" if name == "triton" else f". To get it: {_MEND if name == 'cpu' else CUDA_MEND}"
        raise RuntimeError(f"backend {name!r} cannot run: {refusal}{mend}")
    return name


# It asks the system, which torch.compile cannot trace. This is what torch.compiler.assume_constant_result sets; calling that would
# import the whole compiler.
_choose._dynamo_marked_constant = True


def resolve(name, device):
    """The backend that runs when `name` is asked for on `device`; a backend forced by name that cannot run raises."""
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    chosen = _CHOSEN.get((name, kind))
    if chosen is None:
        chosen = _choose(name, kind)
        if not torch.compiler.is_compiling():
            _CHOSEN[name, kind] = chosen
    return chosen


def cpu_isa(force=None):
    """The instruction set of the C++ kernels: "baseline", "avx2" or "avx512"; the best one this processor has.

    Args:
        force (str | None): use this one from now on ("auto": the best again). For tests and measurements.

    Raises:
        RuntimeError: the native kernels are missing, or the processor cannot run the one asked for.
    """
    if _NATIVE_REFUSAL:
        raise RuntimeError(f"cpu_isa: {_NATIVE_REFUSAL}. To get the native kernels: {_MEND}")
    names = ("baseline", "avx2", "avx512")
    if force is None:
        code = -1
    elif force == "auto":
        code = len(names)
    elif force in names:
        code = names.index(force)
    else:
        raise ValueError(f"cpu_isa: force must be one of auto, {', '.join(names)}; got {force!r}")
    return names[torch.ops.sage_kernels.cpu_isa(code)]
