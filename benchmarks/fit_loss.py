"""Measures what sharing costs in quality, by likeness and share, with the embedded model, and fits the table that plans are made by.

    python benchmarks/fit_loss.py --threads 1 --out benchmarks/results/loss.json --table sage/loss_table.json

Pairs of the benchmark's captions are drawn evenly over bins of their cosine. Both pictures of a pair begin from one noise, so that
they differ from their unshared selves by sharing alone. The loss of a picture is what it measures unshared minus shared: above 0
where sharing harms. Measured are two things by the scorer:

cosine  of the picture and its own caption
margin  that cosine less the picture's cosine to the other caption of the pair: whether the two can still be told apart

The table is of the margin: pictures that share come to look like each other, while one that looks like both captions may be no
worse by its own. Both losses are small beside what pictures differ in by chance. The fit k·(1 − cosine)^a·share^b, with a > 0 and
1 ≤ b ≤ 8, goes through all pairs, the loss of a pair being the mean of its pictures'. Intervals are of 95 %, by bootstrap over pairs.

    python benchmarks/fit_loss.py --again benchmarks/results/loss.json --measure cosine --table table.json     fit, but draw nothing
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from harness import environment, short, write_json
from readme_tables import markdown_table
from tqdm import tqdm

import sage
from sage.emoji import GUIDANCE_SCALE, benchmark, load_pipeline, load_scorer
from sage.loss import LossTable, fit_power

BINS = np.round(np.arange(0.2, 1.01, 0.1), 1)
MEASURES = ("cosine", "margin")
UNITS = {"cosine": "cosine of picture and own prompt", "margin": "cosine of picture and own prompt less that of the other prompt"}
SETTINGS = ("steps", "shares", "pairs", "seed", "batch", "guidance_scale", "quick")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--measure", choices=MEASURES, default="margin", help="what the table is of (default: margin)")
    made.add_argument("--steps", type=int, default=10, help="denoiser calls (default: 10)")
    made.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8], metavar="SHARE",
                      help="fractions of the calls that pairs share (default: 0.2 0.4 0.6 0.8)")
    made.add_argument("--pairs", type=int, default=40, help="pairs in each bin of cosine, 0.1 wide, where there are so many (default: 40)")
    made.add_argument("--seed", type=int, default=0, help="chooses the pairs; pair i begins from noise of seed + i (default: 0)")
    made.add_argument("--batch", type=int, default=16, help="pairs drawn in one call (default: 16)")
    made.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE, help=f"default: {GUIDANCE_SCALE}")
    made.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    made.add_argument("--out", default=None, help="JSON to write")
    made.add_argument("--again", default=None, metavar="JSON", help="fit the losses that an earlier run wrote into its --out")
    made.add_argument("--table", default=None, help="loss table to write, for sage.loss")
    made.add_argument("--quick", action="store_true", help="two pairs a bin: seconds on a CPU")
    return made  # fmt: skip


def choose(cosines: np.ndarray, count: int, seed: int) -> list[tuple[int, int]]:
    """`count` pairs of captions from each bin of their cosine, fewer where there are fewer."""
    rng = np.random.default_rng(seed)
    first, second = np.triu_indices(len(cosines), 1)
    chosen = []
    for low, high in zip(BINS, BINS[1:]):
        inside = np.flatnonzero((cosines[first, second] >= low) & (cosines[first, second] < high))
        picked = rng.permutation(inside)[:count]
        chosen += list(zip(first[picked].tolist(), second[picked].tolist()))
    return chosen


def scores(pipe, scorer, pairs: list[tuple[str, str]], seeds: list[int], share: float, args) -> np.ndarray:
    """[MEASURES, pairs, 2], of both pictures of each pair."""
    prompts = [caption for pair in pairs for caption in pair]
    leaves = [sage.Leaf(caption, number // 2) for number, caption in enumerate(prompts)]
    plan = sage.SharingPlan.flat(leaves, [(2 * i, 2 * i + 1) for i in range(len(pairs))], share)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds for _ in range(2)]
    with sage.enable(pipe, plan):
        images = pipe(prompts, generator=generators, num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
                      output_type="np").images
    pictures = scorer.embed_images(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2) * 2 - 1)
    texts = scorer.embed_texts(prompts)
    others = texts.reshape(len(pairs), 2, -1).flip(1).reshape(texts.shape)
    own, other = ((pictures * captions).sum(1).reshape(-1, 2).numpy().astype(np.float64) for captions in (texts, others))
    return np.stack([own, own - other])


def measure(pairs: list[tuple[str, str]], args) -> tuple[np.ndarray, np.ndarray]:
    """What pairs measure unshared [MEASURES, pairs], and what they lose [MEASURES, pairs, shares]: means over their pictures."""
    pipe, scorer = load_pipeline(), load_scorer()
    pipe.set_progress_bar_config(disable=True)
    unshared, losses = [], []
    with tqdm(total=len(pairs), desc="pairs") as bar:
        for start in range(0, len(pairs), args.batch):
            part = pairs[start : start + args.batch]
            seeds = [args.seed + start + i for i in range(len(part))]
            alone, *shared = (scores(pipe, scorer, part, seeds, share, args) for share in (0.0, *args.shares))
            unshared.append(alone)
            losses.append(np.stack([alone - own for own in shared], axis=2))
            bar.update(len(part))
    return np.concatenate(unshared, axis=1).mean(axis=-1), np.concatenate(losses, axis=1).mean(axis=-1)


def interval(values: np.ndarray, axis: int = 0) -> list:
    low, high = np.percentile(values, (2.5, 97.5), axis=axis)
    return [short(low), short(high)]


def bins(cosines: np.ndarray, losses: np.ndarray, shares: list[float], table: LossTable) -> list[dict]:
    """Mean loss, its interval and what the fit says, for every bin and share."""
    rng, rows = np.random.default_rng(0), []
    for low, high in zip(BINS, BINS[1:]):
        inside = np.flatnonzero((cosines >= low) & (cosines < high))
        draws = rng.integers(0, len(inside), (2000, len(inside))) if len(inside) else None
        for number, share in enumerate(shares if len(inside) else []):
            of_pairs = losses[inside, number]
            rows.append({"similarity": [float(low), float(high)], "share": share, "pairs": len(inside), "loss": short(of_pairs.mean()),
                         "interval": interval(of_pairs[draws].mean(axis=1)),
                         "fitted": short(table(cosines[inside], share).mean())})  # fmt: skip
    return rows


def samples(cosines: np.ndarray, losses: np.ndarray, shares: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(similarity, share, loss), one of each per pair and share."""
    return np.repeat(cosines, len(shares)), np.tile(shares, len(cosines)), losses.ravel()


