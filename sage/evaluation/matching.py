"""Whether a picture shows what its own prompt says: cosines, and identification among the prompts of a group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sage.evaluation.checks import as_groups, as_pair, as_unit

__all__ = ["Identification", "clip_score", "clip_scores", "identification"]

TIE = 1e-12  # cosines in float64 that differ by no more are equal but for rounding


def clip_scores(image_embeds: Any, text_embeds: Any) -> torch.Tensor:
    """max(100 · cos, 0) of each picture and its text (Hessel et al., arXiv:2104.08718, without its factor of 2.5).

    Args:
        image_embeds, text_embeds: [N, C], rows of length 1, row i belonging together.

    Returns:
        [N] float64.

    Raises:
        TypeError, ValueError: no finite real [N, C] of one shape, or rows of another length than 1.
    """
    images, texts = _rows_together(image_embeds, text_embeds, "clip_score")
    return (100 * (images * texts).sum(1)).clamp_min(0)


def clip_score(image_embeds: Any, text_embeds: Any) -> float:
    """The mean of `clip_scores`. torchmetrics' CLIPScore cuts at 0 after the mean: the same where no cosine is negative."""
    return float(clip_scores(image_embeds, text_embeds).mean())


@dataclass(frozen=True, eq=False)
class Identification:
    """What `identification` found; `interval(found.right, found.groups)` is the share with its interval.

    Args:
        right: bool [n], of the pictures that were judged.
        rows: int64 [n], which pictures those are.
        groups: the groups that were judged, as places in `right`.
        share: of pictures that are right.
        chance: the share that guessing would have: the mean over pictures of one over the number of captions to choose from.
    """

    right: torch.Tensor
    rows: torch.Tensor
    groups: list[list[int]]
    share: float
    chance: float


def identification(image_embeds: Any, text_embeds: Any, groups: Sequence[Sequence[int]],
                   captions: Sequence[str] | None = None) -> Identification:
    """Whether each picture is nearer to its own caption than to every other caption of its group; a tie counts as wrong.

    Args:
        image_embeds, text_embeds: [N, C], rows of length 1, row i belonging together.
        groups: rows that share a group. Groups with one caption only are left out, as are rows in no group.
        captions: [N]; rows of a group with the same text are then no rivals (several pictures of one prompt). None: each row
            is a caption of its own.

    Raises:
        TypeError, ValueError: embeddings as in `clip_scores`; groups overlap or hold no such row; no group with two captions.
    """
    images, texts = _rows_together(image_embeds, text_embeds, "identification")
    groups = as_groups(groups, len(images), "identification: groups")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"identification: captions must be one per picture, got {len(captions)} for {len(images)} pictures")
    names = range(len(images)) if captions is None else captions
    right, rows, places, chances = [], [], [], []
    for group in groups:
        distinct = len({names[row] for row in group})
        if distinct == 1:
            continue
        rival = torch.tensor([[names[i] != names[j] for j in group] for i in group], device=images.device)
        cosines = images[group] @ texts[group].T  # [pictures, captions]
        right.append(cosines.diagonal() - cosines.masked_fill(~rival, -torch.inf).amax(1) > TIE)
        places.append(list(range(len(rows), len(rows) + len(group))))
        rows += group
        chances += [1 / distinct] * len(group)
    if not rows:
        raise ValueError("identification: no group has two captions, so there is nothing to tell apart; group more loosely")
    right = torch.cat(right)
    share = float(right.double().mean())
    return Identification(right, torch.tensor(rows), places, share, sum(chances) / len(chances))


def _rows_together(image_embeds: Any, text_embeds: Any, operation: str) -> tuple[torch.Tensor, torch.Tensor]:
    names = ("image_embeds", "text_embeds")
    images, texts = as_pair(image_embeds, text_embeds, operation, names=names)
    if len(images) != len(texts):
        raise ValueError(f"{operation}: image_embeds and text_embeds must have one row per picture, got {len(images)} and "
                         f"{len(texts)} rows; repeat the text of a prompt with several pictures")
    return as_unit(images, f"{operation}: image_embeds"), as_unit(texts, f"{operation}: text_embeds")
