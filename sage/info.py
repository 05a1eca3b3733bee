"""What is installed and what can run: for `sage info` and for every report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sage.embed_cache import CacheInfo

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "triton", "safetensors", "pillow", "matplotlib")


def versions() -> dict[str, str]:
    """Version of this package, Python and everything pictures depend on; packages that are missing are left out."""
    from sage_kernels.version import __version__

    found = {"sage-diffusion": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict:
    """Processor, cores and accelerators; `summary` is one line of it."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
    where = ", ".join(gpus) if gpus else "no GPU"
    facts["summary"] = f"{facts['system']}, {facts['processor']}, {cores} cores, {facts['threads']} threads, {where}"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def info_text() -> str:
    """The answer of `sage info`."""
    import torch

    from sage.embed_cache import cache_info
    from sage_kernels import backends

    facts = machine()
    lines = ["Versions", *_table(versions()), "", "Machine", *_table({k: facts[k] for k in ("system", "processor", "cores")})]
    lines += ["", "Devices that torch can use", *(f"  {device}" for device in _devices(torch))]
    lines += ["", "Kernel backends", *_backends(torch, backends)]
    build = backends.build_info()
    lines += ["", "Build", *_table({k: v for k, v in build.items() if k != "mend" and v not in (None, [])})]
    lines += ["", "Model", *_table(_shipped())]
    lines += ["", "Embedding cache", f"  {cache_text(cache_info())}", "  `sage cache --clear` empties it"]
    return "\n".join(lines)


def _backends(torch, backends) -> list[str]:
    """What can run, why the rest cannot and what would change that, and which one tensors on each device get."""
    available = backends.available()
    lines = _table({name: "ready" if reason is None else f"no: {reason}" for name, reason in available.items()})
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    facts = {f"auto on {kind}": backends.resolve("auto", kind) for kind in kinds}
    if available["cpu"] is None:
        facts["cpu runs"] = backends.cpu_isa()
    lines += _table(facts)
    build = backends.build_info()
    if available["cpu"] is not None and build["mend"]:
        lines += ["  to get the cpu backend:", f"    {build['mend']}"]
    if torch.version.cuda and "cuda" not in build["native"]:
        lines += ["  to get the cuda backend:", f"    {backends.CUDA_MEND}"]
    return lines


def _devices(torch) -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i}  {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _shipped() -> dict[str, str]:
    """Whether the model that comes with the package is there, and the default encoder of prompts."""
    if importlib.util.find_spec("sage.emoji") is None:
        return {"embedded": "missing: this installation lacks sage.emoji", "encoder": "missing"}
    try:
        from sage.emoji import model_path, text_encoder_path

        folder, encoder = Path(model_path()), Path(text_encoder_path())
    except (ImportError, OSError, RuntimeError) as error:
        return {"embedded": f"missing: {error}", "encoder": "missing"}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    return {"embedded": f"{folder} ({size:.1f} MB)", "encoder": f"{encoder} (default for grouping)"}


def cache_text(info: CacheInfo) -> str:
    """One line on what a cache of embeddings holds."""
    damaged = f"; {len(info.unreadable)} of the files damaged, built anew when next used" if info.unreadable else ""
    encoders = "encoder" if info.files == 1 else "encoders"
    return f"{info.folder}: {info.prompts:,} vectors of {info.files} {encoders}, {info.bytes / 1e6:.1f} MB{damaged}"


def schedulers_text() -> str:
    """The answer of `sage info --schedulers`: names for --solver, then every scheduler class of the installed diffusers."""
    from sage.solvers import SOLVERS, coverage

    lines = ["Solvers for --solver"]
    for name, (cls, options) in SOLVERS.items():
        extra = f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""
        lines.append(f"  {name:<12} {cls}{extra}")
    covered = coverage()
    inside = {name: how for name, how in covered.items() if how.table}
    lines += ["", f"diffusers classes whose step is one fused update ({len(inside)})"]
    lines += _table({name: f"solver {', '.join(how.solvers)}" if how.solvers else "" for name, how in inside.items()})
    lines += ["", "Options and arguments of `step` with which they run their own `step` all the same"]
    lines += _table({name: "; ".join(how.leaves) for name, how in inside.items() if how.leaves})
    outside = {name: how.reason for name, how in covered.items() if not how.table}
    lines += ["", f"diffusers classes that run their own `step`, where they have one, with sharing too ({len(outside)})", *_table(outside)]
    return "\n".join(line.rstrip() for line in lines)


def _table(rows: dict) -> list[str]:
    width = max(map(len, rows), default=0)
    joined = {key: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value for key, value in rows.items()}
    return [f"  {key:<{width}}  {value}" for key, value in joined.items()]


def command_line() -> str:
    """The command as it was typed, for the record."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
