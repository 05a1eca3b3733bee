"""What every benchmark here shares: timing in turn, spread, a record of the machine, JSON.

Contenders alternate (A, B, A, B, ...) within one process, so that whatever slows the machine down meets them all; ratios are
taken round by round. A contender is timed only after its result has been checked: the checks belong to the benchmarks.

On a CPU a sample is wall time. On a GPU there are two clocks: `device_sampler` queues the calls behind a pause and brackets them
with events, so that it sees the device's time even where the host is slower; `host_sampler` is wall time, which a loop that
launches one call after the other would see. Where the second is clearly longer, the case is bound by the host.
"""

import hashlib
import itertools
import json
import os
import platform
import re
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
SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h")
SAMPLE_SECONDS = {"cpu": 5e-4, "cuda": 2e-4}  # calls shorter than this are timed several at once
MOST_CALLS = {"cpu": 50, "cuda": 16}  # a queue of launches has room for about a thousand
HOST_BOUND = 1.25  # wall time over device time from which a case is called host-bound


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def host_sampler(run, device="cpu", *, settle=True):
    """A function that returns wall seconds per call of `run`, the mean of as many calls as fill a sample.

    Args:
        settle: one untimed call before each sample, so that caches and freed memory are as its own last call left them, and
            not as the contender before it did, which may have read the same inputs. Loops of seconds can do without.
    """
    count = _calls(run, device)

    def sample():
        if settle:
            run()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        synchronize(device)
        return (time.perf_counter() - start) / count

    return sample


def device_sampler(run, device):
    """A function that returns device seconds per call of `run`, by CUDA events around calls that wait in the queue together.

    The pause that they wait behind lasts twice as long as the host needs to queue them. A call which itself waits for the
    device is timed with its waits.
    """
    count = _calls(run, device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    cycles = int(min(2 * (time.perf_counter() - start) + 1e-4, 0.05) * 2e9)  # at about 2 GHz
    synchronize(device)

    def sample():
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        first.record()
        for _ in range(count):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3 / count

    return sample


def _calls(run, device, warmup=3):
    kind = torch.device(device).type
    for _ in range(warmup):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        last = time.perf_counter() - start
    return int(min(max(SAMPLE_SECONDS[kind] / max(last, 1e-7), 1), MOST_CALLS[kind]))


def in_turn(samplers, *, seconds=1.0, least=9, most=30):
    """Sample in turn.

    Args:
        samplers (dict[str, callable]): each returns one sample.
        seconds: about how long all rounds may take together [s].
        least, most: bounds on the number of rounds.

    Returns:
        dict[str, list[float]]: the samples; the i-th of each contender belong to one round.
    """
    samples, rounds = {name: [] for name in samplers}, least
    start = time.perf_counter()
    for done in itertools.count(1):
        for name, sample in samplers.items():
            samples[name].append(sample())
        if done == 2:
            rounds = int(min(max(2 * seconds / max(time.perf_counter() - start, 1e-7), least), most))
        if done >= rounds:
            return samples


def spread(values):
    """{"median", "p20", "p80"} of a list of numbers."""
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return {"median": short(median), "p20": short(p20), "p80": short(p80)}


def ratio(samples, ours, theirs):
    """Spread of theirs / ours, round by round: how many times faster ours is."""
    return spread([b / a for a, b in zip(samples[ours], samples[theirs])])


def short(value):
    """Four significant digits: more than a timing has, and no more than a file needs."""
    return float(f"{value:.4g}")


def environment(device="cpu"):
    """Machine, versions, commit and command, for the JSON. `device`: the one that was measured."""
    from sage_kernels import backends

    native, on_gpu = backends.available()["cpu"] is None, torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "driver": _driver() if on_gpu else None,
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
        "commit": commit(),
        "sources": sources(),
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


def sources():
    """Short hash of all that is measured and of how: results with another hash are of another program."""
    files = sorted(f for folder in ("csrc", "sage_kernels", "sage", "benchmarks") for f in (ROOT / folder).rglob("*") if f.suffix in SOURCES)
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def _output(*command):
    """What a command prints, or None if it is missing or fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _driver():
    return (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0] or None


def commit():
    """The commit, with a + if tracked files differ from it."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", "csrc", "sage", "sage_kernels", "benchmarks")
    return head and head + ("+" if changed else "")


def write_json(path, result):
    """Write a result, with every list and object that holds no other on one line; numpy numbers become plain ones."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, default=_plain)
    flat = re.compile(r"([\[{])\n\s*([^\[\]{}]*?)\n\s*([\]}])")  # a line break is never inside a string
    text = flat.sub(lambda match: match[1] + re.sub(r"\n\s*", " ", match[2]) + match[3], text)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)
