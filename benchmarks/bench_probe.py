"""Whether a probe at run time pays: the embedded model.

    python benchmarks/bench_probe.py --threads 1 --out benchmarks/results/probe.json

deviation  Pairs of prompts from unlike to alike share most of the calls and are probed at every one of them, without parting: how far
           the members' predictions are from the group's, by the cosine of their prompts and by the call. Beside it the damage: how
           far the pictures come out from those that the members draw on their own from the same noise, which is what a probe should
           foresee, and how well deviation and cosine each rank it (Spearman).
quality    All prompts, grouped by likeness, at a flat share without a probe, and with one at several tolerances; next to each the
           rivals with about as many denoiser rows: a flat share chosen to that end, a stricter similarity chosen to that end, and
           fewer steps without sharing. Quality is the scorer's, as in bench_pipeline.py: identification within groups, and cosine of
           picture to caption; mean over the seeds, with the standard error of an identification over all pictures.
"""

import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from harness import environment, short, write_json
from pipeline_embedded import quality
from readme_tables import markdown_table
from tqdm import tqdm

import sage
from sage import Leaf, Probe, SharingPlan
from sage.emoji import GUIDANCE_SCALE, load_pipeline, load_scorer
from sage.seeds import leaf_seed

ROOT = Path(__file__).resolve().parent.parent
EDGES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of cosine
SIMILARITIES = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # thresholds of the plans that group less
SETTINGS = ("steps", "share", "calls", "tolerances", "seeds", "pairs", "guidance_scale", "threads", "quick")


def generate(pipe, prompts: list[str], plan: SharingPlan, args, **options):
    given = dict(num_inference_steps=args.steps, guidance_scale=args.guidance_scale, progress=False, max_rows=None) | options
    return sage.generate(pipe, prompts, plan=plan, **given)


# ---- deviation


