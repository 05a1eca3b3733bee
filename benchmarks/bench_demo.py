"""Time the demo: no sharing, sharing, and fewer steps at the cost of sharing, in one process and in turns.

    python benchmarks/bench_demo.py [--repeats 5] [--share 0.4] [--out benchmarks/results/demo.json]

Before anything is timed, the pictures that share with nobody are compared with the run without sharing. Seconds are those of
the whole request (plan included for sharing, as a user waits for it), from prompts to decoded pictures, model loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from sage import SharingPlan, generate
from sage.emoji import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, load_pipeline
from sage.generation import seeded
from sage.info import command_line, machine, versions
from sage.planning import Grouping, make_plan
from sage.prompts import read_prompts

ROOT = Path(__file__).resolve().parent.parent
LEVELS = 1  # of 255: what the denoiser's own rounding may do to a picture when the batch is another one


def contenders(pipe, prompts, share: float, steps: int) -> dict:
    """Name → function that makes all pictures and returns (pictures, stats)."""
    grouping = Grouping(share=share)

    def make(plan, steps):
        options = dict(num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, progress=False)
        result = generate(pipe, list(prompts.prompts), plan=plan, **options)
        return result.images, result.stats

    def planned():
        return seeded(make_plan(prompts, grouping, pipe)[0])

    plan = planned()
    alone = SharingPlan.independent(plan.leaves)
    fewer = max(1, round(steps * (1 - plan.cost(steps).saving)))
    return {
        f"no sharing, {steps} steps": lambda: make(alone, steps),
        f"shared, {steps} steps, share {share:g}": lambda: make(planned(), steps),
        f"no sharing, {fewer} steps": lambda: make(alone, fewer),
    }


def check(pipe, prompts, share: float, steps: int, runs: dict) -> int:
    """Largest difference of the lone pictures from the unshared ones, in levels of 255; refuses more than rounding."""
    plan, _ = make_plan(prompts, Grouping(share=share), pipe)
    (unshared, _), (shared, _) = (run() for run in list(runs.values())[:2])
    lone = [root.members[0] for root in plan.roots if len(root.members) == 1]
    distance = max(int(np.abs(np.asarray(shared[i], int) - np.asarray(unshared[i], int)).max()) for i in lone)
    if distance > LEVELS:
        raise SystemExit(f"not timed: a picture that shares with nobody differs by {distance} of 255 levels")
    return distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", default=ROOT / "examples" / "prompts.txt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=NUM_INFERENCE_STEPS)
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results" / "demo.json")
    args = parser.parse_args()
    prompts, pipe = read_prompts(args.prompts), load_pipeline()
    runs = contenders(pipe, prompts, args.share, args.steps)
    distance = check(pipe, prompts, args.share, args.steps, runs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    stats = {}
    for _ in range(args.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            _, stats[name] = run()
            seconds[name].append(time.perf_counter() - start)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(record(prompts, seconds, stats, distance), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}; python benchmarks/readme_tables.py puts it into the README")


def record(prompts, seconds: dict[str, list[float]], stats: dict[str, dict], distance: int) -> dict:
    """The JSON of one run: table, raw samples, and where it ran."""
    first = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, samples in seconds.items():
        median = statistics.median(samples)
        nfe, independent = stats[name]["nfe"], next(iter(stats.values()))["nfe"]
        spread = f"{min(samples):.1f}–{max(samples):.1f}"
        rows.append([f"{name}", nfe, 1 - nfe / independent, median, spread, 1 - median / first, len(prompts) / median])
    columns = [f"{len(prompts)} prompts", "denoiser rows", "rows saved", "seconds", "min–max", "time saved", "pictures/s"]
    return {
        "table": {"columns": columns, "rows": rows, "formats": [None, ",d", ".1%", ".1f", None, ".1%", ".1f"]},
        "seconds": seconds,
        "stats": stats,
        "lone_pictures_differ_by_levels": distance,
        "command": command_line(),
        "versions": versions(),
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
