"""What sharing costs when it saves nothing, and how well seconds follow denoiser rows when it does: the embedded model, one thread.

    python benchmarks/bench_overhead.py --out benchmarks/results/cpu_overhead.json

overhead  `sage.enable` with a plan in which nobody shares, against the pipeline's own call, in pairs whose order alternates: the
          median of the pairs' ratios, with a bootstrapped 95 % interval. Beside wall time stands the process's own processor time,
          which other processes on the machine disturb less.
host      microseconds of the processor per step and per call, with a denoiser that does nothing: what the loop, the hook and the
          scheduler cost themselves. What enabling adds to it, over a step, is the overhead again, with less noise.
clock     all prompts in groups of 4 and of 8, for 20, 40 and 60 % of the calls: seconds over the stock loop's, divided by denoiser
          rows over the stock loop's, which is 1 where seconds follow rows. In "pieces" stock calls draw 4 pictures and the denoiser
          is never given more rows at once; "at once" draws all of them in one call, so that shared calls are smaller than others.
"""

import argparse
import contextlib
import sys
import time

import numpy as np
import torch
from harness import environment, in_turn, short, spread, write_json
from pipeline_methods import Job, Method
from readme_tables import markdown_table
from tqdm import tqdm

from sage import SageScheduler
from sage.emoji import GUIDANCE_SCALE, load_pipeline

STOCK, ENABLED = Method("stock", "stock"), Method("enabled, share 0", "hook")
SHARED = Method("groups of 4", "hook", 0.9, 4)
PIECE = 4  # pictures of a stock call, where the clock goes by pieces
FEW, MANY = 10, 50  # steps of the calls whose difference is what a step costs
OVERHEAD_TARGET, CLOCK_TARGET = 0.02, 0.10
EMBEDS = ("prompt_embeds", "negative_prompt_embeds")


def embedded_job(pictures: int) -> Job:
    pipe, device = load_pipeline(), torch.device("cpu")
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        encoded = pipe.encode_prompt([f"picture {i}" for i in range(pictures)], device, 1, True)
    return Job(pipe, dict(zip(EMBEDS, encoded)), {"guidance_scale": GUIDANCE_SCALE}, EMBEDS, 2, 2, device)


def clocks(job: Job, method: Method, pictures: int, steps: int) -> tuple[float, float]:
    """(wall, processor) seconds of one call."""
    began = time.process_time()
    wall = job.run(method, pictures, steps)["seconds"]
    return wall, time.process_time() - began


def median_interval(values: np.ndarray) -> list[float]:
    """95 % interval of a median, by bootstrap."""
    draws = np.random.default_rng(0).choice(values, (4000, len(values)))
    return [short(bound) for bound in np.percentile(np.median(draws, axis=1), (2.5, 97.5))]


def overhead(job: Job, pictures: int, steps: int, pairs: int) -> dict:
    """One line of the JSON: enabled over stock, pair by pair."""
    job.batch = pictures
    samples = []
    for number in tqdm(range(pairs + 1), desc=f"overhead, {pictures} pictures", leave=False):
        order = (STOCK, ENABLED) if number % 2 else (ENABLED, STOCK)
        taken = {method: clocks(job, method, pictures, steps) for method in order}
        samples.append((taken[STOCK], taken[ENABLED]))
    samples = np.array(samples[1:])  # [pairs, stock or enabled, wall or processor]; the first pair warms up
    line = {"pictures": pictures, "steps": steps, "pairs": pairs}
    for number, clock in enumerate(("wall", "processor")):
        ratios = samples[:, 1, number] / samples[:, 0, number] - 1
        line[clock] = {"overhead": spread(ratios), "interval": median_interval(ratios)}
        line[clock] |= {"stock_ms_per_step": short(1e3 * np.median(samples[:, 0, number]) / steps), "ratios": [short(r) for r in ratios]}
    line["within_target"] = line["processor"]["overhead"]["median"] <= OVERHEAD_TARGET
    return line


@contextlib.contextmanager
def nothing_to_denoise(job: Job, pictures: int):
    """The denoiser hands over an output that lies ready."""
    unet = job.denoiser
    ready = torch.randn(2 * pictures, unet.config.out_channels, unet.config.sample_size, unet.config.sample_size)
    unet.forward = lambda sample, *args, **kwargs: (ready[: len(sample)],)
    try:
        yield
    finally:
        del unet.forward


@contextlib.contextmanager
def table_scheduler(job: Job):
    """The pipeline steps through the coefficient table, with or without sharing."""
    before = job.pipe.scheduler
    job.pipe.scheduler = SageScheduler.from_config(before.config)
    try:
        yield
    finally:
        job.pipe.scheduler = before


def host(job: Job, pictures: int, seconds: float) -> dict:
    """Microseconds of the processor per step and per call, of the least disturbed of many calls."""

    def sampler(method: Method, steps: int, setting=contextlib.nullcontext):
        def sample():
            with setting():
                return clocks(job, method, pictures, steps)[1]

        return sample

    job.batch = pictures
    ways = {"stock": (STOCK,), "stock, table scheduler": (STOCK, lambda: table_scheduler(job)), "enabled, share 0": (ENABLED,)}
    if pictures >= SHARED.group:
        ways |= {"enabled, groups of 4": (SHARED,)}
    with nothing_to_denoise(job, pictures):
        samplers = {(name, steps): sampler(way[0], steps, *way[1:]) for name, way in ways.items() for steps in (FEW, MANY)}
        samples = in_turn(samplers, seconds=seconds, most=200)
    line = {"pictures": pictures}
    for name in ways:
        few, many = (min(samples[name, steps]) for steps in (FEW, MANY))
        each = (many - few) / (MANY - FEW)
        line[name] = {"us_per_step": short(1e6 * each), "us_per_call": short(1e6 * (few - FEW * each))}
    return line


