"""Which implementations of the ops can run here, and why the others cannot.

    reference   plain torch, every device: the specification
    cpu         C++, CPU tensors: sage_kernels._C

Loading happens once, when the package is imported; nothing is ever compiled at run time.
"""

import importlib
import json
import warnings
from pathlib import Path

import torch

from sage_kernels.version import __version__

MEND = "pip install --no-build-isolation --force-reinstall --no-deps ."
_INFO = Path(__file__).with_name("_build_info.json")
_NOT_HERE = "not in this version: tensors on this kind of device run through the reference"


def build_info():
    """What the installation compiled: {"mode", "native", "reason", "mend", "torch", "compiler", "version"}.

    `native` lists the compiled backends; `reason` says why it is empty, or is None; `mend` is the command which changes that.
    """
    if not _INFO.exists():
        return {
            "mode": None,
            "native": [],
            "reason": "this is a source tree in which nothing was built",
            "mend": "pip install -e . --no-build-isolation --no-deps",
            "torch": None,
            "compiler": None,
            "version": __version__,
        }
    return json.loads(_INFO.read_text())


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
    return {"reference": None, "cpu": _NATIVE_REFUSAL, "cuda": _NOT_HERE, "triton": _NOT_HERE}


def warn_reference(kind):
    """Say once per kind of device that "auto" had to take the reference, and what mends that."""
    if kind in _WARNED:
        return
    _WARNED.add(kind)
    reason, mend = (_NATIVE_REFUSAL, f" To get them: {_MEND}") if kind == "cpu" else ("not in this version", "")
    warnings.warn(
        f"sage_kernels: no native kernels for {kind} tensors ({reason}); the plain-torch reference runs instead, "
        f"with the same results but slower.{mend}",
        RuntimeWarning,
        stacklevel=2,
    )


def _choose(name, kind):
    known = ("auto", *available())
    if name not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}; got {name!r}")
    if name in ("cuda", "triton"):
        raise NotImplementedError(f"backend {name!r} is {_NOT_HERE.split(':')[0]}; those which exist are reference and cpu")
    if name == "cpu":
        if kind != "cpu":
            raise ValueError(f"backend 'cpu' cannot run on {kind} tensors; use backend='auto' or 'reference'")
        if _NATIVE_REFUSAL:
            raise RuntimeError(f"backend 'cpu' cannot run: {_NATIVE_REFUSAL}. To get it: {_MEND}")
    if name != "auto":
        return name
    if kind == "cpu" and _NATIVE_REFUSAL is None:
        return "cpu"
    return "reference"


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
