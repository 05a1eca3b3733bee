"""What is compared: independent sampling at many step counts, and every way of sharing or skipping at one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sage.evaluation.asked import Asked
from sage.evaluation.request import BACK_SHARES, Request
from sage.output import slug
from sage.plan import Leaf, SharingPlan

if TYPE_CHECKING:
    from sage.evaluation.request import Adapter

__all__ = ["Method", "grid", "methods_at", "planned", "rivals", "signature"]

CACHE_THRESHOLDS = (0.05, 0.1)  # of FirstBlockCache: diffusers' default, and one that skips more
STEP_BACK = 1  # denoiser calls


@dataclass(frozen=True)
class Method:
    """One way to draw all pictures.

    Args:
        kind: "independent", "shared-noise", "share", "step-back", "tree" or "cache".
        steps: of the solver.
        solver: its name; "" is the model's own scheduler.
        value: share β, budget, or threshold of the cache; None where there is none.
        adapter: a LoRA that is on.
    """

    kind: str
    steps: int
    solver: str = ""
    value: float | None = None
    adapter: Adapter | None = None

    @property
    def label(self) -> str:
        """In words, without steps, solver and adapter."""
        value = "" if self.value is None else f"{self.value:g}"
        return {
            "independent": "independent",
            "shared-noise": "shared noise only",
            "share": f"share {value}",
            "step-back": f"share {value}, a step back",
            "tree": f"tree, budget {value}",
            "cache": f"FirstBlockCache {value}",
        }[self.kind]

    @property
    def key(self) -> str:
        """Name of its folder: [a-z0-9-] only, another one for every method."""
        parts = [slug(self.solver or "own-scheduler"), f"{self.steps:03d}", self.kind]
        parts += [] if self.value is None else [f"{self.value:g}".replace(".", "-")]
        return "-".join(parts) + ("" if self.adapter is None else f"--{slug(self.adapter.name)}")

    @property
    def shares(self) -> bool:
        """Whether members of a group have anything in common."""
        return self.kind in ("shared-noise", "share", "step-back", "tree")

    @property
    def branch_back(self) -> int:
        return STEP_BACK if self.kind == "step-back" else 0

    def plan(self, asked: Asked) -> SharingPlan:
        """The plan over all pictures, with seeds. Raises ValueError for a budget that is out of reach."""
        leaves = [Leaf(prompt, k % asked.images, seed) for k, (prompt, seed) in enumerate(zip(asked.picture_prompts, asked.seeds))]
        if self.kind == "shared-noise":
            return SharingPlan.independent(_under_one_noise(leaves, asked))
        if self.kind in ("share", "step-back"):
            chosen = [medoid * asked.images + k for medoid in asked.medoids for k in range(asked.images)]
            return SharingPlan.flat(leaves, asked.sets(), self.value, chosen, encoder=asked.embeddings.encoder)
        if self.kind == "tree":
            return _tree(leaves, asked, self)
        return SharingPlan.independent(leaves)


def _under_one_noise(leaves: list[Leaf], asked: Asked) -> list[Leaf]:
    """The leaves with the seed of their group's medoid. Solvers that add noise then add the same to all of a group."""
    medoid_of = {row: medoid for group, medoid in zip(asked.groups, asked.medoids) for row in group}
    seeds = [asked.seeds[medoid_of[number // asked.images] * asked.images + number % asked.images] for number in range(len(leaves))]
    return [replace(leaf, seed=seed) for leaf, seed in zip(leaves, seeds)]


def _tree(leaves: list[Leaf], asked: Asked, method: Method) -> SharingPlan:
    """The tree that is expected to lose least at the budget, inside the same groups."""
    from sage.budget import budget_plan

    plan = budget_plan(asked.prompts, asked.embeddings, budget=method.value, num_calls=method.steps, similarity=asked.similarity,
                       max_group_size=asked.max_group_size, images_per_prompt=asked.images)
    allowed = {picture: number for number, members in enumerate(asked.sets()) for picture in members}
    for root in plan.roots:
        if len({allowed[member] for member in root.members}) > 1:
            raise RuntimeError(f"budget_plan joined pictures {root.members} of several groups, which must not be compared with flat plans")
    return SharingPlan(tuple(leaves), plan.roots, plan.encoder, plan.similarity)


def grid(request: Request, solver: str) -> list[Method]:
    """Independent sampling at every step count, most first, the comfortable ones among them."""
    counts = {*request.grid, *request.more_counts}
    return [Method("independent", steps, solver) for steps in sorted(counts, reverse=True)]


def methods_at(steps: int, request: Request, solver: str, adapter: Adapter | None, has_cache: bool) -> list[Method]:
    """All methods at one step count, independent sampling first; without the rivals of fewer steps."""
    wanted: dict[str, Iterable[float | None]] = {
        "shared-noise": [None],
        "share": request.all_shares,
        "step-back": _back_shares(request),
        "tree": request.all_budgets,
        "cache": CACHE_THRESHOLDS if has_cache else [],
    }
    made = [Method("independent", steps, solver, None, adapter)]
    return made + [Method(kind, steps, solver, value, adapter) for kind, values in wanted.items() if kind in request.kinds
                   for value in values]


def _back_shares(request: Request) -> tuple[float, ...]:
    """A few of the shares: the usual ones if they are among them, else the largest."""
    return tuple(share for share in request.all_shares if share in BACK_SHARES) or request.all_shares[-1:]


def signature(plan: SharingPlan, num_calls: int | None) -> Any:
    """Equal for plans that draw the same pictures in so many calls; for None, an unknown number, for equal plans only."""
    if num_calls is None:
        return plan.to_json()
    runs = sorted((start, end, node.members, node.representative) for start, end, node in plan.intervals(num_calls))
    return tuple(leaf.seed for leaf in plan.leaves), tuple(runs)


def planned(methods: Iterable[Method], asked: Asked, calls: Callable[[Method], int | None], say: Callable[[str], None]) -> dict:
    """Method → plan, without those that are out of reach, save nothing over others or draw what another one draws; said why.

    Args:
        calls: denoiser calls of a method; None where they are not known beforehand.
    """
    kept: dict[Method, SharingPlan] = {}
    seen: dict[Any, Method] = {}
    for method in methods:
        name = f"{method.label} at {method.steps} steps"
        try:
            plan = method.plan(asked)
        except ValueError as error:
            say(f"{name}: left out ({error}).")
            continue
        number = calls(method)
        drawn = (method.steps, method.solver, method.adapter, method.branch_back, method.kind == "cache" and method.value,
                 signature(plan, number))
        if drawn in seen:
            say(f"{name}: left out, as it draws the same as {seen[drawn].label}.")
            continue
        if method.branch_back and plan.cost(number or method.steps, branch_back=method.branch_back).saving <= 0:
            say(f"{name}: left out, as the step back takes all that sharing saves.")
            continue
        seen[drawn] = method
        kept[method] = plan
    return kept


def rivals(plans: Mapping[Method, SharingPlan], computed: Mapping[Method, float]) -> list[Method]:
    """Independent sampling at the step counts whose rows are nearest to what each method of sharing or skipping needs, with its adapter.

    Args:
        plans: of methods, of which those that share are looked at.
        computed: cached method → the fraction of the blocks that it computed, as far as that is known.
    """
    left = {method: 1 - plan.cost(method.steps, branch_back=method.branch_back).saving for method, plan in plans.items()
            if method.shares and method.kind != "shared-noise"}
    found = [Method("independent", min(max(1, round(part * method.steps)), method.steps), method.solver, None, method.adapter)
             for method, part in {**left, **computed}.items()]
    return list(dict.fromkeys(found))