def uncertainty(cosines: np.ndarray, losses: np.ndarray, shares: list[float], draws: int) -> dict:
    """Intervals of the fitted parameters, and of the fitted loss at a cosine of 0.6 and a share of 0.4."""
    rng, found = np.random.default_rng(0), []
    for _ in tqdm(range(draws), desc="bootstrap"):
        chosen = rng.integers(0, len(cosines), len(cosines))
        similarity, share, loss = samples(cosines[chosen], losses[chosen], shares)
        k, a, b = fit_power(1 - similarity, share, loss)
        found.append((k, a, b, k * 0.4**a * 0.4**b))
    return dict(zip(("k", "a", "b", "at 0.6, 0.4"), np.array(found).T.tolist())) if found else {}


def fitted(cosines: np.ndarray, losses: np.ndarray, shares: list[float], quick: bool, about: dict) -> tuple[dict, LossTable]:
    """What the JSON says of one measure, and its table. losses: [pairs, shares]."""
    similarity, share, loss = samples(cosines, losses, shares)
    table = LossTable.fit(similarity, share, loss, about)
    rows = bins(cosines, losses, shares, table)
    spread = uncertainty(cosines, losses, shares, 20 if quick else 300)
    inside = [row["interval"][0] <= row["fitted"] <= row["interval"][1] for row in rows]
    found = {key: short(table.provenance[key]) for key in ("k", "a", "b", "samples", "residual")}
    found |= {"intervals": {name: interval(np.array(values)) for name, values in spread.items()},
              "standard_deviation": short(loss.std()), "explained_variance": short(1 - table.provenance["residual"] ** 2 / loss.var()),
              "bins_inside_interval": f"{sum(inside)} of {len(inside)}",
              "largest_bin_residual": short(max(abs(row["loss"] - row["fitted"]) for row in rows)), "bins": rows}  # fmt: skip
    table.provenance["intervals"] = found["intervals"]
    return found, table


