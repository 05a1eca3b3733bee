"""A picture's seed: from the base seed, the prompt and the number of the picture, not from its place in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from sage.plan import SharingPlan


def leaf_seed(base: int, prompt: str, image_index: int) -> int:
    """A picture's seed from (base seed, prompt text, image index): 63 bits of BLAKE2b, the same on every machine."""
    text = f"{base}\x00{image_index}\x00{prompt}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seeded(plan: SharingPlan, base: int = 0, seeds: Sequence[int] | None = None, images: int = 1) -> SharingPlan:
    """The plan with a seed on every leaf: the caller's, else the one that the plan brings, else `leaf_seed`.

    Args:
        base: base seed of the derived ones.
        seeds: one per prompt; image k of a prompt gets its seed + k.
        images: pictures of each prompt; leaf i belongs to prompt i // images.
    """
    leaves = []
    for index, leaf in enumerate(plan.leaves):
        seed = leaf.seed
        if seeds is not None:
            seed = seeds[index // images] + index % images
        elif seed is None:
            seed = leaf_seed(base, leaf.prompt, leaf.image_index)
        leaves.append(replace(leaf, seed=seed))
    return replace(plan, leaves=tuple(leaves))
