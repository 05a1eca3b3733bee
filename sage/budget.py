"""The plan that is expected to lose least at its cost.

Splitting a node of a group's dendrogram at one denoiser call costs one row more, whatever its size, and gains what its pictures
then lose less by the table of `sage.loss`. A node is split only where its parent is, and from then on to the last call. For every
price of a row there is one best set of such splits, and that of a lower price holds that of a higher: `sage_kernels.prices` gives for each
split the price from which on it is not worth its row. Plans are beginnings of the list of all splits, most precious first. So a
larger budget never takes from any picture, and every budget is met to the row.

A price is a loss, summed over pictures, for each row kept apart during a whole trajectory: it does not depend on the number of calls.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from sage.embed import Embeddings
from sage.grouping import Groups
from sage.loss import LossTable
from sage.plan import SharingPlan
from sage.plan_checks import fraction, integer
from sage.similarity import similarity_matrix
from sage.splits import Forest, Splits
from sage.trees import PlanRequest, Trees

__all__ = ["PRESETS", "budget_plan", "expected_loss"]

# Prices, in the unit of the table that ships; each is about three times the one before it.
PRESETS = {"high": 0.0024, "balanced": 0.0072, "fast": 0.022}


def budget_plan(
    prompts: Sequence[str],
    embeddings: "np.ndarray | Embeddings",
    *,
    budget: float | None = None,
    quality: str | float | None = None,
    at_loss: float | None = None,
    num_calls: int = 20,
    loss: LossTable | None = None,
    similarity: float = 0.3,
    max_group_size: int = 32,
    most: float = 0.8,
    images_per_prompt: int = 1,
    seeds: Sequence[int] | None = None,
    alone: Sequence[bool] | None = None,
    encoder_name: str = "",
    search: str = "exact",
    on_groups: Callable[[Groups], None] | None = None,
) -> SharingPlan:
    """The plan that is expected to lose least at a given cost, price or loss: exactly one of the three is given.

    Groups are those of `plan_prompts`, with wider defaults: prompts that are little alike part after few calls, instead of not
    sharing at all. Each node of their dendrograms parts at a call of its own; those that part together are one node.

    Args:
        prompts, embeddings: as for `plan_prompts`.
        budget: denoiser rows as a fraction of those without sharing, in (0, 1]; met to the row, rounded down.
        quality: "high", "balanced" or "fast", or a price ≥ 0: rows are spent where they save more than this, in loss summed over
            pictures per row and trajectory. How a group is shared then does not depend on the other groups.
        at_loss: mean expected loss per picture, ≥ 0, in the unit of `loss`: the cheapest such plan that does not lose more. To
            compare with another plan: `expected_loss(plan, embeddings).mean()`.
        num_calls: S, denoiser calls that the plan is made for. It may be resolved for another number, at a little loss.
        loss: what sharing costs; None: `LossTable.default()`.
        similarity: least cosine similarity of two members of a group, in (−1, 1].
        max_group_size: most prompts in a group.
        most: fraction of the calls, in [0, 1], after which nothing is shared: no two prompts come out equal.
        images_per_prompt, seeds, alone, encoder_name, search, on_groups: as for `plan_prompts`.

    Returns:
        SharingPlan: leaves in the order of the prompts; every `until` is a whole number of calls over S.

    Raises:
        ValueError: not exactly one aim, arguments out of range, or a budget that even the most sharing does not reach.
    """
    aim, value = _aim(budget=budget, quality=quality, at_loss=at_loss)
    num_calls = integer(num_calls, "budget_plan: num_calls", 1)
    if loss is not None and not isinstance(loss, LossTable):
        raise TypeError(f"budget_plan: loss must be a sage.loss.LossTable or None, got {type(loss).__name__}")
    shared_calls = min(math.floor(fraction(most, "budget_plan: most") * num_calls + 0.5), num_calls - 1)
    request = PlanRequest("budget_plan", prompts, embeddings, similarity, max_group_size, images_per_prompt, seeds, alone, encoder_name,
                          search, on_groups)
    forest = Forest(Trees(request), request.groups, request.images)
    splits = Splits(forest, loss or LossTable.default(), num_calls, shared_calls)
    if aim == "budget":
        options = f"similarity={similarity:g}, max_group_size={max_group_size}, most={most:g}"
        count = _within_budget(splits, value, len(request.leaves) * num_calls, options)
    elif aim == "quality":
        count = splits.dearer_than(value)
    else:
        count = splits.losing_at_most(value * len(request.leaves))
    untils = splits.shared(count) / num_calls
    return request.plan(forest.roots(untils))


def expected_loss(
    plan: SharingPlan,
    embeddings: "np.ndarray | Embeddings",
    loss: LossTable | None = None,
    num_calls: int = 20,
    images_per_prompt: int = 1,
) -> np.ndarray:
    """What each picture of a plan is expected to lose by sharing.

    Args:
        plan: any plan over the images of n prompts, in their order.
        embeddings: [n, d], those that the loss table's similarities are of, one row per prompt; or `Embeddings`.
        loss: the table; None: `LossTable.default()`.
        num_calls: S; the plan is resolved for so many calls.
        images_per_prompt: leaf i is of prompt i // images_per_prompt.

    Returns:
        float64 [B]; 0 for pictures that share with nobody. The similarity of a node is that of its least similar pair.
    """
    vectors = np.asarray(embeddings.vectors if isinstance(embeddings, Embeddings) else embeddings)
    images = integer(images_per_prompt, "expected_loss: images_per_prompt", 1)
    if vectors.ndim != 2 or len(vectors) * images != len(plan.leaves):
        raise ValueError(f"expected_loss: embeddings must be [n, d] with n · images_per_prompt = {len(plan.leaves)}, the leaves of the "
                         f"plan, got {list(vectors.shape)} and images_per_prompt={images}")
    running = [interval for interval in plan.intervals(num_calls) if len(interval[2].members) > 1]
    found = np.zeros(len(plan.leaves))
    if running:
        start, end = (np.array([interval[side] for interval in running]) / num_calls for side in (0, 1))
        heights = _least_similar(plan, [node.members for _, _, node in running], vectors, images)
        loss = loss or LossTable.default()
        for (_, _, node), lost in zip(running, loss(heights, end) - loss(heights, start), strict=True):
            found[list(node.members)] += lost
    return found


def _least_similar(plan: SharingPlan, nodes: list[tuple[int, ...]], vectors: np.ndarray, images: int) -> np.ndarray:
    """float64: cosine of the least similar pair of leaves of each node; a node lies under one root."""
    alike, root_of, place = {}, plan.root_of, np.zeros(len(plan.leaves), np.int64)
    heights = []
    for members in nodes:
        root = int(root_of[members[0]])
        if root not in alike:
            whole = np.array(plan.roots[root].members)
            place[whole] = np.arange(len(whole))
            alike[root] = similarity_matrix(vectors[whole // images])
        rows = place[list(members)]
        heights.append(alike[root][np.ix_(rows, rows)].min())
    return np.array(heights)


def _aim(**given) -> tuple[str, float]:
    """Which of the three aims was given, and its number."""
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"budget_plan: exactly one of {', '.join(given)} must be given, got {', '.join(chosen) or 'none'}")
    name, value = chosen[0], given[chosen[0]]
    if name == "quality" and isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"budget_plan: quality must be {', '.join(map(repr, PRESETS))} or a price, got {value!r}")
        value = PRESETS[value]
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"budget_plan: {name} must be a number, got {value!r}")
    if not 0 <= value < math.inf or (name == "budget" and not 0 < value <= 1):
        raise ValueError(f"budget_plan: {name} must be {'in (0, 1]' if name == 'budget' else 'finite and at least 0'}, got {value}")
    return name, float(value)


def _within_budget(splits: Splits, budget: float, independent: int, options: str) -> int:
    """How many splits `budget`, a fraction of `independent` rows, pays for beside the rows that cannot be saved."""
    least = independent - splits.most
    rows = math.floor(budget * independent + 1e-9)
    if rows < least:
        wanted = math.ceil(least / independent * 1e4) / 1e4
        raise ValueError(f"budget_plan: budget must be at least {wanted:.4f} for these prompts with {options}, got {budget:g}; a "
                         "lower similarity, a larger max_group_size or a larger most lowers what can be reached")
    return min(rows - least, splits.most)