def clock(job: Job, pictures: int, batch: int, shares: list[float], steps: int, rounds: int) -> list[dict]:
    """Lines of the JSON: time ratio over row ratio of every share and group size."""
    job.batch = batch
    sharing = [Method(f"groups of {group}, share {share:g}", "hook", share, group) for group in (4, 8) for share in shares]
    todo = [STOCK, ENABLED, *sharing]
    samples: dict[Method, list] = {method: [] for method in todo}
    nfe = {method: job.run(method, pictures, steps)["nfe"] for method in todo}  # and warm up
    for _ in tqdm(range(rounds), desc=f"clock, {batch} pictures at once", leave=False):
        for method in todo:
            samples[method].append(clocks(job, method, pictures, steps))
    taken = {method: np.array(values) for method, values in samples.items()}
    lines = []
    for method in todo[1:]:
        rows = nfe[method] / nfe[STOCK]
        line = {"pictures at once": batch, "method": method.name, "nfe": nfe[method], "row_ratio": short(rows)}
        for number, name in enumerate(("wall", "processor")):
            ratios = taken[method][:, number] / taken[STOCK][:, number]
            line[name] = {"time_ratio": spread(ratios), "time_per_row": short(np.median(ratios) / rows)}
            line[name]["ratios"] = [short(ratio) for ratio in ratios]
        lines.append(line | {"within_target": line["processor"]["time_per_row"] <= 1 + CLOCK_TARGET})
    return lines


def tables(result: dict) -> dict:
    """For readme_tables.py."""
    hosts = {line["pictures"]: line for line in result["host"]}
    overhead_rows, clock_rows = [], []
    for line in result["overhead"]:
        by_host = hosts[line["pictures"]]
        added = [by_host["enabled, share 0"][what] - by_host["stock"][what] for what in ("us_per_step", "us_per_call")]
        own, steps = line["processor"], line["steps"]
        share = (added[0] + added[1] / steps) / (1e3 * own["stock_ms_per_step"])
        bounds = "{:+.1%} to {:+.1%}".format(*own["interval"])
        overhead_rows.append([line["pictures"], own["stock_ms_per_step"], own["overhead"]["median"], bounds, *added, share])
    for line in result["clock"]:
        way = "pieces" if line["pictures at once"] == PIECE else "at once"
        per_row = [line[name]["time_per_row"] for name in ("wall", "processor")]
        clock_rows.append([way, line["method"], line["nfe"], line["row_ratio"], line["processor"]["time_ratio"]["median"], *per_row])
    columns = ["pictures", "step, ms", "overhead", "95 % interval", "added by the host, µs per step", "µs per call", "of a step"]
    ratios = ["rows / stock's", "time / stock's", "time / rows, wall", "time / rows"]
    return {
        "overhead": {"columns": columns, "rows": overhead_rows, "formats": [None, ".0f", "+.1%", None, ".0f", ".0f", ".1%"]},
        "clock": {
            "columns": ["denoiser's rows", "method", "nfe", *ratios],
            "rows": clock_rows,
            "formats": [None, None, ",d", ".3f", ".3f", ".2f", ".2f"],
        },
    }


def run(args) -> dict:
    job = embedded_job(args.pictures)
    sizes = sorted({1, min(8, args.pictures), args.pictures})
    with tqdm(total=2 * len(sizes) + 2, desc="parts") as bar:

        def done(part):
            bar.update()
            return part

        hosts = [done(host(job, size, args.seconds)) for size in sizes]
        lines = [done(overhead(job, size, args.steps, pairs)) for size, pairs in zip(sizes, args.pairs)]
        batches = (PIECE, args.pictures)
        followed = [done(clock(job, args.pictures, batch, args.shares, args.clock_steps, args.rounds)) for batch in batches]
    result = {
        "environment": environment(),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "targets": {"overhead": OVERHEAD_TARGET, "clock": CLOCK_TARGET},
        "overhead": lines,
        "host": hosts,
        "clock": [line for part in followed for line in part],
    }
    return result | {"tables": tables(result)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32, help="of the clock, and the most of the overhead (default: 32)")
    parser.add_argument("--steps", type=int, default=10, help="of the overhead's calls (default: 10)")
    parser.add_argument("--pairs", type=int, nargs=3, default=[150, 40, 10], metavar="N",
                        help="pairs of calls of 1, 8 and all pictures (default: 150 40 10)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.4, 0.6], help="of the clock (default: 0.2 0.4 0.6)")
    parser.add_argument("--clock-steps", type=int, default=5, help="of the clock's calls (default: 5)")
    parser.add_argument("--rounds", type=int, default=6, help="of the clock, all methods in turn (default: 6)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of the host's part, for each number of pictures (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--quick", action="store_true", help="8 pictures, one round")
    parser.add_argument("--out", default=None, help="JSON to write")
    args = parser.parse_args()  # fmt: skip
    if args.quick:
        args.pictures, args.steps, args.pairs, args.rounds, args.seconds = 8, 2, [1, 1, 1], 1, 0.1
    torch.set_num_threads(args.threads)
    result = run(args)
    for table in result["tables"].values():
        print(markdown_table(**table), end="\n\n")
    if args.out:
        write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
