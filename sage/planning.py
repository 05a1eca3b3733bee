"""Prompts and options to a sharing plan: what `sage plan` shows and `sage generate` follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sage.plan import Leaf, SharingPlan
from sage.prompts import InputError, PromptSet, count


@dataclass(frozen=True)
class Grouping:
    """How prompts become a plan; see `sage.generate`."""

    share: float = 0.4
    similarity: float = 0.6
    max_group_size: int = 8
    images_per_prompt: int = 1
    encoder: str = "auto"

    def check(self) -> None:
        """Refuse what is out of range."""
        if not 0 <= self.share <= 1:
            raise InputError(f"--share must lie in [0, 1], got {self.share:g}.")
        if not -1 < self.similarity <= 1:
            raise InputError(f"--similarity must lie in (-1, 1], got {self.similarity:g}.")
        for option in ("max_group_size", "images_per_prompt"):
            if getattr(self, option) < 1:
                raise InputError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(self, option)}.")


def make_plan(prompts: PromptSet, grouping: Grouping, pipe=None) -> tuple[SharingPlan, np.ndarray]:
    """A plan made from the prompts.

    Returns:
        The plan, and float [B]: cosine of each picture's prompt with that of its trunk's representative.
    Raises:
        InputError: the encoder is unknown or does not fit.
    """
    from sage.embed import embed_prompts
    from sage.generation import trunk_similarities
    from sage.grouping import plan_prompts

    images = grouping.images_per_prompt
    try:
        found = embed_prompts(prompts.prompts, encoder=grouping.encoder, pipe=pipe)
    except (ValueError, TypeError, NotImplementedError, FileNotFoundError) as error:
        raise InputError(f"--encoder {grouping.encoder}: {error}") from error
    except RuntimeError as error:
        if not str(error).startswith("embed_prompts:"):  # a failure of torch, not of the encoder that was named
            raise
        raise InputError(f"--encoder {grouping.encoder}: {error}") from error
    plan = plan_prompts(
        prompts.prompts,
        found,
        share=grouping.share,
        similarity=grouping.similarity,
        max_group_size=grouping.max_group_size,
        images_per_prompt=images,
    )
    return plan, trunk_similarities(plan, found.vectors, images)


def load_plan(path: str, leaves: Sequence[Leaf], name: str | None = None) -> SharingPlan:
    """Read a plan and refuse it when it is for other pictures than `leaves`; errors call it `name`."""
    name = name or f"--plan {path}"
    try:
        plan = SharingPlan.load(path)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {error}") from None
    if len(plan.leaves) != len(leaves):
        raise InputError(f"{name}: it is for {count(len(plan.leaves), 'picture')}, but {len(leaves)} are asked for.")
    for number, (planned, asked) in enumerate(zip(plan.leaves, leaves)):
        if planned.prompt != asked.prompt:
            raise InputError(
                f"{name}: picture {number} is planned for {planned.prompt[:60]!r}, but asked for {asked.prompt[:60]!r}."
            )
    return plan


def leaves_of(prompts: PromptSet, images: int) -> list[Leaf]:
    """The pictures that are asked for, in order, without seeds."""
    return [Leaf(prompt, k) for prompt in prompts.prompts for k in range(images)]


def savings(plan: SharingPlan, num_calls: int) -> dict[str, float]:
    """What the plan saves, and what its groups would save at other shares: {"40 %": 0.26, …}."""
    groups = [root.members for root in plan.roots if len(root.members) > 1]
    chosen = {"as planned": plan.cost(num_calls).saving}
    others = {f"{share:.0%}": SharingPlan.flat(plan.leaves, groups, share) for share in (0.2, 0.4, 0.6)}
    return chosen | {name: other.cost(num_calls).saving for name, other in others.items()}


def plan_summary(plan: SharingPlan, num_calls: int) -> dict:
    """The plan in numbers, for `sage plan --json`."""
    cost = plan.cost(num_calls)
    groups = [root for root in plan.roots if len(root.members) > 1]
    return {
        "pictures": len(plan.leaves),
        "num_calls": num_calls,
        "nfe": cost.nfe,
        "nfe_independent": cost.nfe_independent,
        "savings": {name: round(saving, 6) for name, saving in savings(plan, num_calls).items()},
        "encoder": plan.encoder,
        "similarity": plan.similarity,
        "groups": [
            {
                "size": len(root.members),
                "share": root.until,
                "representative": root.representative,
                "members": list(root.members),
                "prompts": [plan.leaves[member].prompt for member in root.members],
            }
            for root in groups
        ],
        "alone": [root.members[0] for root in plan.roots if len(root.members) == 1],
    }


def plan_text(plan: SharingPlan, num_calls: int, max_groups: int | None) -> str:
    """The plan drawn as text, and what sharing it at several shares would save."""
    saved = savings(plan, num_calls)
    table = "   ".join(f"{name}: {saving:.1%}" for name, saving in saved.items())
    return f"{plan.describe(num_calls, max_groups)}\n\nSaving of all denoiser rows by share ({num_calls} calls)   {table}"
