"""Measures the embedded model: clock and quality of sharing, beside its trivial rival, fewer steps.

Every method makes one picture of each prompt with the same seeds. Timed is the denoising loop alone, from the first denoiser call to
the last step, in turn with the other methods within one run. Quality is the scorer's: `identification`, the share of pictures nearer
to their own caption than to the others of their group, and `cosine`, picture to caption.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from harness import environment, spread
from tqdm import tqdm

import sage
from sage.emoji import load_pipeline, load_scorer
from sage.seeds import leaf_seed

SETTINGS = ("steps", "shares", "guidance_scale", "solver", "repeats", "threads", "quick")


@dataclass
class Method:
    """One way to make the pictures: `plan` is None for the stock pipeline."""

    name: str
    steps: int
    plan: sage.SharingPlan | None
    nfe: int


class Clock:
    """Seconds from the first denoiser call to the last scheduler step of a pipeline call."""

    def __init__(self, pipe):
        self.first = self.last = None
        pipe.unet.register_forward_pre_hook(self._before)

    def _before(self, *args):
        self.first = self.first or time.perf_counter()

    def after_step(self, pipe, step, timestep, tensors):
        self.last = time.perf_counter()
        return tensors


def methods(leaves, plan_of, steps: int, shares: list[float]) -> list[Method]:
    """Stock; enabled without sharing; every share; and stock at the rows of each share, by fewer steps."""
    independent = sage.SharingPlan.independent(leaves)
    found = [Method("stock", steps, None, len(leaves) * steps), Method("enabled, share 0", steps, independent, len(leaves) * steps)]
    for share in shares:
        plan = plan_of(share)
        nfe = plan.cost(steps).nfe
        fewer = max(1, round(nfe / len(leaves)))
        found.append(Method(f"share {share:g}", steps, plan, nfe))
        found.append(Method(f"{fewer} steps instead of share {share:g}", fewer, None, len(leaves) * fewer))
    return found


def draw(pipe, clock: Clock, method: Method, leaves, guidance: float, output_type: str = "latent"):
    """One call of the pipeline; returns (seconds of denoising, images)."""
    generators = [torch.Generator().manual_seed(leaf_seed(0, leaf.prompt, leaf.image_index)) for leaf in leaves]
    options = dict(num_inference_steps=method.steps, guidance_scale=guidance, output_type=output_type)
    clock.first = None
    if method.plan is not None:
        sage.enable(pipe, method.plan)
    try:
        prompts = [leaf.prompt for leaf in leaves]
        out = pipe(prompts, generator=generators, callback_on_step_end=clock.after_step, **options)
    finally:
        sage.disable(pipe)
    return clock.last - clock.first, out.images


def quality(scorer, images: np.ndarray, prompts: list[str], groups: list[list[int]]) -> dict[str, float]:
    """Within-group identification (groups of more than one) and mean cosine of [N, H, W, 3] images in [0, 1]."""
    pictures = scorer.embed_images(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2) * 2 - 1)
    texts = scorer.embed_texts(prompts)
    right = [int((texts[group] @ pictures[i]).argmax()) == group.index(i) for group in groups for i in group]
    return {"identification": sum(right) / len(right), "cosine": float((pictures * texts).sum(1).mean()), "grouped": len(right)}


def run(args, prompts: list[str]) -> dict:
    """The JSON of the embedded model."""
    pipe, scorer = load_pipeline(), load_scorer()
    pipe.set_progress_bar_config(disable=True)
    if args.solver:
        pipe.scheduler = sage.SageScheduler.from_config(pipe.scheduler.config, solver=args.solver)
    clock, embeddings = Clock(pipe), sage.embed_prompts(prompts)
    plan = sage.plan_prompts(prompts, embeddings, share=0.4)
    groups = [list(root.members) for root in plan.roots if len(root.members) > 1]
    todo = methods(plan.leaves, lambda share: sage.plan_prompts(prompts, embeddings, share=share), args.steps, args.shares)
    seconds: dict[str, list[float]] = {method.name: [] for method in todo}
    rows = []
    for method in tqdm(todo, desc="pictures and warm-up"):
        _, images = draw(pipe, clock, method, plan.leaves, args.guidance_scale, output_type="np")
        rows.append({"method": method.name, "steps": method.steps, "nfe": method.nfe, **quality(scorer, images, prompts, groups)})
    for _ in tqdm(range(args.repeats), desc="timed rounds"):
        for method in todo:
            seconds[method.name].append(draw(pipe, clock, method, plan.leaves, args.guidance_scale)[0])
    stock = np.array(seconds["stock"])
    for row in rows:
        own = np.array(seconds[row["method"]])
        promised = 1 - row["nfe"] / rows[0]["nfe"]
        row["seconds"] = spread(own.tolist())
        row["time_ratio"] = float(np.median(own / stock))  # pair by pair, within a round
        row["nfe_saved"], row["time_saved"] = promised, 1 - row["time_ratio"]
        row["kept_promise"] = row["time_saved"] / promised if promised > 0 else None
        row["raw_seconds"] = own.tolist()
    return {
        "environment": environment(),
        "settings": {key: getattr(args, key) for key in SETTINGS}
        | {"prompts": len(prompts), "groups": len(groups), "grouped": sum(map(len, groups)), "encoder": embeddings.encoder},
        "rows": rows,
        "table": table(rows),
    }


def table(rows: list[dict]) -> dict:
    """The table of the README: see benchmarks/readme_tables.py."""
    keys = ("method", "nfe", "nfe_saved", "time_saved", "kept_promise", "identification", "cosine")
    columns = ("method", "denoiser rows", "rows saved", "time saved", "time saved / rows saved", "identification", "cosine")
    return {
        "columns": list(columns),
        "rows": [[row[key] for key in keys] for row in rows],
        "formats": [None, ",d", ".1%", ".1%", ".2f", ".3f", ".3f"],
    }
