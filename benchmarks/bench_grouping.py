"""Grouping and planning: how fast, in how much memory, how complete, and what plans save.

    python benchmarks/bench_grouping.py --prompts FOLDER --out benchmarks/results/cpu_grouping.json
    python benchmarks/bench_grouping.py --prompts prompts.txt --quick
    python benchmarks/bench_grouping.py --prompts FOLDER --device cuda --parts exact --sizes-exact 1000000

rivals       sage's groups (cliques) against sentence-transformers' community_detection (stars, a weaker guarantee) and scikit-learn's
             complete linkage, on the same embeddings at the same threshold: in turn, each in a process of its own
exact        all pairs of many prompts        approximate  likely pairs of more
candidates   ways to find likely pairs: faiss's inverted lists and hnswlib's graph, with more and more work until they find as many as
             asked for, and the cells that sage uses
sets         what flat plans and trees save on each prompt file, at equal expected loss
packing      denoiser launches that the packs of the plans need    planning     from embeddings to a plan: seconds

Every measurement is a process of its own: seconds of the work alone, and the peak memory of the process with what it had loaded.
What is missing (sentence-transformers, scikit-learn, faiss, hnswlib) is left out, and the JSON says so.
"""

import argparse
import concurrent.futures
import importlib.util
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import grouping_data
import numpy as np
from harness import environment, short, spread, write_json
from readme_tables import markdown_table
from tqdm import tqdm

CAP = 8
PACK_ROWS = 32
DEGREE = 50
RIVALS = {"community_detection": "sentence_transformers", "scikit-learn": "sklearn"}
SKLEARN_MOST = 10_000  # it keeps all pairs in float64
CANDIDATES = {  # way → (module, what to try until enough pairs are found)
    "sage cells": ("faiss", [{}]),
    "faiss IVF": ("faiss", [{"probes": probes} for probes in (8, 16, 32, 64, 128)]),
    "hnswlib": ("hnswlib", [{"neighbours": neighbours} for neighbours in (64, 128, 256, 512)]),
}
TARGETS = {"faster_than_community_detection": 5, "exact_100k_seconds": 90, "exact_100k_gb": 2, "approximate_1m_seconds": 900,
           "approximate_1m_gb": 8, "recall": 0.97, "tree_over_flat": 1.5, "planning_seconds": 1}  # fmt: skip
GPU_TARGETS = {"exact_1m_seconds": 60}


# ---- contenders: run in a process of their own; vectors float32 [n, d] of length 1


def sage_groups(vectors, similarity, **options):
    from sage.grouping import find_groups

    keys = [f"{number:08d}" for number in range(len(vectors))]
    found = find_groups(vectors, keys, similarity, CAP, **options)
    shared = sum(len(members) for members, _ in found.groups if len(members) > 1)
    return {"groups": len(found.groups), "in_groups": shared, "edges": found.num_edges, "rounds": found.rounds,
            "search": found.search, "recall": short(found.recall)}  # fmt: skip


def community_detection(vectors, similarity):
    import torch
    from sentence_transformers.util import community_detection as detect

    found = detect(torch.from_numpy(vectors), threshold=similarity, min_community_size=2)
    return {"groups": len(found), "in_groups": sum(map(len, found))}


def scikit_learn(vectors, similarity):
    from sklearn.cluster import AgglomerativeClustering

    options = dict(n_clusters=None, distance_threshold=1 - similarity, metric="cosine", linkage="complete")
    return {"groups": int(AgglomerativeClustering(**options).fit(vectors).n_clusters_)}


def faiss_ivf(vectors, similarity, probes):
    import faiss
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    quantizer = faiss.IndexFlatIP(vectors.shape[1])
    index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], int(2 * len(vectors) ** 0.5), faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = 8, 64
    index.train(vectors)
    index.add(vectors)
    index.nprobe = probes
    limits, _, found = index.range_search(vectors, similarity)
    return pairs_found(np.repeat(np.arange(len(vectors)), np.diff(limits.astype(np.int64))), found, len(vectors))