def chosen_pairs(vectors: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    """(i, j, cosine) of pairs whose cosines are spread evenly over what there is."""
    rows, columns = np.triu_indices(len(vectors), 1)
    cosines = (vectors[rows] * vectors[columns]).sum(axis=1)
    found = []
    for wanted in np.linspace(max(0.3, cosines.min()), cosines.max(), count):
        at = int(np.abs(cosines - wanted).argmin())
        found.append((int(rows[at]), int(columns[at]), float(cosines[at])))
        cosines[at] = np.inf
    return found


def deviations(pipe, prompts: list[str], vectors: np.ndarray, args) -> dict:
    """The JSON of the pairs; deviations are [pairs][calls]."""
    pairs = chosen_pairs(vectors, args.pairs)
    asked = [prompts[i] for pair in pairs for i in pair[:2]]
    leaves = [Leaf(prompt) for prompt in asked]
    groups = [[2 * number, 2 * number + 1] for number in range(len(pairs))]
    parts = math.floor(0.6 * args.steps)
    plan = SharingPlan.flat(leaves, groups, parts / args.steps, representatives=[group[0] for group in groups])
    probe = Probe([call / args.steps for call in range(1, parts)], math.inf)
    shared = generate(pipe, asked, plan, args, probe=probe, output_type="latent")
    measured = [[group["deviation"] for group in made["groups"]] for made in shared.stats["probes"]]
    alone = own_pictures(pipe, asked, groups, args)
    apart = [(a - b).float().square().mean().item() for a, b in zip(shared.images, alone)]
    spread = torch.stack(list(alone)).float().var().item()
    damage = np.array(apart).reshape(-1, 2).mean(axis=1) / spread
    by_pair, cosines = np.array(measured).T, np.array([cosine for _, _, cosine in pairs])
    return {
        "calls": [made["call"] for made in shared.stats["probes"]],
        "pairs": [[prompts[i], prompts[j], short(cosine)] for i, j, cosine in pairs],
        "deviations": [[short(value) for value in row] for row in by_pair],
        "damage": [short(value) for value in damage],
        "rank_correlation": {
            "cosine and deviation": [short(spearman(cosines, column)) for column in by_pair.T],
            "deviation and damage": [short(spearman(column, damage)) for column in by_pair.T],
            "cosine and damage": short(spearman(cosines, damage)),
        },
        "table": deviation_table(cosines, by_pair, damage, shared.stats["probes"], args.steps),
    }


def own_pictures(pipe, asked: list[str], groups: list[list[int]], args) -> torch.Tensor:
    """Latents of every member on its own, from its group's noise: a plan in which groups part after no call but share their seed."""
    seeds = [None] * len(asked)
    for first, second in groups:
        seeds[first] = seeds[second] = leaf_seed(0, asked[first], 0)
    plan = SharingPlan.independent([Leaf(prompt) for prompt in asked])
    return generate(pipe, asked, plan, args, seeds=seeds, output_type="latent").images


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def deviation_table(cosines, by_pair, damage, probes: list[dict], steps: int) -> dict:
    """Medians by the pairs' cosine; a column for every other call."""
    calls = list(range(0, len(probes), 2))
    rows, bounds = [], [-1.0, *EDGES, 1.01]
    for low, high in pairwise(bounds):
        inside = (cosines >= low) & (cosines < high)
        if inside.any():
            name = f"below {high}" if low < 0 else f"from {low}" if high > 1 else f"{low} to {high}"
            values = [float(np.median(by_pair[inside, call])) for call in calls]
            rows.append([name, int(inside.sum()), *values, float(np.median(damage[inside]))])
    columns = ["cosine of the prompts", "pairs", *(f"call {probes[call]['call']} of {steps}" for call in calls), "damage"]
    return {"columns": columns, "rows": rows, "formats": [None, "d", *[".3f"] * len(calls), ".3f"]}


# ---- quality


def drawn(pipe, scorer, prompts, plan, groups, args, name: str, **options) -> dict:
    """One line: a method over all seeds."""
    found, nfe, parted, probed = [], 0, 0, 0
    for seed in range(args.seeds):
        result = generate(pipe, prompts, plan, args, seed=seed, output_type="np", **options)
        found.append(quality(scorer, np.stack(result.images), prompts, groups))
        nfe += result.stats["nfe"]
        probed += sum(made["rows"] for made in result.stats["probes"] or ())
        parted += sum(made["parted"] for made in result.stats["probes"] or ())
    identification = float(np.mean([one["identification"] for one in found]))
    pictures = args.seeds * found[0]["grouped"]
    return {
        "method": name,
        "steps": options.get("num_inference_steps", args.steps),
        "nfe": nfe / args.seeds,
        "probe_rows": probed / args.seeds,
        "parted_early": parted / args.seeds,
        "identification": identification,
        "standard_error": math.sqrt(identification * (1 - identification) / pictures),
        "cosine": float(np.mean([one["cosine"] for one in found])),
        "by_seed": found,
    }


def methods(pipe, scorer, prompts: list[str], embeddings, args) -> list[dict]:
    def plan_of(share, similarity=0.6):
        return sage.plan_prompts(prompts, embeddings, share=share, similarity=similarity)

    plan = plan_of(args.share)
    groups = [list(root.members) for root in plan.roots if len(root.members) > 1]
    independent = SharingPlan.independent(plan.leaves)
    known: dict[str, dict] = {}
    bar = tqdm(desc="methods")

    def add(name: str, plan: SharingPlan, **options) -> dict:
        if name not in known:
            known[name] = drawn(pipe, scorer, prompts, plan, groups, args, name, **options)
            bar.update()
        return known[name]

    add("no sharing", independent)
    first = [add(f"share {args.share:g}", plan)]
    first += [add(f"share {args.share:g}, tolerance {t:g}", plan, probe=Probe(args.calls, t)) for t in args.tolerances]
    for line in first:

        def nearest(plans: dict[str, SharingPlan]) -> tuple[str, SharingPlan]:
            return min(plans.items(), key=lambda named: abs(named[1].cost(args.steps).nfe - line["nfe"]))  # noqa: B023

        fewer = max(1, round(line["nfe"] / len(prompts)))
        add(f"{fewer} steps", independent, num_inference_steps=fewer)
        if line is not first[0]:
            add(*nearest({f"share {call / args.steps:g}": plan_of(call / args.steps) for call in range(args.steps)}))
            add(*nearest({f"share {args.share:g}, similarity {t:g}": plan_of(args.share, t) for t in SIMILARITIES}))
    bar.close()
    return list(known.values())


def quality_table(rows: list[dict]) -> dict:
    keys = ("method", "nfe", "probe_rows", "parted_early", "identification", "standard_error", "cosine")
    columns = ("method", "denoiser rows", "of them probes", "groups parted early", "identification", "± (one error)", "cosine")
    ordered = sorted(rows, key=lambda row: -row["nfe"])
    return {
        "columns": list(columns),
        "rows": [[row[key] for key in keys] for row in ordered],
        "formats": [None, ",.0f", ",.0f", ".1f", ".3f", ".3f", ".4f"],
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--prompts", default=str(ROOT / "examples" / "prompts.txt"), help="text file, a prompt per line")
    made.add_argument("--steps", type=int, default=10, help="denoiser calls (default: 10)")
    made.add_argument("--share", type=float, default=0.4, help="of the flat plan that is probed (default: 0.4)")
    made.add_argument("--calls", type=float, nargs="+", default=list(Probe().calls), metavar="F",
                      help="fractions of the calls at which to probe (default: those of sage.Probe)")
    made.add_argument("--tolerances", type=float, nargs="+", default=[0.4, 0.5, 0.6, 0.8], metavar="T")
    made.add_argument("--seeds", type=int, default=2, help="base seeds of the quality part (default: 2)")
    made.add_argument("--pairs", type=int, default=40, help="pairs of the deviation part (default: 40)")
    made.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    made.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    made.add_argument("--out", default=None, help="JSON to write")
    made.add_argument("--quick", action="store_true", help="everything small: seconds on a CPU")
    args = made.parse_args(words)  # fmt: skip
    if args.quick:
        args.steps, args.seeds, args.pairs, args.tolerances = 5, 1, 4, args.tolerances[:1]
    return args


def main(words: list[str] | None = None) -> int:
    args = parse(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts = [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = prompts[:12] if args.quick else prompts
    pipe, scorer, embeddings = load_pipeline(), load_scorer(), sage.embed_prompts(prompts)
    pipe.set_progress_bar_config(disable=True)
    settings = {key: getattr(args, key) for key in SETTINGS} | {"prompts": len(prompts), "encoder": embeddings.encoder}
    found, lines = deviations(pipe, prompts, embeddings.vectors, args), methods(pipe, scorer, prompts, embeddings, args)
    tables = {"deviation": found.pop("table"), "quality": quality_table(lines)}
    for table in tables.values():
        print(markdown_table(**table))
    print(found["rank_correlation"])
    result = {"environment": environment(), "settings": settings, "deviation": found, "quality": lines, "tables": tables}
    if args.out:
        write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
