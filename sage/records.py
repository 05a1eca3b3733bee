"""What a run of `sage.generate` says of every picture, and of all together."""

from __future__ import annotations

from typing import Any

from sage.plan import SharingPlan
from sage.resolved import ResolvedPlan
from sage.trunk import Trunk


def picture_records(
    plan: SharingPlan, indices, similarities, negatives, resolved: ResolvedPlan, joined: Trunk | None
) -> list[dict[str, Any]]:
    """One record per picture of a pack; see `GenerationResult.records`.

    Args:
        indices: [B'] the pack's leaves in `plan`, in the order of `resolved`'s leaves.
        resolved: what the pipeline's call followed.
        joined: the trunk that the pictures joined; the resolved plan then begins where it ends.
    """
    root_of, first = plan.root_of, resolved.rep_of(0)  # [B'] the leaf under whose noise each picture began
    records, before = [], 0 if joined is None else joined.call
    for row, index in enumerate(map(int, indices)):
        leaf, branch_call = plan.leaves[index], resolved.branch_call(row)
        trunk = plan.leaves[indices[first[row]]]
        similar = None if similarities is None else float(similarities[index]) if branch_call > 0 else 1.0
        trunk_seed, trunk_prompt = (trunk.seed, trunk.prompt) if joined is None else map(joined.record.get, ("seed", "prompt"))
        records.append(
            {
                "index": index,
                "prompt": leaf.prompt,
                "negative_prompt": None if negatives is None else negatives[index],
                "image_index": leaf.image_index,
                "seed": leaf.seed,
                "group": int(root_of[index]),
                "group_size": len(plan.roots[root_of[index]].members),
                "trunk_seed": trunk_seed,
                "trunk_prompt": trunk_prompt,
                "branch_call": before + branch_call,
                "num_calls": before + resolved.num_calls,
                "similarity_to_trunk": similar,
            }
        )
    return records


def probe_records(probes: list[dict] | None, indices) -> list[dict] | None:
    """The probes of a pack (see `sage.probe.Course.records`) with its leaves called as in the whole plan.

    Args:
        indices: [B'] the pack's leaves in the plan.
    """
    if probes is None:
        return None
    groups = [[group | {"leaves": [int(indices[leaf]) for leaf in group["leaves"]]} for group in made["groups"]] for made in probes]
    return [made | {"groups": renamed} for made, renamed in zip(probes, groups)]


def summary(packs: list[dict], seconds: float, pictures: int, solver: str, encoder: str) -> dict[str, Any]:
    """See `GenerationResult.stats`."""
    nfe, independent = sum(p["nfe"] for p in packs), sum(p["nfe_independent"] for p in packs)
    probes = None if packs[0]["probes"] is None else [made for p in packs for made in p["probes"]]
    calls = max(len(p["rows"]) for p in packs)
    return {
        "nfe": nfe,
        "nfe_independent": independent,
        "saving": 1 - nfe / independent if independent else 0.0,
        "guidance_copies": packs[0]["guidance_copies"],
        "rows": [sum(p["rows"][s] for p in packs if s < len(p["rows"])) for s in range(calls)],
        "boundaries": packs[0]["boundaries"],
        "packs": len(packs),
        "launches": sum(p["launches"] for p in packs),
        "probes": probes,
        "cache": _cache(packs),
        "max_rows": packs[-1]["max_rows"],
        "denoise_seconds": sum(p["denoise_seconds"] for p in packs),
        "seconds": seconds,
        "images_per_second": pictures / seconds,
        "solver": solver,
        "solver_path": packs[0]["solver_path"],
        "encoder": encoder,
    }


def _cache(packs: list[dict]) -> dict[str, Any] | None:
    """What the denoiser's cache computed in all packs, see `sage.caches.Caches.stats`; None without one."""
    caches = [pack["cache"] for pack in packs]
    if caches[0] is None:
        return None
    known = all(cache is not None and cache["computed"] is not None for cache in caches)
    computed = sum(c["computed"] * p["nfe"] for c, p in zip(caches, packs)) / sum(p["nfe"] for p in packs) if known else None
    return {"name": caches[0]["name"], "computed": computed}