def hnsw(vectors, similarity, neighbours):
    import hnswlib
    import torch

    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(len(vectors), ef_construction=100, M=16, random_seed=0)
    index.set_num_threads(torch.get_num_threads())
    index.add_items(vectors)
    index.set_ef(max(neighbours, 100))
    found, distances = index.knn_query(vectors, k=min(neighbours, len(vectors)))
    kept = 1 - distances >= similarity
    return pairs_found(np.repeat(np.arange(len(vectors)), kept.sum(axis=1)), found[kept], len(vectors))


def all_pairs(vectors, similarity):
    from sage.similarity import in_millionths, on_grid
    from sage.threshold_graph import Products, exact_edges

    products, nodes = Products(on_grid(vectors, "vectors")), np.arange(len(vectors), dtype=np.int32)
    return {"pairs": sum(map(len, exact_edges(products, nodes, in_millionths(similarity, "similarity"))))}


def sage_cells(vectors, similarity):
    from sage.cells import cell_edges, find_cells
    from sage.similarity import in_millionths, on_grid
    from sage.threshold_graph import Products

    products, nodes = Products(on_grid(vectors, "vectors")), np.arange(len(vectors), dtype=np.int32)
    least = in_millionths(similarity, "similarity")
    cells = find_cells(products, nodes, least, TARGETS["recall"])
    edges = np.concatenate(list(cell_edges(products, nodes, cells, least)))
    return pairs_found(edges[:, 0], edges[:, 1], len(vectors)) | {"probes": cells.probes.shape[1], "cells": cells.count}


def pairs_found(rows, others, count):
    """The number of different pairs."""
    rows, others = rows.astype(np.int64), others.astype(np.int64)
    pairs = np.unique(np.minimum(rows, others)[rows != others] * count + np.maximum(rows, others)[rows != others])
    return {"pairs": len(pairs)}


WORK = {"sage": sage_groups, "community_detection": community_detection, "scikit-learn": scikit_learn, "faiss IVF": faiss_ivf,
        "hnswlib": hnsw, "sage cells": sage_cells, "all pairs": all_pairs}  # fmt: skip


def measured(name, path, similarity, threads, options):
    """In a fresh process: load, import, work."""
    import torch

    torch.set_num_threads(threads)
    work, vectors = WORK[name], np.load(path)
    work(vectors[:300], similarity, **options)  # imports, and what libraries do at first
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    start = time.perf_counter()
    said = work(vectors, similarity, **options)
    seconds = time.perf_counter() - start
    return {"seconds": short(seconds), "peak_gb": short(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6),
            "loaded_gb": short(loaded), **said}  # fmt: skip


