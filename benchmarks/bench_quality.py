"""What sharing costs in quality: the embedded model's whole benchmark under three solvers, as docs/quality.md shows it.

    python benchmarks/bench_quality.py --out benchmarks/results/quality.json --plot benchmarks/results/quality.png

Each solver is one `sage evaluate`, left in its own folder below --work and gone on with when it was stopped; a solver may also be drawn
by a process of its own (--solver NAME, without --out), and what is finished is collected by a last run. Everything that the tables say
comes from the results.json of those folders, of which the JSON keeps what the tables need.
"""

import argparse
import sys
from pathlib import Path

import torch
from harness import ROOT, environment, write_json
from quality_tables import tables

import sage
from sage.evaluation.command import Evaluation
from sage.evaluation.folder import read_results
from sage.evaluation.plot import plot
from sage.evaluation.request import Request

SOLVERS = ("ddim", "dpm++2m", "unipc")
STEPS = (15, 12, 10, 8, 6, 5, 4, 3)
COMFORTABLE = (15, 10)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BUDGETS = (0.9, 0.8, 0.7)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, default=ROOT / "build" / "quality", help="folder of the evaluations (default: build/quality)")
    made.add_argument("--solver", action="append", choices=SOLVERS, help="draw this one only; may be repeated (default: all)")
    made.add_argument("--adapter", action="append", default=[], metavar="LORA", help="draw everything with this LoRA too")
    made.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    made.add_argument("--quick", action="store_true", help="a few prompts and steps: proves the chain")
    made.add_argument("--out", default=None, help="JSON to write, of all solvers that are finished")
    made.add_argument("--plot", default=None, help="PNG to write: quality by cost")
    return made


def request(solver: str, args: argparse.Namespace) -> Request:
    folder = args.work / solver.replace("+", "p")
    usual = {"quick": True} if args.quick else {
        "steps": STEPS, "comfortable": COMFORTABLE, "shares": SHARES, "budgets": BUDGETS, "images_per_prompt": 4}
    return Request(out=str(folder), solvers=(solver,), adapters=tuple(args.adapter), resume=(folder / "evaluation.json").is_file(), **usual)


def draw(solver: str, args: argparse.Namespace) -> None:
    asked = request(solver, args)
    if _finished(Path(asked.out)) is None:
        Evaluation(asked, None, print, progress=sys.stderr.isatty()).run()


def _finished(folder: Path) -> dict | None:
    """The results in a folder; None where they are not there yet."""
    path = folder / "results.json"
    return read_results(path) if path.is_file() else None


def collected(args: argparse.Namespace) -> list[dict]:
    found = [_finished(Path(request(solver, args).out)) for solver in SOLVERS]
    return [results for results in found if results is not None]


def condensed(results: dict) -> dict:
    """Of one results.json: what was asked, found and measured, without the differences that no table shows."""
    spec = next(iter(results["metrics"]))
    solver = results["solvers"][0]
    rows = []
    for row in solver["methods"]:
        metrics = {name: _numbers(of) | {key: _numbers(of[key]) for key in ("to_reference", "to_rival", "to_own") if key in of}
                   for name, of in row["metrics"][spec].items()}
        rows.append({key: row[key] for key in KEPT} | {"metrics": metrics})
    return {
        "command": results["command"], "settings": results["settings"], "versions": results["versions"], "machine": results["machine"],
        "prompts": results["prompts"], "real": {name: _numbers(of) for name, of in results["real"][spec].items()},
        "floor": {name: _numbers(of) for name, of in results["floor"][spec].items()}, "solver": solver["solver"], "knee": solver["knee"],
        "reference": solver["reference"], "reference_steps": solver["reference_steps"], "recommended": solver["recommended"],
        "recommended_sharing": solver["recommended_sharing"], "methods": rows, "small": results["small"],
    }


KEPT = ("key", "label", "kind", "steps", "value", "adapter", "shares", "shared_calls", "num_calls", "pictures", "nfe", "rows_per_picture",
        "saved", "denoise_seconds_per_picture", "denoise_seconds_saved", "seconds_saved", "rival", "within", "within_each")


def _numbers(estimate: dict) -> dict:
    """An interval to five digits."""
    return {key: float(f"{estimate[key]:.5g}") for key in ("value", "low", "high") if estimate.get(key) is not None}


def write(args: argparse.Namespace) -> None:
    found = collected(args)
    if not found:
        sys.exit(f"bench_quality: nothing is finished in {args.work}; run without --out first, or wait")
    short = [condensed(results) for results in found]
    if args.out:
        write_json(args.out, {"environment": environment(), "evaluations": short, "tables": tables(short, _schedules(short))})
    if args.plot:
        plot(found[0] | {"solvers": [solver for results in found for solver in results["solvers"]]}, args.plot)


def _schedules(evaluations: list[dict]) -> dict[tuple[str, int], list[float]]:
    """(solver, steps) → log signal-to-noise ratio at each denoiser call."""
    pipe = sage.emoji.load_pipeline()
    alphas = pipe.scheduler.alphas_cumprod.double()
    found = {}
    for told in evaluations:
        for steps in sorted({row["steps"] for row in told["methods"]}):
            scheduler = sage.SageScheduler.from_config(pipe.scheduler.config, solver=told["settings"]["solver"][0])
            scheduler.set_timesteps(steps)
            level = alphas[scheduler.timesteps.long()]
            found[told["solver"], steps] = torch.log(level / (1 - level)).tolist()
    return found


def main() -> None:
    args = parser().parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    for solver in args.solver or SOLVERS:
        draw(solver, args)
    if args.out or args.plot:
        write(args)


if __name__ == "__main__":
    main()
