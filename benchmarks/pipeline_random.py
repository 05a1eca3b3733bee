"""Measures models with random weights at their real sizes: the methods of pipeline_methods.py, in turn, one model and size at a time."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig
from harness import environment, short, spread, synchronize, write_json
from pipeline_methods import STEADY, Job, Method, methods
from pipeline_models import MODELS, TINY, Model, build, conditions, parameters, refusal
from tqdm import tqdm

from sage.native import NotNative

NOTE = "random weights: seconds, rows and memory mean something here, pictures do not"
GAIN = 1.03  # a larger batch must bring so many more images per second
TRIAL_STEPS = 3  # of the calls that look for the best batch
WARM_STEPS = 2  # half of them shared: every shape of the denoiser's calls
MOST_PICTURES = 64  # in a stock call
NO_SETTINGS = ("out", "resume", "models", "sizes", "embedded", "prompts", "guidance_scale", "solver")  # nothing that an entry depends on
KEPT = ("device", "driver", "processor", "threads", "packages", "sources")  # of the environment: equal for results to be kept


def run(args) -> dict[str, Any]:
    """Every model and size that is asked for; writes `args.out` after each, so that little is lost when the command is cut off."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    settings = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    result = {"environment": environment(device), "settings": settings, "note": NOTE, "entries": {}}
    result["entries"] = held(args, result)
    for name in args.models:
        model = (TINY if args.quick else MODELS)[name]
        todo = [size for size in args.sizes or model.sizes if f"{name} {size}" not in result["entries"]]
        for size, entry in _model(name, model, todo, args, device, dtype):
            result["entries"][f"{name} {size}"] = entry
            result["table"] = table(result["entries"])
            if args.out:
                write_json(args.out, result)
    result["table"] = table(result["entries"])
    return result


def held(args, now: dict[str, Any]) -> dict[str, Any]:
    """The entries of `args.out` that --resume keeps: measured here, of this program, with these settings."""
    if not (args.resume and args.out and Path(args.out).exists()):
        return {}
    before = json.loads(Path(args.out).read_text(encoding="utf-8"))
    same = all(before["environment"].get(key) == now["environment"][key] for key in KEPT)
    if not same or before["settings"] != json.loads(json.dumps(now["settings"])):
        return {}
    return {name: entry for name, entry in before["entries"].items() if entry["status"] == "measured"}


def _model(name: str, model: Model, sizes: list[str], args, device: torch.device, dtype: torch.dtype):
    """(size, its entry of the JSON) for each size that is to be measured; the model is built once."""
    pipe = None
    for size in sizes:
        why_not = None if size in model.sizes else f"{name} is measured at {', '.join(model.sizes)}"
        why_not = why_not or (refusal(model, device, dtype) if pipe is None else None)
        if why_not is None:
            tqdm.write(f"{name} {size}: {NOTE}")
            pipe = pipe or build(model, device, dtype)
            try:
                entry = measure(name, model, pipe, size, args, device, dtype)
            except torch.OutOfMemoryError as error:
                why_not = f"out of memory: {error}"
        if why_not is not None:
            tqdm.write(f"{name} {size}: skipped, {why_not}")
            entry = {"status": f"skipped: {why_not}"}
        yield size, entry
    del pipe
    _clean(device)