def apart(name, path, similarity, threads, **options):
    """`measured` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measured, name, path, similarity, threads, options).result()


# ---- parts


class Bench:
    """What all parts work on."""

    def __init__(self, args, folder):
        self.args, self.folder, self.missing = args, Path(folder), set()
        self.sets = {path.name: grouping_data.read_set(path) for path in grouping_data.files(args.prompts)}
        self._source = None

    def vectors(self, count):
        """(path of float32 [count, d], the similarity at which one has DEGREE neighbours or fewer, how many it has)."""
        path = self.folder / f"{count}.npy"
        if not path.exists():
            self._source = self._source or grouping_data.Source(list(dict.fromkeys(p for prompts, _ in self.sets.values() for p in prompts)))
            np.save(path, self._source.draw(count, count))
        return path, *grouping_data.threshold_for(np.load(path, mmap_mode="r"), DEGREE)

    def has(self, module):
        found = importlib.util.find_spec(module) is not None
        if not found:
            self.missing.add(module)
        return found


def rivals(bench):
    lines = []
    for count in bench.args.sizes:
        path, similarity, _ = bench.vectors(count)
        names = ["sage", *(name for name, module in RIVALS.items() if bench.has(module))]
        runs = {name: [] for name in names}
        for turn in tqdm(range(bench.args.rounds), desc=f"rivals, {count:,} prompts"):
            for name in names:
                if name != "scikit-learn" or (count <= SKLEARN_MOST and turn == 0):
                    runs[name].append(apart(name, path, similarity, bench.args.threads))
        for name, taken in runs.items():
            if taken:
                line = {"contender": name, "prompts": count, "similarity": similarity, **taken[0]}
                line["seconds"] = spread([run["seconds"] for run in taken])
                over = [run["seconds"] / ours["seconds"] for run, ours in zip(taken, runs["sage"])]
                lines.append(line | {"times_sage": spread(over)})
    return lines


def exact(bench):
    options = {"search": "exact", "device": bench.args.device}
    return [large(bench, "sage", count, options) for count in tqdm(bench.args.sizes_exact, desc="exact")]


def approximate(bench):
    if not bench.has("faiss"):
        return []
    options = {"search": "approximate", "recall": TARGETS["recall"], "device": bench.args.device}
    return [large(bench, "sage", count, options) for count in tqdm(bench.args.sizes_approximate, desc="approximate")]


def large(bench, name, count, options):
    path, similarity, degree = bench.vectors(count)
    line = {"prompts": count, "similarity": similarity, "mean_degree": short(degree)}
    return line | apart(name, path, similarity, bench.args.threads, **options)


def candidates(bench):
    count = bench.args.candidates
    path, similarity, _ = bench.vectors(count)
    real = apart("all pairs", path, similarity, bench.args.threads)
    lines = []
    for name, (module, settings) in tqdm(CANDIDATES.items(), desc="candidates"):
        for options in settings if bench.has(module) else []:
            line = apart(name, path, similarity, bench.args.threads, **options)
            lines.append({"way": name, "setting": " ".join(f"{key} {value}" for key, value in options.items()) or "its own choice",
                          "prompts": count, **line, "recall": short(line["pairs"] / real["pairs"])})  # fmt: skip
            if lines[-1]["recall"] >= TARGETS["recall"]:
                break
    return lines


def sets(bench):
    """Flat share .4 of cliques at .6, and trees that are expected to lose as much: of the same groups, and of `budget_plan`'s own."""
    from sage.budget import budget_plan, expected_loss
    from sage.embed import embed_prompts
    from sage.plans import plan_prompts

    lines = []
    for name, (prompts, _) in tqdm(bench.sets.items(), desc="sets"):
        embeddings = embed_prompts(prompts)
        flat = plan_prompts(prompts, embeddings, share=0.4)
        loss = expected_loss(flat, embeddings).mean()
        tree = budget_plan(prompts, embeddings, at_loss=loss)
        same = budget_plan(prompts, embeddings, at_loss=loss, similarity=0.6, max_group_size=8)
        saved = [plan.cost(20).saving for plan in (flat, tree, same)]
        lines.append({"set": name, "prompts": len(prompts), "expected_loss": short(loss), "expected_loss_tree":
                      short(expected_loss(tree, embeddings).mean()), "flat_saving": short(saved[0]), "tree_saving": short(saved[1]), "same_groups_saving": short(saved[2]),
                      "tree_over_flat": short(saved[1] / saved[0]) if saved[0] else None})  # fmt: skip
    return lines


def planning(bench):
    from sage.budget import budget_plan
    from sage.embed import embed_prompts
    from sage.plans import plan_prompts

    lines = []
    for name, (prompts, _) in tqdm(bench.sets.items(), desc="planning"):
        embeddings = embed_prompts(prompts)
        makers = {"flat": lambda: plan_prompts(prompts, embeddings), "tree": lambda: budget_plan(prompts, embeddings, quality="balanced")}
        for kind, make in makers.items():
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                make()
                seconds.append(time.perf_counter() - start)
            lines.append({"set": name, "prompts": len(prompts), "plan": kind, "seconds": spread(seconds)})
    return lines


def packing(bench):
    """Denoiser launches of 32 rows at most, against the rows over 32."""
    from sage.budget import budget_plan
    from sage.embed import embed_prompts
    from sage.packing import launches, packs
    from sage.plans import plan_prompts

    lines = []
    for name, (prompts, _) in tqdm(bench.sets.items(), desc="packing"):
        embeddings = embed_prompts(prompts)
        plans = {"flat": plan_prompts(prompts, embeddings), "tree": budget_plan(prompts, embeddings, quality="balanced")}
        for kind, plan in plans.items():
            made, full = launches(plan, packs(plan, PACK_ROWS), PACK_ROWS), plan.cost(20).nfe / PACK_ROWS
            lines.append({"set": name, "plan": kind, "rows_at_once": PACK_ROWS, "launches": made, "full": short(full),
                          "over_full": short(made / full)})  # fmt: skip
    return lines


