"""Distances between sets of pictures: against closed forms, scipy, torchmetrics, and the formulas written out."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from sage.evaluation import cmmd, floor, frechet_distance, frechet_from_moments, kernel_distance, kernel_distance_subsets
from sage.evaluation.distances import FrechetTo, KernelTo

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(n, c, seed=0, mean=0.0, scale=1.0):
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + mean


def unit(n, c, seed=0, mean=0.0):
    return torch.nn.functional.normalize(normal(n, c, seed, mean), dim=1)


def rotation(c, seed=9):
    return torch.linalg.qr(normal(c, c, seed)).Q


class Columns(torch.nn.Module):
    """An "extractor" for torchmetrics: the pictures are the features."""

    num_features = 6

    def forward(self, x):
        return x.reshape(len(x), -1)[:, : self.num_features]


# Fréchet


def test_frechet_of_known_gaussians_is_exact():
    """Covariances that commute: |Δμ|² + Σ (√a − √b)²."""
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.25]).double()
    q, apart = rotation(3), torch.tensor([1.0, -2.0, 0.5]).double()
    got = frechet_from_moments(torch.zeros(3), q @ a.diag() @ q.T, apart, q @ b.diag() @ q.T)
    assert got == pytest.approx(float(apart.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-13)


def test_frechet_of_covariances_that_do_not_commute_agrees_with_scipy():
    a, b = normal(40, 5, 1), normal(30, 5, 2) @ normal(5, 5, 3) + 1
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    apart = (a.mean(0) - b.mean(0)).square().sum()
    wanted = float(apart) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-10)
    assert frechet_from_moments(a.mean(0), cov_a, b.mean(0), cov_b) == pytest.approx(wanted, rel=1e-10)


def test_frechet_of_samples_finds_what_the_gaussians_have():
    """n = 20,000, C = 3. By the delta method the variance is at most 4 Σ Δμ²(σ₁² + σ₂²)/n + 2 Σ Δσ²(σ₁² + σ₂²)/n; bias is of C²/n."""
    n, scale, apart = 20_000, torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([0.5, 0.0, 1.0]).double()
    a, b = normal(n, 3, 4), normal(n, 3, 5) * scale + apart
    wanted = float(apart.square().sum() + (scale - 1).square().sum())
    sd = math.sqrt(float(((4 * apart.square() + 2 * (scale - 1).square()) * (1 + scale.square())).sum()) / n)
    assert abs(frechet_distance(a, b) - wanted) < 4 * sd + 9 * 4 / n
    assert 4 * sd < 0.05 * wanted  # the bound says something


def test_frechet_agrees_with_torchmetrics():
    fid = FrechetInceptionDistance(feature=Columns(), input_img_size=(3, 2, 1))
    fid.set_dtype(torch.float64)
    a, b = normal(50, 6, 6), normal(40, 6, 7, 0.3, 1.5)
    fid.update(a.reshape(50, 3, 2, 1), real=True)
    fid.update(b.reshape(40, 3, 2, 1), real=False)
    assert frechet_distance(a, b) == pytest.approx(float(fid.compute()), rel=1e-6)


@pytest.mark.parametrize("n", [2, 10, 64, 300])
def test_frechet_of_a_set_with_itself_is_zero_also_with_fewer_rows_than_columns(n):
    a = normal(n, 64, 8, 3.0)
    assert frechet_distance(a, a) < 1e-12 * float(a.var(0).sum())
    assert frechet_distance(a, a[torch.randperm(n, generator=torch.Generator().manual_seed(0))]) < 1e-12 * float(a.var(0).sum())
    assert frechet_distance(a, a + 1) == pytest.approx(64, rel=1e-11)  # a shift by 1 in 64 directions


def test_frechet_with_fewer_rows_than_columns_is_that_of_the_space_they_span():
    few_a, few_b = normal(5, 3, 10), normal(7, 3, 11, 1.0)
    wide = normal(3, 40, 12)
    basis = torch.linalg.qr(wide.T).Q.T  # [3, 40], orthonormal rows: distances stay
    assert frechet_distance(few_a @ basis, few_b @ basis) == pytest.approx(frechet_distance(few_a, few_b), rel=1e-10)


def test_frechet_is_biased_upwards_more_so_for_few_rows():
    """Two sets of one distribution: the mean alone contributes C · 2/n."""
    mean = {n: np.mean([frechet_distance(normal(n, 8, s), normal(n, 8, 1000 + s)) for s in range(20)]) for n in (20, 80, 320)}
    assert mean[20] > 2 * mean[80] > 4 * mean[320] > 0
    assert all(value > 8 * 2 / n for n, value in mean.items())


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distances_are_symmetric_and_do_not_change_by_rotation(distance):
    a, b, q = normal(40, 6, 13), normal(30, 6, 14, 0.5), rotation(6)
    assert distance(a @ q, b @ q) == pytest.approx(distance(a, b), rel=1e-10)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-12)


def test_frechet_computes_in_float64_whatever_comes():
    a, b = normal(40, 6, 15, 100.0, 0.01).float(), normal(40, 6, 16, 100.0, 0.01).float()
    exact = frechet_distance(a.double(), b.double())
    assert frechet_distance(a, b) == exact == frechet_distance(a.numpy(), b.numpy())
    assert frechet_distance(np.array([[0, 0], [2, 0]]), np.array([[1, 0], [3, 0]])) == pytest.approx(1)


# Kernel distance


def written_out(a, b, kernel):
    """MMD² by three loops over pairs."""
    n, m = len(a), len(b)
    xx = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return float(xx + yy - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m))


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_kernel_distance_is_its_formula_in_blocks_of_any_size(block):
    a, b = normal(7, 3, 1), normal(10, 3, 2, 0.5)
    wanted = written_out(a, b, lambda x, y: (x @ y / 3 + 1) ** 3)
    assert kernel_distance(a, b, block=block) == pytest.approx(wanted, rel=1e-11)
    wanted = written_out(a, b, lambda x, y: (x @ y * 0.2 + 2) ** 2)
    assert kernel_distance(a, b, degree=2, gamma=0.2, coef=2.0, block=block) == pytest.approx(wanted, rel=1e-11)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kernel_distance_agrees_with_torchmetrics_on_one_subset():
    kid = KernelInceptionDistance(feature=Columns(), subset_size=60, subsets=1)
    a, b = normal(60, 6, 3), normal(60, 6, 4, 0.4)
    kid.update(a.reshape(60, 3, 2, 1), real=True)
    kid.update(b.reshape(60, 3, 2, 1), real=False)
    assert kernel_distance(a, b) == pytest.approx(float(kid.compute()[0]), rel=1e-4)  # it computes in float32 here
    assert kernel_distance_subsets(a, b, subsets=2, subset_size=60).mean == pytest.approx(kernel_distance(a, b), rel=1e-10)


def test_kernel_distance_is_centred_on_zero_for_one_distribution():
    """Mean over 200 pairs of sets within four of its standard errors; and it is no constant: the V-statistic would be far off."""
    values = np.array([kernel_distance(normal(20, 4, s), normal(30, 4, 5000 + s)) for s in range(200)])
    error = values.std(ddof=1) / math.sqrt(200)
    assert abs(values.mean()) < 4 * error
    own = float((normal(1000, 4, 7).square().sum(1) / 4 + 1).pow(3).mean()) - 1  # what pairs of a row with itself would add, · n
    assert own / 20 > 8 * error


@pytest.mark.parametrize("block", [3, 7, 2048])
def test_many_sets_to_one_are_as_each_alone(block):
    """Whole groups, any number of times, of unequal size and order; one row is in no group."""
    x, reference = normal(20, 5, 1, 0.3), normal(17, 5, 2)
    groups = [[0, 1, 2], [4, 3], [7, 19, 5, 6], [8], list(range(9, 18))]
    by_rows, by_groups = FrechetTo(reference), KernelTo(reference, block).of_groups(x, groups)
    for chosen in ([0, 1, 2, 3, 4], [1, 1, 1], [4, 0, 4, 2], [3, 3]):
        rows = torch.tensor([row for k in chosen for row in groups[k]])
        assert by_groups(rows) == pytest.approx(kernel_distance(x[rows], reference), rel=1e-12)
        assert by_rows(x[rows]) == frechet_distance(x[rows], reference)


def test_subsets_are_seeded_and_estimate_the_distance_of_all_pairs():
    a, b = normal(300, 4, 5), normal(300, 4, 6, 0.5)
    one, two = (kernel_distance_subsets(a, b, subsets=50, subset_size=60, seed=s) for s in (1, 2))
    assert one == kernel_distance_subsets(a, b, subsets=50, subset_size=60, seed=1) != two
    assert (one.size, one.count) == (60, 50)
    assert abs(one.mean - kernel_distance(a, b)) < 4 * one.sd / math.sqrt(50) and one.sd > 0


# CMMD


def test_cmmd_is_its_formula():
    a, b = unit(9, 5, 1), unit(6, 5, 2, 0.3)
    kernel = lambda x, y: torch.exp(-(x - y).square().sum(-1) / 200)
    pairs = lambda x, y: kernel(x[:, None], y[None]).mean()
    assert cmmd(a, b) == pytest.approx(1000 * float(pairs(a, a) + pairs(b, b) - 2 * pairs(a, b)), rel=1e-9)
    assert cmmd(a, b, unbiased=True) == pytest.approx(1000 * written_out(a, b, kernel), rel=1e-8)
    assert cmmd(a, b, block=2) == pytest.approx(cmmd(a, b), rel=1e-12)


def test_cmmd_of_a_set_with_itself_is_zero_and_its_bias_is_as_said():
    a, b = unit(50, 32, 3), unit(40, 32, 4)
    assert abs(cmmd(a, a)) < 1e-11
    assert 0 < cmmd(a, b) < 20 * (1 / 50 + 1 / 40) and cmmd(a, b, unbiased=True) < cmmd(a, b)


def test_cmmd_takes_half_precision_and_refuses_what_is_not_of_length_one():
    a, b = unit(9, 5, 5), unit(6, 5, 6)
    assert cmmd(a.half(), b.half()) == pytest.approx(cmmd(a, b), rel=0.05)
    with pytest.raises(ValueError, match=r"cmmd: b must have rows of length 1, but rows \[0, 1, 2, 3, 4, 5\].*embed_images"):
        cmmd(a, 2 * b)
    with pytest.raises(ValueError, match="cmmd: sigma must be above 0"):
        cmmd(a, b, sigma=0)


# The floor


def test_floor_compares_disjoint_parts_of_the_size_asked_for():
    rows = torch.arange(20.0)[:, None].repeat(1, 2)
    seen = []

    def distance(a, b):
        seen.append((a[:, 0].tolist(), b[:, 0].tolist()))
        return len(seen)

    result = floor(rows, distance, splits=4, size=7)
    assert (result.mean, result.size, result.count) == (2.5, 7, 4) and result.sd == pytest.approx(np.std([1, 2, 3, 4], ddof=1))
    assert all(len(a) == len(b) == 7 and not set(a) & set(b) for a, b in seen) and len({tuple(a) for a, _ in seen}) == 4


def test_floor_is_what_two_sets_of_one_distribution_have():
    real = normal(400, 6, 1)
    result = floor(real, frechet_distance, splits=10)
    fresh = np.array([frechet_distance(normal(200, 6, 100 + s), normal(200, 6, 300 + s)) for s in range(30)])
    assert abs(result.mean - fresh.mean()) < 4 * fresh.std() and result.size == 200
    assert result == floor(real, frechet_distance, splits=10) != floor(real, frechet_distance, splits=10, seed=1)
    assert floor(real, frechet_distance, splits=3, size=50).mean > 2 * result.mean  # at fewer rows the floor is higher
    alone = floor(real, frechet_distance, splits=1)
    assert math.isnan(alone.sd) and alone.as_json()["sd"] is None and alone.as_json()["size"] == 200


# Refusals


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: frechet_distance(a[:1], a), ValueError, "frechet_distance: a needs at least 2 rows, got 1"),
        (lambda a: kernel_distance(a, a[:1]), ValueError, "kernel_distance: b needs at least 2 rows, got 1"),
        (lambda a: frechet_distance(a, a[:, :3]), ValueError, r"one width, got \[12, 4\] and \[12, 3\]; use the same extractor"),
        (lambda a: frechet_distance(a[0], a), ValueError, r"frechet_distance: a must be \[N, C\].*got \[4\]"),
        (lambda a: frechet_distance(a.where(a < a.max(), math.nan), a), ValueError, r"a must be finite, but rows \[\d+\] hold NaN"),
        (lambda a: frechet_distance(a > 0, a), TypeError, "must hold real numbers, got torch.bool; use a.double"),
        (lambda a: frechet_distance([["x"]], a), TypeError, "must be a tensor or array of real numbers, got list"),
        (lambda a: kernel_distance(a, a, block=0), ValueError, "kernel_distance: block must be at least 1, got 0"),
        (lambda a: kernel_distance(a, a, degree=0), ValueError, "kernel_distance: degree must be at least 1"),
        (lambda a: kernel_distance_subsets(a, a), ValueError, "subset_size is 1000, but the smaller set has 12 rows"),
        (lambda a: floor(a, frechet_distance, size=7), ValueError, "two parts of 7 rows need 14 rows, got 12.*compare at 6 rows"),
        (lambda a: frechet_from_moments(a[0], a.T @ a, a[0, :3], a.T @ a), ValueError, "must have one width, got 4 and 3"),
        (lambda a: frechet_from_moments(a[0], a.T @ a, a[0], a.T @ a[:, :3]), ValueError, r"cov_b must be \[4, 4\], got \[4, 3\]"),
        (lambda a: frechet_from_moments(a[0], a[:4], a[0], a.T @ a), ValueError, "cov_a must be symmetric"),
        (lambda a: frechet_from_moments(a[0], -a.T @ a, a[0], a.T @ a), ValueError, "cov_a must have no negative eigenvalue, got -"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call(normal(12, 4))
