"""Distances between two sets of pictures, each given by its features; and what such a distance is worth.

    frechet_distance(drawn, real)                     # means and covariances
    kernel_distance(drawn, real)                      # all moments up to the third, no bias
    floor(real, frechet_distance, size=len(drawn))    # what two sets of one and the same distribution would have
    FrechetTo(real), KernelTo(real)                   # the same two for many sets, with what is of `real` alone computed once

What a distance may be called depends on the extractor of the features: `sage.evaluation.distance_name`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sage.evaluation.checks import as_features, as_groups, as_pair, as_unit
from sage.plan_checks import integer

__all__ = ["FrechetTo", "KernelTo", "Spread", "cmmd", "floor", "frechet_distance", "frechet_from_moments", "kernel_distance",
           "kernel_distance_subsets"]

BLOCK = 2048  # rows of a kernel matrix that are computed at once: 32 MiB of float64 for each block


@dataclass(frozen=True)
class Spread:
    """A distance measured several times, on other rows each time.

    Args:
        mean: of the measurements.
        sd: their standard deviation (divided by count − 1); NaN for a single one.
        size: rows on either side.
        count: measurements.
    """

    mean: float
    sd: float
    size: int
    count: int

    @classmethod
    def of(cls, values: list[float], size: int) -> "Spread":
        x = torch.tensor(values, dtype=torch.float64)
        return cls(float(x.mean()), float(x.std()) if len(values) > 1 else math.nan, size, len(values))

    def as_json(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN: None in its place."""
        return asdict(self) | {"sd": None if math.isnan(self.sd) else self.sd}