PARTS = {part.__name__: part for part in (planning, sets, packing, rivals, candidates, exact, approximate)}


COLUMNS = {  # of the tables in the docs: heading → (key, format)
    "rivals": {"groups by": ("contender", None), "prompts": ("prompts", ",d"), "seconds": ("seconds", ".3g"),
               "times sage's": ("times_sage", ".1f"), "peak memory, GB": ("peak_gb", ".2g")},
    "large": {"prompts": ("prompts", ",d"), "search": ("search", None), "neighbours of a prompt, mean": ("mean_degree", ".1f"),
              "seconds": ("seconds", ".0f"), "peak memory, GB": ("peak_gb", ".2g"), "pairs found": ("recall", ".1%")},
    "candidates": {"likely pairs by": ("way", None), "setting": ("setting", None), "prompts": ("prompts", ",d"), "seconds": ("seconds", ".0f"),
                   "pairs found": ("recall", ".1%")},
    "sets": {"prompts": ("set", None), "distinct": ("prompts", ",d"), "rows saved, flat": ("flat_saving", ".1%"),
             "tree of the same groups": ("same_groups_saving", ".1%"), "tree of its own groups": ("tree_saving", ".1%"), "tree / flat": ("tree_over_flat", ".2f"),
             "expected loss of a picture": ("expected_loss", ".4f")},
    "packing": {"prompts": ("set", None), "plan": ("plan", None), "launches": ("launches", ",d"), "if all were full": ("full", ".1f"),
                "launches / full": ("over_full", ".3f")},
    "planning": {"prompts": ("set", None), "distinct": ("prompts", ",d"), "plan": ("plan", None), "seconds": ("seconds", ".2f")},
}  # fmt: skip


def tables(parts):
    """For `readme_tables.py`."""
    lines = {**parts, "large": [*parts.get("exact", []), *parts.get("approximate", [])]}
    found = {}
    for name, columns in COLUMNS.items():
        cells = [[line.get(key) for key, _ in columns.values()] for line in lines.get(name) or []]
        cells = [[cell["median"] if isinstance(cell, dict) else cell for cell in row] for row in cells]
        if cells:
            found[name] = {"columns": list(columns), "rows": cells, "formats": [form for _, form in columns.values()]}
    return found


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, metavar="PATH", help="a prompt file (.txt, .jsonl, .tsv) or a folder of them")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 50_000], help="prompts, against the rivals")
    parser.add_argument("--sizes-exact", nargs="+", type=int, default=[100_000])
    parser.add_argument("--sizes-approximate", nargs="+", type=int, default=[1_000_000])
    parser.add_argument("--candidates", type=int, default=30_000, help="prompts, for the ways to find likely pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes: a minute's look")
    parser.add_argument("--out", metavar="FILE")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.sizes_exact, args.sizes_approximate, args.candidates, args.rounds = [2000], [5000], [8000], 8000, 1
    return args


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        result = {
            "environment": environment(args.device),
            "inputs": {name: {"prompts": len(prompts), "sha256": digest} for name, (prompts, digest) in bench.sets.items()},
            "max_group_size": CAP, "mean_degree": DEGREE, "width": grouping_data.WIDTH, "targets": TARGETS, "gpu_targets": GPU_TARGETS,
            "parts": {},
        }  # fmt: skip
        for part in args.parts:
            result["parts"][part] = PARTS[part](bench)
            result["missing"], result["tables"] = sorted(bench.missing), tables(result["parts"])
            if args.out:
                write_json(args.out, result)
    for name, table in result["tables"].items():
        print(f"\n{name}\n{markdown_table(**table)}")


if __name__ == "__main__":
    main()
