"""How much the pictures of a group differ, how far sharing moved each of them, and how many are drawn from memory."""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sage.evaluation.checks import as_features, as_groups, as_pair
from sage.evaluation.pictures import as_uint8

__all__ = ["Copies", "Distance", "PerGroup", "copies", "distance_to", "lpips_distance", "pairwise_distance", "vendi_score",
           "vendi_within"]

BLOCK = 1024  # pictures whose distances to all reference pictures are held at once


@dataclass(frozen=True, eq=False)
class PerGroup:
    """A figure of every group that has two pictures or more; `interval(x.values, x.singles)` is its mean with the interval.

    Args:
        values: float64 [G'].
        kept: int64 [G'], which of the given groups those are.
    """

    values: torch.Tensor
    kept: torch.Tensor

    @property
    def mean(self) -> float:
        """Every group counts once, whatever its size."""
        return float(self.values.mean())

    @property
    def singles(self) -> list[list[int]]:
        """Each value as a group of its own, for resampling."""
        return [[k] for k in range(len(self.values))]

    def joined(self, count: int) -> list[list[int]]:
        """Places of the values of every `count` given groups after one another, for resampling those that are no independent ones."""
        places: dict[int, list[int]] = {}
        for place, number in enumerate(self.kept.tolist()):
            places.setdefault(number // count, []).append(place)
        return list(places.values())


def pairwise_distance(features: Any, groups: Sequence[Sequence[int]]) -> PerGroup:
    """The mean Euclidean distance between two different pictures of a group, in units of the features.

    Args:
        features: [N, C].
        groups: rows that share a group; those of one row are left out.

    Raises:
        TypeError, ValueError: features not finite and real, groups overlap or hold no such row, no group with two rows.
    """
    def mean_distance(x: torch.Tensor) -> torch.Tensor:
        apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # 0 for equal rows, to the bit
        return apart.sum() / (len(x) * (len(x) - 1))

    return _per_group(features, groups, mean_distance, "pairwise_distance")


def vendi_score(features: Any) -> float:
    """exp of the entropy of the eigenvalues of K / N, K the cosines of the rows (arXiv:2210.02410, eq. 1): an effective number.

    These lines are our own: the package `vendi-score` has the same ones, but brings scikit-learn for them.

    Args:
        features: [N, C], no row of zeros.

    Returns:
        1 for pictures with one and the same feature, N for N orthogonal ones.

    Raises:
        TypeError, ValueError: features not finite and real, or a row of zeros.
    """
    features = as_features(features, "vendi_score: features")
    lengths = features.norm(dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise ValueError(f"vendi_score: features must not be zero, but {int((lengths == 0).sum())} rows are; they have no direction")
    x = features / lengths
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x  # the same eigenvalues but zeros
    p = torch.linalg.eigvalsh(gram / len(x)).clamp_min(0)
    return math.exp(float(torch.special.entr(p).sum()))


def vendi_within(features: Any, groups: Sequence[Sequence[int]]) -> PerGroup:
    """The Vendi score of each group of two or more. It grows with the group, so compare the same groups only.

    Not the "Conditional Vendi Score" of arXiv:2411.02817, which conditions on the prompts' kernel instead of on groups.

    Args, Raises: as `pairwise_distance` and `vendi_score`.
    """
    return _per_group(features, groups, vendi_score, "vendi_within")


def _per_group(features: Any, groups: Any, figure: Any, operation: str) -> PerGroup:
    features = as_features(features, f"{operation}: features")
    groups = as_groups(groups, len(features), f"{operation}: groups")
    kept = [k for k, group in enumerate(groups) if len(group) > 1]
    if not kept:
        raise ValueError(f"{operation}: no group has two pictures, got {len(groups)} groups; there is nothing to compare")
    values = [float(figure(features[groups[k]])) for k in kept]
    return PerGroup(torch.tensor(values, dtype=torch.float64), torch.tensor(kept))


@dataclass(frozen=True, eq=False)
class Distance:
    """How far each picture is from its counterpart.

    Args:
        rmse: float64 [N], root of the mean square difference of the pixels, in levels of 0 to 255.
        psnr_db: float64 [N], 20 log₁₀(255 / rmse) [dB]; infinite for equal pictures.
        feature: float64 [N], Euclidean distance of the features; None without an extractor.
    """

    rmse: torch.Tensor
    psnr_db: torch.Tensor
    feature: torch.Tensor | None

    @property
    def mean_psnr_db(self) -> float:
        """The PSNR of the mean square error [dB]: finite unless all pictures are equal, unlike the mean of `psnr_db`."""
        return float(20 * torch.log10(255 / self.rmse.square().mean().sqrt()))


def distance_to(a_images: Any, b_images: Any, extractor: Any = None) -> Distance:
    """The distance of each picture to its counterpart, such as the one drawn of the same prompt and seed without sharing.

    Args:
        a_images, b_images: as in `sage.evaluation.pictures.as_uint8`, in the same order and of the same sizes.
        extractor: whose features to compare too; None: pixels only.

    Raises:
        TypeError, ValueError: no pictures, two counts, two sizes of one pair.
    """
    a, b = list(as_uint8(a_images, "distance_to: a_images")), list(as_uint8(b_images, "distance_to: b_images"))
    if len(a) != len(b) or not a:
        raise ValueError(f"distance_to: a_images and b_images must be pairs, at least one, got {len(a)} and {len(b)} pictures")
    for k, (x, y) in enumerate(zip(a, b)):
        if x.shape != y.shape:
            raise ValueError(f"distance_to: pair {k} must have one size, got {list(x.shape)} and {list(y.shape)}; resize neither: "
                             "draw both at one size")
    rmse = torch.stack([(x.double() - y.double()).square().mean().sqrt() for x, y in zip(a, b)])
    feature = None
    if extractor is not None:
        pair = as_pair(extractor.image_features(a), extractor.image_features(b), "distance_to")
        feature = (pair[0] - pair[1]).norm(dim=1)
    return Distance(rmse, 20 * torch.log10(255 / rmse), feature)


@dataclass(frozen=True, eq=False)
class Copies:
    """What `copies` found.

    Args:
        of_other: bool [N], whether the nearest reference picture is that of another caption.
        nearest: int64 [N], the nearest reference picture.
        share: of pictures with `of_other`.
    """

    of_other: torch.Tensor
    nearest: torch.Tensor
    share: float


def copies(image_features: Any, reference_features: Any, reference_captions: Sequence[str], captions: Sequence[str]) -> Copies:
    """How many pictures are nearest to a reference picture of another caption: memorising is not drawing.

    Args:
        image_features: [N, C].
        reference_features: [M, C], for example of the pictures trained on.
        reference_captions: [M].
        captions: [N], each of which must be among those of the reference.

    Returns:
        Copies, by Euclidean distance. Where a picture of its own caption is as near as another, that counts as the nearest.

    Raises:
        TypeError, ValueError: features as in `sage.evaluation.checks.as_pair`, or captions that are not one per row.
        ValueError: a caption without reference picture, of which every nearest picture would be another's.
    """
    images, references = as_pair(image_features, reference_features, "copies", names=("image_features", "reference_features"))
    for name, rows, texts in (("captions", images, captions), ("reference_captions", references, reference_captions)):
        if len(texts) != len(rows):
            raise ValueError(f"copies: {name} must be one per row of features, got {len(texts)} for {len(rows)} rows")
    number = {caption: k for k, caption in enumerate(dict.fromkeys(reference_captions))}
    unknown = [caption for caption in captions if caption not in number]
    if unknown:
        raise ValueError(f"copies: {len(unknown)} captions have no reference picture, the first is {unknown[0]!r}; leave them out")
    theirs = torch.tensor([number[caption] for caption in reference_captions], device=images.device)
    ours = torch.tensor([number[caption] for caption in captions], device=images.device)
    of_other, nearest = [], []
    for x, caption in zip(images.split(BLOCK), ours.split(BLOCK)):
        apart = torch.cdist(x, references, compute_mode="donot_use_mm_for_euclid_dist")
        own = caption[:, None] == theirs
        near, far = apart.masked_fill(~own, torch.inf).min(1), apart.masked_fill(own, torch.inf).min(1)
        of_other.append(far.values < near.values)
        nearest.append(torch.where(of_other[-1], far.indices, near.indices))
    of_other = torch.cat(of_other)
    return Copies(of_other, torch.cat(nearest), float(of_other.double().mean()))


def lpips_distance(a_images: Any, b_images: Any, net: str = "alex", allow_pickle: bool = False) -> torch.Tensor:
    """LPIPS (arXiv:1801.03924) of each picture and its counterpart, as torchmetrics computes it.

    Its weights exist as pickles only: torchvision downloads the backbone, and the heads come with torchmetrics. So it runs with
    consent alone. The tests cover its refusals and what it does with a network, not the network: they have no such weights.

    Args:
        a_images, b_images: as in `distance_to`, all of one size.
        net: "alex", "vgg" or "squeeze".
        allow_pickle: consent to download and unpickle these weights.

    Returns:
        [N] float64.

    Raises:
        RuntimeError: no consent; torchmetrics or torchvision is missing or broken; the weights cannot be had.
        TypeError, ValueError: as `distance_to`; an unknown net; pictures of different sizes.
    """
    if net not in ("alex", "vgg", "squeeze"):
        raise ValueError(f'lpips_distance: net must be "alex", "vgg" or "squeeze", got {net!r}')
    if not allow_pickle:
        raise RuntimeError("lpips_distance: the weights of LPIPS exist as pickles only, which can run code when loaded; pass "
                           "allow_pickle=True if you trust torchvision and torchmetrics, or use distance_to with an extractor")
    a, b = list(as_uint8(a_images, "lpips_distance: a_images")), list(as_uint8(b_images, "lpips_distance: b_images"))
    if len(a) != len(b) or not a or len({x.shape for x in a + b}) != 1:
        raise ValueError(f"lpips_distance: a_images and b_images must be pairs of one size, got {len(a)} and {len(b)} pictures "
                         f"of sizes {sorted({tuple(x.shape[1:]) for x in a + b})}")
    metric = _lpips(net)
    scaled = lambda x: x[None].float() / 127.5 - 1
    with torch.no_grad():  # one at a time: of a batch the metric gives the mean
        return torch.tensor([float(metric(scaled(x), scaled(y))) for x, y in zip(a, b)], dtype=torch.float64)


def _lpips(net: str) -> torch.nn.Module:
    """(pictures, pictures), each [n, 3, H, W] in [-1, 1] → their mean LPIPS."""
    for name, what in (("torchvision", "pip install torchvision, the release that belongs to your torch"),
                       ("torchmetrics", 'pip install "sage-diffusion[eval]"')):
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
            raise RuntimeError(f"lpips_distance: needs {name}, which cannot be imported ({error}); {what}") from error
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type=net).eval()
    except OSError as error:
        raise RuntimeError(f"lpips_distance: cannot download the weights of {net!r} ({error}); connect, or put torchvision's file "
                           "into torch.hub's checkpoints folder") from error
