"""What every benchmark here shares: timing in turn, spread, copy bandwidth, a record of the machine, JSON.

Contenders alternate (A, B, A, B, ...) within one process, so that whatever slows the machine down meets them all; ratios are
taken round by round. A contender is timed only after its result has been checked: the checks belong to the benchmarks.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "triton")


def in_turn(contenders, *, seconds=1.0, least=15, most=300, warmup=3):
    """Time callables in turn.

    Args:
        contenders (dict[str, callable]): called without arguments.
        seconds: about how long all rounds may take together [s].
        least, most: bounds on the number of rounds.
        warmup: untimed rounds first.

    Returns:
        dict[str, list[float]]: seconds of each call; the i-th of each contender belong to one round.
    """
    for _ in range(warmup):
        start = time.perf_counter()
        for run in contenders.values():
            run()
        last = time.perf_counter() - start
    rounds = int(min(max(seconds / max(last, 1e-7), least), most))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def spread(values):
    """{"median", "p20", "p80", "count"} of a list of numbers."""
    p20, median, p80 = (float(v) for v in np.percentile(values, (20, 50, 80)))
    return {"median": median, "p20": p20, "p80": p80, "count": len(values)}


def ratio(times, ours, theirs):
    """Spread of theirs / ours, round by round: how many times faster ours is."""
    return spread([b / a for a, b in zip(times[ours], times[theirs])])


def copy_bandwidth(nbytes, *, seconds=0.3):
    """Bytes moved per second (read plus written) by torch's own copy of `nbytes` bytes: what a kernel can be held against."""
    source = torch.ones(max(nbytes // 4, 1), dtype=torch.float32)
    target = torch.empty_like(source)
    times = in_turn({"copy": lambda: target.copy_(source)}, seconds=seconds)["copy"]
    return 2 * source.numel() * 4 / spread(times)["median"]


def environment():
    """Machine, versions, commit and command, for the JSON."""
    from sage_kernels import backends

    native = backends.available()["cpu"] is None
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "kernels": backends.build_info() | {"instructions": backends.cpu_isa() if native else None},
        "commit": _commit(),
        "command": shlex.join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or None
    return platform.processor() or None


def _commit():
    """The commit, with a + if tracked files differ from it."""
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    head = git("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "sage", "sage_kernels", "benchmarks").stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")


def write_json(path, result):
    """Write a result; numpy numbers become plain ones."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=_plain) + "\n", encoding="utf-8")


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)
