"""Plans made of groups of prompts: flat ones, and trees whose branches part by similarity. By cost: `sage.budget`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sage.embed import Embeddings
from sage.grouping import Group, Groups
from sage.plan import SharingPlan
from sage.plan_checks import fraction
from sage.similarity import in_millionths
from sage.trees import PlanRequest, Trees
from sage_kernels.grouping import UNITS

__all__ = ["plan_prompts", "tree_plan"]


def plan_prompts(
    prompts: Sequence[str],
    embeddings: np.ndarray | Embeddings,
    *,
    share: float | tuple[float, float] = 0.4,
    similarity: float = 0.6,
    max_group_size: int = 8,
    images_per_prompt: int = 1,
    seeds: Sequence[int] | None = None,
    alone: Sequence[bool] | None = None,
    encoder_name: str = "",
    search: str = "exact",
    on_groups: Callable[[Groups], None] | None = None,
) -> SharingPlan:
    """The flat plan for prompts: groups share a fraction of the calls, then every image goes on alone.

    A prompt given n times is one prompt with n images per `images_per_prompt`: images of one prompt do not share, as they would come
    out equal. Image index k of each prompt of a group shares trunk k, and the medoid of the prompts that have an image k represents it.

    Who shares with whom depends on the set of prompts alone, whatever their order and the machine, as long as `search` is "exact".

    Args:
        prompts: n texts, at least one.
        embeddings: [n, d], or what `embed_prompts` returned, which then also says `alone` and `encoder_name`. Rows of equal prompts
            must be equal.
        share: fraction of the calls that a group shares, in [0, 1]; 0: none, 1: all, and then its images are equal. Two numbers
            (low, high): each group by its own similarity, from `low` where its least similar pair is just at `similarity` to
            `high` where all are equal, as `tree_plan` does it for the nodes of a tree.
        similarity: least cosine similarity of two members of a group, in (−1, 1].
        max_group_size: most prompts in a group.
        images_per_prompt: images made of each of the n prompts.
        seeds: one per image, in the order of the leaves; None leaves them open.
        alone: bool [n]; prompts that must not be grouped.
        encoder_name: for the record.
        search: "exact", "approximate" or "auto", see `sage.grouping.find_groups`. With "approximate", and with "auto" where that
            is what it takes, by the number of prompts and by what the machine has, the plan may depend on the machine.
        on_groups: called with the `Groups` that were found, if anybody is to be grouped: method and recall of the search.

    Returns:
        SharingPlan: leaves in the order of the prompts, the images of each prompt together.
    """
    if not isinstance(share, (tuple, list)):
        share = [fraction(share, "plan_prompts: share")] * 2
    until = _by_height("plan_prompts", share, similarity)
    request = PlanRequest("plan_prompts", prompts, embeddings, similarity, max_group_size, images_per_prompt, seeds, alone, encoder_name,
                          search, on_groups)

    def untils(group: Group) -> list[float]:
        return [until(group.merges[-1][2])] * len(group.merges) if group.merges else []

    return _plan(request, untils)


def tree_plan(
    prompts: Sequence[str],
    embeddings: np.ndarray | Embeddings,
    *,
    share: tuple[float, float] = (0.2, 0.6),
    similarity: float = 0.6,
    max_group_size: int = 8,
    images_per_prompt: int = 1,
    seeds: Sequence[int] | None = None,
    alone: Sequence[bool] | None = None,
    encoder_name: str = "",
    search: str = "exact",
    on_groups: Callable[[Groups], None] | None = None,
) -> SharingPlan:
    """The tree plan for prompts: inside a group, the less alike, the earlier they part.

    Groups are those of `plan_prompts`. A node of a group's complete-linkage dendrogram shares until

        until(h) = low + (high − low) · (h − similarity) / (1 − similarity)

    h the cosine similarity of its least similar pair of prompts, with or without an image of the index in question. Nodes that would
    part at the same time as their parent are joined with it, so `share=(s, s)` is the flat plan of share s.

    Args:
        share: (low, high), the shares of pairs just at `similarity` and of equal ones, 0 ≤ low ≤ high ≤ 1.

    The other arguments and the result are those of `plan_prompts`.
    """
    if not isinstance(share, (tuple, list)):
        raise ValueError(f"tree_plan: share must be two numbers (low, high), got {share!r}")
    until = _by_height("tree_plan", share, similarity)
    request = PlanRequest("tree_plan", prompts, embeddings, similarity, max_group_size, images_per_prompt, seeds, alone, encoder_name,
                          search, on_groups)
    return _plan(request, lambda group: [until(height) for _, _, height in group.merges])


def _by_height(op: str, share: Sequence[float], similarity: float) -> Callable[[int], float]:
    """The share of a cluster, in [low, high], by the similarity of its least similar pair, in millionths."""
    if len(share) != 2:
        raise ValueError(f"{op}: share must be two numbers (low, high), got {tuple(share)!r}")
    low, high = (fraction(value, f"{op}: share[{number}]") for number, value in enumerate(share))
    if low > high:
        raise ValueError(f"{op}: share must be (low, high) with low <= high, got ({low}, {high})")
    least = in_millionths(similarity, f"{op}: similarity")

    def until(height: int) -> float:
        part = (min(max(height, least), UNITS) - least) / (UNITS - least) if least < UNITS else 1.0
        return min(low + (high - low) * part, high)

    return until


def _plan(request: PlanRequest, untils: Callable[[Group], list[float]]) -> SharingPlan:
    """For each group and image index grow a tree; everyone else runs alone."""
    trees = Trees(request)
    roots = (trees.tree(*group, untils(group), image) for group in request.groups for image in range(request.images))
    return request.plan(root for root in roots if root is not None)