def frechet_distance(a: Any, b: Any) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), the squared Fréchet distance of two fitted Gaussians (arXiv:1706.08500, eq. 6).

    Covariances are divided by N − 1. With A and B the centred rows over √(N − 1), tr (Σ₁Σ₂)^½ is the sum of the singular values
    of A Bᵀ. Neither a covariance nor the root of a matrix is formed, so a set has distance 0 to itself up to 1e-14 of its
    variance, with fewer rows than columns too; roots of the eigenvalues of Σ₁Σ₂, as torchmetrics takes them, keep half the digits
    of a covariance that has no full rank.

    Args:
        a, b: [N, C] and [M, C] tensors or arrays of real numbers, N, M ≥ 2.

    Returns:
        At least 0, in squared units of the features. Biased upwards, the more the fewer rows and the more columns there are:
        compare at equal N and M only, beside `floor`.

    Raises:
        TypeError, ValueError: no finite real [N, C], fewer than two rows, two widths.
    """
    a, b = as_pair(a, b, "frechet_distance", least=2)
    return _frechet(a.mean(0), _root_of_rows(a), b.mean(0), _root_of_rows(b))


class FrechetTo:
    """`frechet_distance` of many sets to one, whose mean and covariance are looked at once.

    Args:
        reference: [M, C], M ≥ 2.

    Raises:
        TypeError, ValueError: as `frechet_distance`.
    """

    def __init__(self, reference: Any):
        reference = as_features(reference, "FrechetTo: reference", 2)
        self._mean, self._root = reference.mean(0), _root_of_rows(reference)

    def __call__(self, a: torch.Tensor) -> float:
        """The distance of float64 [N, C], N ≥ 2."""
        return _frechet(a.mean(0), _root_of_rows(a), self._mean, self._root)


def frechet_from_moments(mean_a: Any, cov_a: Any, mean_b: Any, cov_b: Any) -> float:
    """`frechet_distance` of two Gaussians that are given by their moments.

    Args:
        mean_a, mean_b: [C].
        cov_a, cov_b: [C, C], symmetric, no eigenvalue below 0 but by rounding.

    Raises:
        TypeError, ValueError: not finite and real, not of these shapes, not symmetric, or with a negative eigenvalue.
    """
    means = [as_features(torch.as_tensor(mean)[None], f"frechet_from_moments: {name}")[0]
             for mean, name in ((mean_a, "mean_a"), (mean_b, "mean_b"))]
    if len(means[0]) != len(means[1]):
        raise ValueError(f"frechet_from_moments: mean_a and mean_b must have one width, got {len(means[0])} and {len(means[1])}")
    roots = [_root_of_covariance(cov, len(means[0]), f"frechet_from_moments: {name}")
             for cov, name in ((cov_a, "cov_a"), (cov_b, "cov_b"))]
    return _frechet(means[0], roots[0], means[1], roots[1])


def kernel_distance(a: Any, b: Any, degree: int = 3, gamma: float | None = None, coef: float = 1.0, block: int = BLOCK) -> float:
    """MMD² with the kernel (γ x·y + coef)^degree, without bias and over all pairs (arXiv:1801.01401, section 4; Gretton, eq. 3).

    KID's kernel, but no random subsets: the mean over infinitely many subsets, which is what KID estimates.

    Args:
        a, b: [N, C] and [M, C] tensors or arrays of real numbers, N, M ≥ 2.
        degree: at least 1.
        gamma: γ; None: 1/C.
        coef: the constant of the kernel.
        block: rows of the kernel matrix at once; memory grows with its square, and with nothing else.

    Returns:
        0 in expectation for two sets of one distribution, so often below 0. KID is mostly printed times 1000; this is not.

    Raises:
        TypeError, ValueError: no finite real [N, C], fewer than two rows, two widths; degree or block below 1.
    """
    a, b = as_pair(a, b, "kernel_distance", least=2)
    kernel = _polynomial(a.shape[1], degree, gamma, coef, "kernel_distance")
    return _unbiased(a, b, kernel, integer(block, "kernel_distance: block", 1))


class KernelTo:
    """`kernel_distance`, with its usual kernel, of many sets to one, whose own pairs are summed once.

    Args:
        reference: [M, C], M ≥ 2.
        block: as in `kernel_distance`.

    Raises:
        TypeError, ValueError: as `kernel_distance`.
    """

    def __init__(self, reference: Any, block: int = BLOCK):
        self._reference = as_features(reference, "KernelTo: reference", 2)
        self._block = integer(block, "KernelTo: block", 1)
        self._kernel = _polynomial(self._reference.shape[1], 3, None, 1.0, "KernelTo")
        count = len(self._reference)
        self._own = _own_pairs(self._reference, self._kernel, self._block)[0] / (count * (count - 1))

    def of_groups(self, a: Any, groups: Sequence[Sequence[int]]) -> Callable[[torch.Tensor], float]:
        """The distance of rows of `a` as a function of these rows, for `interval`: all rows of some groups, each as often as wanted.

        The kernel is summed over pairs of groups once; after that a resample costs no more than a product with those sums.

        Args:
            a: [N, C], on the CPU as the reference.
            groups: of rows of a, at least two rows together.
        """
        a = as_features(a, "KernelTo: a", 2)
        groups = as_groups(groups, len(a), "KernelTo: groups")
        sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)
        number = torch.arange(len(groups)).repeat_interleave(sizes.long())  # the group of each row of x
        x = a[torch.tensor([row for group in groups for row in group])]
        pairs = torch.zeros(len(groups), len(groups), dtype=torch.float64)  # sums of the kernel over rows of two groups
        itself, across = torch.zeros(2, len(groups), dtype=torch.float64)  # over rows with themselves, and with the reference's
        blocks = list(zip(x.split(self._block), number.split(self._block)))
        for rows, of in blocks:
            for others, of_others in blocks:
                kernel = self._kernel(rows, others)
                by_group = torch.zeros(len(rows), len(groups), dtype=torch.float64).index_add_(1, of_others, kernel)
                pairs.index_add_(0, of, by_group)
                if others is rows:
                    itself.index_add_(0, of, kernel.diagonal())
            for others in self._reference.split(self._block):
                across.index_add_(0, of, self._kernel(rows, others).sum(1))
        across /= len(self._reference)
        first = torch.tensor([group[0] for group in groups])

        def distance(rows: torch.Tensor) -> float:
            times = torch.bincount(rows, minlength=len(a))[first].double()  # how often each group was taken
            n = float(times @ sizes)
            return float((times @ pairs @ times - times @ itself) / (n * (n - 1)) + self._own - 2 * (times @ across) / n)

        return distance


def kernel_distance_subsets(a: Any, b: Any, subsets: int = 100, subset_size: int = 1000, seed: int = 0, degree: int = 3,
                            gamma: float | None = None, coef: float = 1.0) -> Spread:
    """`kernel_distance` of random subsets, as KID is mostly printed: mean and standard deviation over the subsets.

    The subsets overlap, so the deviation is no error of the mean; for that use `sage.evaluation.interval`.

    Args:
        a, b, degree, gamma, coef: as in `kernel_distance`.
        subsets: how many, at least 1.
        subset_size: rows drawn from either set, without repetition within a subset.
        seed: of the rows drawn.

    Raises:
        TypeError, ValueError: as `kernel_distance`; a set smaller than subset_size.
    """
    a, b = as_pair(a, b, "kernel_distance_subsets", least=2)
    subsets = integer(subsets, "kernel_distance_subsets: subsets", 1)
    size = integer(subset_size, "kernel_distance_subsets: subset_size", 2)
    if size > min(len(a), len(b)):
        raise ValueError(f"kernel_distance_subsets: subset_size is {size}, but the smaller set has {min(len(a), len(b))} rows; "
                         "lower it for both sides of a comparison")
    kernel = _polynomial(a.shape[1], degree, gamma, coef, "kernel_distance_subsets")
    generator = torch.Generator().manual_seed(seed)
    rows = lambda x: x[torch.randperm(len(x), generator=generator)[:size].to(x.device)]
    return Spread.of([_unbiased(rows(a), rows(b), kernel, BLOCK) for _ in range(subsets)], size)


def cmmd(a: Any, b: Any, sigma: float = 10.0, scale: float = 1000.0, unbiased: bool = False, block: int = BLOCK) -> float:
    """1000 · MMD² with a Gaussian kernel, exp(−|x − y|² / 2σ²), on CLIP embeddings of length 1 (arXiv:2401.09603, section 4).

    By default the V-statistic, in which every picture is also paired with itself, as the authors' program computes the published
    numbers; it is biased upwards, for the paper's σ by at most 20 · (1/N + 1/M).

    Args:
        a, b: [N, C] and [M, C], rows of length 1, N, M ≥ 2.
        sigma: σ, above 0.
        scale: the factor in front.
        unbiased: whether to leave out the pairs of a picture with itself; then 0 in expectation for one distribution.
        block: as in `kernel_distance`.

    Raises:
        TypeError, ValueError: no finite real [N, C], rows of another length than 1, fewer than two rows, two widths; sigma not > 0.
    """
    a, b = as_pair(a, b, "cmmd", least=2)
    a, b = as_unit(a, "cmmd: a"), as_unit(b, "cmmd: b")
    if not sigma > 0:
        raise ValueError(f"cmmd: sigma must be above 0, got {sigma!r}; the paper's is 10")
    # Kernel − 1, which changes no MMD: the kernel is close to 1 everywhere, and its last digits are what counts.
    kernel = lambda x, y: torch.expm1((x @ y.T - 1) / sigma**2)
    block = integer(block, "cmmd: block", 1)
    return scale * (_unbiased(a, b, kernel, block) if unbiased else _biased(a, b, kernel, block))


def floor(features: Any, distance: Callable[[torch.Tensor, torch.Tensor], float], splits: int = 10, seed: int = 0,
          size: int | None = None) -> Spread:
    """The distance of real pictures from real pictures: between two disjoint random parts of one set, for several splits.

    A biased distance such as Fréchet's is far from 0 there; what a comparison shows above this is its result.

    Args:
        features: [N, C].
        distance: of two sets; any of this module.
        splits: how many, at least 1.
        seed: of the splits.
        size: rows of either part: those of the sets compared; None: N // 2.

    Returns:
        Mean and standard deviation over the splits, which share rows: the deviation is no error of the mean.

    Raises:
        TypeError, ValueError: no finite real [N, C] with N ≥ 4; fewer than 2 · size rows.
    """
    features = as_features(features, "floor: features", least=4)
    splits, n = integer(splits, "floor: splits", 1), len(features)
    size = n // 2 if size is None else integer(size, "floor: size", 2)
    if 2 * size > n:
        raise ValueError(f"floor: two parts of {size} rows need {2 * size} rows, got {n}; give more real pictures, or compare at "
                         f"{n // 2} rows on either side")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(splits):
        order = torch.randperm(n, generator=generator).to(features.device)
        values.append(float(distance(features[order[:size]], features[order[size : 2 * size]])))
    return Spread.of(values, size)


def _root_of_rows(x: torch.Tensor) -> torch.Tensor:
    """R with RᵀR the covariance of x, [min(N, C), C]."""
    return torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R


def _root_of_covariance(cov: Any, width: int, name: str) -> torch.Tensor:
    """R with RᵀR = cov, [C, C]."""
    cov = as_features(cov, name)
    if cov.shape != (width, width):
        raise ValueError(f"{name} must be {[width, width]}, got {list(cov.shape)}")
    largest = float(cov.abs().max())
    if float((cov - cov.T).abs().max()) > 1e-8 * largest:
        raise ValueError(f"{name} must be symmetric; (cov + cov.T) / 2 is")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    if float(values[0]) < -1e-8 * largest:
        raise ValueError(f"{name} must have no negative eigenvalue, got {float(values[0]):.3g}; it is no covariance")
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def _frechet(mean_a: torch.Tensor, root_a: torch.Tensor, mean_b: torch.Tensor, root_b: torch.Tensor) -> float:
    apart = (mean_a - mean_b).square().sum()
    spread = root_a.square().sum() + root_b.square().sum()  # tr(Σ₁ + Σ₂)
    common = torch.linalg.svdvals(root_a @ root_b.T).sum()  # tr (Σ₁Σ₂)^½
    return max(float(apart + spread - 2 * common), 0.0)


def _polynomial(width: int, degree: int, gamma: float | None, coef: float, operation: str) -> Callable:
    degree, gamma = integer(degree, f"{operation}: degree", 1), 1 / width if gamma is None else gamma
    return lambda x, y: (x @ y.T * gamma + coef) ** degree


def _all_pairs(a: torch.Tensor, b: torch.Tensor, kernel: Callable, block: int) -> float:
    """The sum of the kernel over every pair of a row of a and a row of b."""
    return sum(float(kernel(x, y).sum()) for x in a.split(block) for y in b.split(block))


def _own_pairs(a: torch.Tensor, kernel: Callable, block: int) -> tuple[float, float]:
    """The sum of the symmetric kernel over ordered pairs of two different rows of a, and that over rows with themselves."""
    parts, apart, own = a.split(block), 0.0, 0.0
    for i, x in enumerate(parts):
        square = kernel(x, x)
        own += float(square.trace())
        apart += float(square.sum() - square.trace())
        apart += 2 * sum(float(kernel(x, y).sum()) for y in parts[i + 1 :])
    return apart, own


def _unbiased(a: torch.Tensor, b: torch.Tensor, kernel: Callable, block: int) -> float:
    """MMD² as a U-statistic."""
    n, m = len(a), len(b)
    within = _own_pairs(a, kernel, block)[0] / (n * (n - 1)) + _own_pairs(b, kernel, block)[0] / (m * (m - 1))
    return within - 2 * _all_pairs(a, b, kernel, block) / (n * m)


def _biased(a: torch.Tensor, b: torch.Tensor, kernel: Callable, block: int) -> float:
    """MMD² as a V-statistic."""
    within = sum(_own_pairs(a, kernel, block)) / len(a) ** 2 + sum(_own_pairs(b, kernel, block)) / len(b) ** 2
    return within - 2 * _all_pairs(a, b, kernel, block) / (len(a) * len(b))
