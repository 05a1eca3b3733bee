"""What the tests of pipeline variants compare, for one `Family` at a time."""

from dataclasses import replace

from families.case import GROUPS, PICTURES, SEEDS, draw, shared_by_hand
from measures import far, worst

import sage
from sage import Leaf, SharingPlan

BRANCH, CALLS = 2, 4
LEAVES = [Leaf(f"picture {number}") for number in PICTURES]


def flat(groups=GROUPS, leaves=LEAVES, share=BRANCH / CALLS):
    return SharingPlan.flat(leaves, groups, share, representatives=[group[0] for group in groups])


def check(family, pipe, pictures=PICTURES, seeds=SEEDS, groups=GROUPS, copies=2, max_rows=3):
    """Compare three calls with and without sharing; returns the latents of stock and of sharing.

    Without sharing, `sage.enable` changes nothing (≤ 1e-5). With it, the latents are those of the loop written by hand
    (≤ 1e-5), also where the denoiser is given few rows at once, and not those of stock; the rows evaluated are the plan's.
    """
    stock = draw(family, pipe, pictures, seeds)
    leaves = [Leaf(f"picture {number}") for number in pictures]
    with sage.enable(pipe, SharingPlan.independent(leaves)):
        assert worst(draw(family, pipe, pictures, seeds), stock) <= 1e-5
    with sage.enable(pipe, flat(groups, leaves)) as sharing:
        shared = draw(family, pipe, pictures, seeds)
    assert worst(shared, shared_by_hand(family, pipe, pictures, seeds, groups, BRANCH)) <= 1e-5
    assert sharing.stats["rows"] == [len(groups)] * BRANCH + [len(pictures)] * (CALLS - BRANCH)
    assert sharing.stats["guidance_copies"] == copies
    with sage.enable(pipe, flat(groups, leaves), max_rows=max_rows):
        assert worst(draw(family, pipe, pictures, seeds), shared) <= 1e-5
    members = [i for group in groups for i in group[1:]]
    assert far(shared[members], stock[members])
    return stock, shared


def given(family, **kwargs):
    """A family whose calls have more keyword arguments."""
    return replace(family, conditions=lambda pipe, pictures: {**family.conditions(pipe, pictures), **kwargs})