def drawn(args) -> dict:
    """The part of the JSON that is measured."""
    captions = [scene.caption for scene in benchmark()]
    embeddings = sage.embed_prompts(captions)
    cosines = embeddings.vectors.astype(np.float64) @ embeddings.vectors.T.astype(np.float64)
    chosen = choose(cosines, 2 if args.quick else args.pairs, args.seed)
    unshared, losses = measure([(captions[a], captions[b]) for a, b in chosen], args)
    return {
        "environment": environment(),
        "settings": {key: getattr(args, key) for key in SETTINGS} | {"pairs_measured": len(chosen), "encoder": embeddings.encoder},
        "unshared": {name: {"mean": short(values.mean()), "standard_deviation": short(values.std())}
                     for name, values in zip(MEASURES, unshared)},
        "raw": {"columns": ["cosine", *(f"{name}, share {share:g}" for name in MEASURES for share in args.shares)],
                "pairs": [[short(cosines[pair]), *np.round(losses[:, i].ravel(), 5).tolist()] for i, pair in enumerate(chosen)]},
    }  # fmt: skip


def fits_of(data: dict, measure: str, quick: bool) -> tuple[dict, LossTable]:
    """The JSON with the fits of what was drawn, and the loss table of one measure."""
    settings, raw = data["settings"], np.array(data["raw"]["pairs"])
    shares, count = settings["shares"], settings["pairs_measured"]
    losses = raw[:, 1:].reshape(count, len(MEASURES), len(shares))
    about = {"command": data["environment"]["command"], "processor": data["environment"]["processor"], "model": "sage.emoji",
             "encoder": settings["encoder"], "steps": settings["steps"], "pairs": count, "shares": shares,
             "seeds": [settings["seed"], settings["seed"] + count - 1]}  # fmt: skip
    fits, tables = {}, {}
    for number, name in enumerate(MEASURES):
        unit = f"{UNITS[name]}, by the scorer of sage.emoji, unshared minus shared"
        fits[name], tables[name] = fitted(raw[:, 0], losses[:, number], shares, quick, about | {"measure": name, "unit": unit})
    readables = {name: readable(fits[name]["bins"], shares) for name in MEASURES}
    head = {key: data[key] for key in ("environment", "settings", "unshared")}
    return head | {"measure": measure, "fits": fits, "tables": readables, "table": readables[measure], "raw": data["raw"]}, tables[measure]


def readable(rows: list[dict], shares: list[float]) -> dict:
    """The table of the README: measured mean, its interval, and the fit, for each bin and share."""
    lines: dict[str, list] = {}
    for row in rows:
        low, high = row["interval"]
        name = "{:.1f} – {:.1f}".format(*row["similarity"])
        lines.setdefault(name, [name]).append(f"{row['loss']:+.3f} ({low:+.3f} … {high:+.3f}), {row['fitted']:.3f}")
    return {"columns": ["cosine", *(f"share {share:g}: measured (95 %), fitted" for share in shares)], "rows": list(lines.values())}


def main(words: list[str] | None = None) -> int:
    args = parser().parse_args(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    data = json.loads(Path(args.again).read_text(encoding="utf-8")) if args.again else drawn(args)
    result, table = fits_of(data, args.measure, args.quick)
    for name in MEASURES:
        print(f"\n{name}\n{markdown_table(**result['tables'][name])}")
        print({key: value for key, value in result["fits"][name].items() if key != "bins"})
    if args.out:
        write_json(args.out, result)
    if args.table:
        table.save(Path(args.table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