def measure(name: str, model: Model, pipe, size: str, args, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One entry of the JSON: how many pictures fill the denoiser, and every method's figures."""
    options = {**model.options, **model.sizes[size]}
    job = Job(pipe, {}, options, model.order, model.copies, model.together, device)
    job.conditions = conditions(model, max(MOST_PICTURES, args.max_rows or 0), device, dtype)
    job.cache = FirstBlockCacheConfig(threshold=args.cache_threshold)
    trials = find_batch(job, args)
    chosen = methods(args.shares, args.groups, args.only)
    steps, pictures = settle(trials[-1]["seconds_per_picture"], job.batch, chosen, args)
    job.conditions = conditions(model, pictures, device, dtype)
    torch._dynamo.reset()
    job.compile(args.compile == "whole", dynamic=False, backend=args.backend)
    lines = rounds(job, chosen, pictures, steps, args, f"{name} {size}")
    return {
        "status": "measured",
        "parameters": parameters(model),
        "batch": {"pictures": job.batch, "rows": job.max_rows, "trials": trials},
        "steps": steps,
        "pictures": pictures,
        "call": model.sizes[size],
        "methods": lines,
    }


def find_batch(job: Job, args) -> list[dict[str, Any]]:
    """Set `job.batch` to the fewest pictures of a stock call that fill the denoiser; returns what was tried, the best last.

    Pictures are doubled until that brings less than 3 % more images per second, memory is out, or a call takes too long.
    """
    trials: list[dict[str, Any]] = []
    stock, most = Method("stock", "stock"), 2 if args.quick else MOST_PICTURES
    if args.max_rows:
        job.batch = most = args.max_rows // job.together
    while job.batch <= most:
        try:
            job.run(stock, job.batch, 1)
            taken = min(job.run(stock, job.batch, TRIAL_STEPS)["seconds"] for _ in range(2))
        except torch.OutOfMemoryError:
            _clean(job.device)
            break
        each = taken / (TRIAL_STEPS * job.batch)
        if trials and trials[-1]["seconds_per_picture"] / each < GAIN:
            break
        trials.append({"pictures": job.batch, "seconds": short(taken), "seconds_per_picture": each})
        if taken > args.seconds / 20:
            break
        job.batch *= 2
    if not trials:
        raise torch.OutOfMemoryError(f"not even {job.batch} pictures fit")
    job.batch = trials[-1]["pictures"]
    return trials


def settle(seconds: float, batch: int, chosen: list[Method], args) -> tuple[int, int]:
    """(steps, pictures) of the timed calls: as asked for, or fewer where two rounds would take longer than `args.seconds`.

    Enough pictures for groups to fill the denoiser while each is one row; 5 steps are enough for shares of a fifth.

    Args:
        seconds: of a picture's denoiser call.
    """
    most, fewest = max(args.groups), min(args.groups)
    for steps, group in ((args.steps, most), (min(args.steps, 5), most), (min(args.steps, 5), fewest)):
        rows = steps * group * batch * len(chosen) * 0.8  # methods share about a fifth on average
        if 2.4 * rows * seconds <= args.seconds:
            break
    return steps, group * batch


def rounds(job: Job, chosen: list[Method], pictures: int, steps: int, args, title: str) -> list[dict[str, Any]]:
    """Warm every method up, then time all in turn for as long as `args.seconds` lasts; a line of the JSON for each method.

    The methods with a cache come last, in rounds of their own.
    """
    lines = {method: {"method": method.name, "kind": method.kind, "status": "measured", "raw": []} for method in chosen}
    for method, line in lines.items():
        why_not = unavailable(job, method, pictures)
        line["status"] = f"skipped: {why_not}" if why_not else "measured"
    cached = [method for method in chosen if method.beside_cached]
    for part, name in (([m for m in chosen if m not in cached], title), (cached, f"{title}, cached")):
        _in_turn(job, part, pictures, steps, lines, args, args.seconds * len(part) / len(chosen), name)
    return summaries(lines, pictures)


def _in_turn(job: Job, chosen: list[Method], pictures: int, steps: int, lines: dict, args, seconds: float, title: str) -> None:
    """Fill in the lines of some methods within so many seconds, compiling not counted."""
    end = time.perf_counter() + seconds
    for method in tqdm(chosen, desc=f"{title}, warm-up", leave=False):
        began = time.perf_counter()
        if lines[method]["status"] == "measured":
            _attempt(job, method, min(job.batch * method.group, pictures), min(WARM_STEPS, steps), lines[method], "warm_up")
        end += time.perf_counter() - began if method.compiled else 0
    for number in tqdm(range(args.repeats), desc=f"{title}, rounds", leave=False):
        began = time.perf_counter()
        for method in (method for method in chosen if lines[method]["status"] == "measured"):
            if number == 0 and time.perf_counter() > end:
                lines[method]["status"] = f"skipped: {args.seconds:g} seconds were over"
            else:
                _attempt(job, method, pictures, steps, lines[method], "raw")
        if 2 * time.perf_counter() - began > end:
            break


def unavailable(job: Job, method: Method, pictures: int) -> str | None:
    """Why a method is not for this pipeline, device or number of pictures; None if it is."""
    if method.graphs and job.device.type != "cuda":
        return "CUDA graphs need a GPU"
    if method.beside_cached and not hasattr(job.denoiser, "enable_cache"):
        return f"{type(job.denoiser).__name__} takes no cache"
    if method.group * job.batch > pictures:
        return f"{pictures} pictures in groups of {method.group} do not fill the denoiser"
    return None


def _attempt(job: Job, method: Method, pictures: int, steps: int, line: dict, where: str) -> None:
    """Run a method once; what it took, or why it failed, goes into its line."""
    _clean(job.device)
    try:
        took = job.run(method, pictures, steps)
    except NotNative as error:
        line["status"] = f"skipped: {error}"
    except Exception as error:  # whatever it is, it must not cost the other methods' figures
        line["status"] = f"failed: {type(error).__name__}: {error}"[:400]
        tqdm.write(f"{method.name}: {line['status']}")
    else:
        if where == "warm_up":
            line["warm_up_seconds"] = short(took["seconds"])  # compiling included
            return
        line["raw"].append(took["seconds"])
        line |= {key: took[key] for key in ("nfe", "denoiser_rows", "launches", "cache", "finite")}
        if job.device.type == "cuda":
            line["peak_memory_gb"] = max(line.get("peak_memory_gb", 0), short(torch.cuda.max_memory_allocated(job.device) / 1e9))


def summaries(lines: dict[Method, dict], pictures: int) -> list[dict[str, Any]]:
    """The lines of the JSON, with every measured method compared with its baseline, round by round."""
    by_name = {method.name: line for method, line in lines.items()}
    for method, line in lines.items():
        own, base = np.array(line.pop("raw")), by_name.get(method.baseline, line)
        line["raw_seconds"] = [short(seconds) for seconds in own]
        if not len(own):
            continue
        theirs = np.array(base["raw_seconds"][: len(own)])
        line |= {"seconds": spread(own), "images_per_second": short(pictures / np.median(own)), "baseline": method.baseline}
        line.setdefault("peak_memory_gb", None)  # of a GPU only
        if len(theirs) < len(own):
            continue
        line["time_ratio"], line["row_ratio"] = short(np.median(own / theirs)), line["denoiser_rows"] / base["denoiser_rows"]
        line["time_per_row"] = short(line["time_ratio"] / line["row_ratio"])
        compared = method.engine != "stock" and not method.cached
        line["follows"] = line["time_per_row"] <= STEADY if compared else None
    return list(lines.values())


def table(entries: dict[str, dict]) -> dict[str, list]:
    """For readme_tables.py."""
    columns = ["model", "method", "denoiser rows", "launches", "seconds", "images/s", "GB"]
    columns += ["time / stock's", "rows / stock's", "time / rows", f"at most {STEADY}"]
    keys = ("denoiser_rows", "launches", "images_per_second", "peak_memory_gb", "time_ratio", "row_ratio", "time_per_row")
    rows = []
    for name, entry in entries.items():
        for line in entry.get("methods", ()):
            if line["raw_seconds"]:
                a, b, *rest = (line.get(key) for key in keys)
                verdict = {True: "pass", False: "FAIL", None: None}[line.get("follows")]
                rows.append([name, line["method"], a, b, line["seconds"]["median"], *rest, verdict])
    formats = [None, None, ",d", ",d", ".3g", ".3g", ".3g", ".3f", ".3f", ".3f", None]
    return {"columns": columns, "rows": rows, "formats": formats}


def failed(result: dict[str, Any]) -> list[str]:
    """Names of the methods that broke."""
    lines = [(name, line) for name, entry in result["entries"].items() for line in entry.get("methods", ())]
    return [f"{name}, {line['method']}: {line['status']}" for name, line in lines if line["status"].startswith("failed")]


def skipped(result: dict[str, Any]) -> list[str]:
    """What was left out, and why."""
    found = [f"{name}: {entry['status']}" for name, entry in result["entries"].items() if entry["status"] != "measured"]
    lines = [(name, line) for name, entry in result["entries"].items() for line in entry.get("methods", ())]
    return found + [f"{name}, {line['method']}: {line['status']}" for name, line in lines if line["status"].startswith("skipped")]


def _clean(device: torch.device) -> None:
    """Free what is left of the last method, and begin to measure memory anew."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
