"""Matching, diversity and intervals: against closed forms, and intervals by how often they hold the truth."""

import json
import math
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from sage.evaluation import (
    clip_score,
    clip_scores,
    copies,
    distance_to,
    distances,
    diversity,
    frechet_distance,
    identification,
    interval,
    lpips_distance,
    paired_interval,
    pairwise_distance,
    vendi_score,
    vendi_within,
)
from sage.evaluation.bootstrap import Estimate, resample

pytestmark = pytest.mark.usefixtures("one_thread")


def unit(n, c, seed=0):
    x = torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1)


def plane(*degrees):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


# Matching


def test_clip_score_is_the_cosine_times_100_and_never_negative():
    images, texts = plane(0, 0, 0), plane(60, 90, 180)
    torch.testing.assert_close(clip_scores(images, texts), torch.tensor([50.0, 0.0, 0.0]).double(), atol=1e-12, rtol=0)
    assert clip_score(images, texts) == pytest.approx(50 / 3)
    with pytest.raises(ValueError, match="one row per picture, got 3 and 2 rows; repeat the text"):
        clip_score(images, texts[:2])
    with pytest.raises(ValueError, match="clip_score: text_embeds must have rows of length 1"):
        clip_score(images, 3 * texts)


def test_identification_asks_within_groups_only():
    texts = plane(0, 90, 0, 90, 45, 10)
    images = plane(10, 80, 80, 100, 45, 90)
    found = identification(images, texts, [[0, 1], [3, 2], [4]])
    assert found.right.tolist() == [True, True, True, False]  # row 2 points at row 3's caption
    assert found.rows.tolist() == [0, 1, 3, 2] and found.groups == [[0, 1], [2, 3]]
    assert (found.share, found.chance) == (0.75, 0.5)
    assert identification(images, texts, [[0, 1], [4, 5]]).right.tolist() == [True, True, True, False]
    assert interval(found.right, found.groups, seed=1).value == 0.75


def test_a_tie_is_wrong_and_one_caption_twice_is_no_tie():
    texts, images = plane(0, 0, 90), plane(5, -5, 85)
    assert identification(images, texts, [[0, 1, 2]]).right.tolist() == [False, False, True]
    assert identification(plane(45, 45), plane(0, 90), [[0, 1]]).right.tolist() == [False, False]
    found = identification(images, texts, [[0, 1, 2]], captions=["a", "a", "b"])
    assert found.right.all() and found.chance == 0.5
    with pytest.raises(ValueError, match="no group has two captions"):
        identification(images, texts, [[0, 1], [2]], captions=["a", "a", "b"])
    with pytest.raises(ValueError, match="captions must be one per picture, got 2 for 3"):
        identification(images, texts, [[0, 1, 2]], captions=["a", "b"])


def test_guessing_gets_the_chance_level():
    """600 groups of 2, 3 and 5 random captions with random pictures; within four standard errors, which clusters do not widen."""
    groups, start = [], 0
    for size in [2, 3, 5] * 200:
        groups.append(list(range(start, start + size)))
        start += size
    found = identification(unit(start, 16, 1), unit(start, 16, 2), groups)
    assert found.chance == pytest.approx(0.3)
    assert abs(found.share - found.chance) < 4 * math.sqrt(0.3 * 0.7 / start)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([[0, 1], [1, 2]], ValueError, "row 1 is in groups 0 and 1"),
        ([[0, 1], []], ValueError, "group 1 is empty"),
        ([[0, 9]], ValueError, "group 0 has row 9, but there are 4 rows, 0 to 3"),
        ([0, 1], TypeError, "must be a list of lists of row numbers"),
        ([[0, 0.5]], TypeError, "row of group 0 must be an integer, got 0.5"),
    ],
)
def test_groups_are_checked_everywhere(groups, error, message):
    x = unit(4, 3)
    for call in (lambda: identification(x, x, groups), lambda: pairwise_distance(x, groups), lambda: interval(x[:, 0], groups)):
        with pytest.raises(error, match=message):
            call()


# Diversity


def test_pairwise_distance_is_the_mean_over_pairs():
    x = torch.tensor([[0.0, 0], [3, 4], [0, 0], [1, 1], [1, 1], [7, 7]])
    found = pairwise_distance(x, [[0, 1, 2], [5], [3, 4]])
    torch.testing.assert_close(found.values, torch.tensor([10 / 3, 0.0]).double())
    assert found.kept.tolist() == [0, 2] and found.mean == pytest.approx(5 / 3) and found.singles == [[0], [1]]
    with pytest.raises(ValueError, match="pairwise_distance: no group has two pictures, got 2 groups"):
        pairwise_distance(x, [[0], [1]])


def test_vendi_has_its_closed_forms():
    eye = torch.eye(6)
    assert vendi_score(eye[:5]) == pytest.approx(5) and vendi_score(eye[:1].repeat(7, 1) * 3) == pytest.approx(1)
    assert vendi_score(torch.cat([eye[:3]] * 4)) == pytest.approx(3)  # repeated, and more rows than there are directions
    p = torch.tensor([(1 + 0.6) / 2, (1 - 0.6) / 2])  # two rows of cosine .6
    assert vendi_score(torch.tensor([[1.0, 0], [0.6, 0.8]])) == pytest.approx(math.exp(-float((p * p.log()).sum())))
    x = unit(12, 5, 3)
    gram = np.linalg.eigvalsh((x @ x.T / 12).numpy()).clip(1e-300)
    assert vendi_score(2 * x) == pytest.approx(math.exp(-(gram * np.log(gram)).sum()))
    with pytest.raises(ValueError, match="must not be zero, but 1 rows are"):
        vendi_score(torch.tensor([[0.0, 0], [1, 0]]))


def test_vendi_within_groups():
    found = vendi_within(torch.eye(4)[[0, 1, 2, 3, 3]], [[0, 1], [2], [3, 4]])
    torch.testing.assert_close(found.values, torch.tensor([2.0, 1.0]).double())
    assert found.kept.tolist() == [0, 2]


def picture(level, size=(4, 4)):
    return Image.new("RGB", size, (level, level, level))


def test_distance_to_counts_levels_of_255():
    found = distance_to([picture(10), picture(200), picture(0)], [picture(13), picture(200), picture(255)])
    assert found.rmse.tolist() == [3, 0, 255] and found.feature is None
    assert found.psnr_db.tolist() == pytest.approx([20 * math.log10(85), math.inf, 0])
    assert found.mean_psnr_db == pytest.approx(10 * math.log10(255**2 / ((9 + 255**2) / 3)))
    tensor = torch.full((1, 3, 4, 4), 10 / 127.5 - 1)
    assert distance_to(tensor, [picture(10)]).rmse.tolist() == [0]

    class Brightness:
        name, dim = "brightness", 1

        def image_features(self, images, batch=64):
            return torch.stack([image.float().mean()[None] for image in images])

    assert distance_to([picture(10)], [picture(14)], Brightness()).feature.tolist() == [4]


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        ([picture(1)], [picture(1)] * 2, ValueError, "must be pairs, at least one, got 1 and 2"),
        ([picture(1)], [picture(1, (4, 5))], ValueError, r"pair 0 must have one size, got \[3, 4, 4\] and \[3, 5, 4\]"),
        (["a.png"], [picture(1)], TypeError, "a_images must hold PIL images or uint8 tensors .*, got str"),
        ("a.png", [picture(1)], TypeError, "a_images must be a tensor .* or a list of PIL images, got str"),
        (torch.zeros(1, 4, 4, 3), [picture(1)], ValueError, r"must be \[N, 3, H, W\], got \[1, 4, 4, 3\]"),
        (torch.full((1, 3, 4, 4), 200.0), [picture(1)], ValueError, r"must be in \[-1, 1\], got 200"),
        (torch.full((1, 3, 4, 4), math.nan), [picture(1)], ValueError, r"must be in \[-1, 1\], got nan"),
        (torch.ones((1, 3, 4, 4), dtype=torch.int64), [picture(1)], TypeError, "uint8 or floats .* got torch.int64"),
    ],
)
def test_pictures_are_checked(a, b, error, message):
    with pytest.raises(error, match=message):
        distance_to(a, b)


def test_copies_are_nearest_to_another_captions_picture():
    references = torch.tensor([[0.0], [1.0], [5.0], [5.0]])
    found = copies(torch.tensor([[0.1], [0.9], [5.0], [4.0]]), references, ["cat", "dog", "fox", "owl"], ["cat", "cat", "fox", "dog"])
    assert found.of_other.tolist() == [False, True, False, True]  # row 2 is as near to the owl as to its own fox
    assert found.nearest.tolist() == [0, 1, 2, 2] and found.share == 0.5
    assert copies(references, references, ["a"] * 4, ["a"] * 4).share == 0
    with pytest.raises(ValueError, match="1 captions have no reference picture, the first is 'bear'"):
        copies(references[:1], references, ["cat", "dog", "fox", "owl"], ["bear"])
    with pytest.raises(ValueError, match="reference_captions must be one per row of features, got 1 for 4"):
        copies(references[:1], references, ["cat"], ["cat"])


def test_copies_in_blocks(monkeypatch):
    x, captions = unit(50, 3, 1), [str(k % 7) for k in range(50)]
    whole = copies(x + 0.1, x, captions, captions)
    monkeypatch.setattr(diversity, "BLOCK", 8)
    parts = copies(x + 0.1, x, captions, captions)
    assert torch.equal(whole.nearest, parts.nearest) and torch.equal(whole.of_other, parts.of_other) and 0 < whole.share < 1
    assert torch.equal(whole.nearest, torch.cdist(x + 0.1, x).argmin(1))


def test_lpips_asks_for_consent_and_says_what_is_missing(monkeypatch):
    a, b = [picture(255), picture(0)], [picture(0), picture(0)]
    with pytest.raises(RuntimeError, match="exist as pickles only.*allow_pickle=True"):
        lpips_distance(a, b)
    with pytest.raises(ValueError, match='net must be "alex", "vgg" or "squeeze"'):
        lpips_distance(a, b, "resnet")
    with pytest.raises(ValueError, match=r"must be pairs of one size, got 1 and 1 pictures of sizes \[\(4, 4\), \(5, 4\)\]"):
        lpips_distance([picture(1)], [picture(1, (4, 5))], allow_pickle=True)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    with pytest.raises(RuntimeError, match="needs torchvision, which cannot be imported"):
        lpips_distance(a, b, allow_pickle=True)
    monkeypatch.setattr(diversity, "_lpips", lambda net: lambda x, y: (x - y).abs().mean())
    assert lpips_distance(a, b, allow_pickle=True).tolist() == [2, 0]  # pictures between −1 and 1, one by one


# Intervals


def clustered(groups, size, between, seed, mean=0.0):
    """Values with a part that is common to a group; variance of their mean: between² / groups + 1 / (groups · size)."""
    random = np.random.default_rng(seed)
    values = mean + between * np.repeat(random.standard_normal(groups), size) + random.standard_normal(groups * size)
    return values, np.arange(groups * size).reshape(groups, size).tolist()


def coverage(estimates, truth):
    return np.mean([e.low <= truth <= e.high for e in estimates])


def test_interval_covers_and_ignoring_the_groups_would_be_too_narrow():
    """500 sets of 40 groups of 5. The share that a 95 % interval covers has a standard deviation of 1 %; that of quantiles from 40
    groups is one or two points below 95 (here 92.4 %, and 70.6 % where the groups are ignored)."""
    kept, ignored = [], []
    for seed in range(500):
        values, groups = clustered(40, 5, 1.0, seed)
        kept.append(interval(values, groups, resamples=400, seed=seed))
        ignored.append(interval(values, [[k] for k in range(200)], resamples=400, seed=seed))
    assert 0.91 <= coverage(kept, 0) <= 0.975
    assert coverage(ignored, 0) < 0.75
    width = np.mean([e.high - e.low for e in kept])
    assert width == pytest.approx(2 * 1.96 * math.sqrt(1 / 40 + 1 / 200), rel=0.06)


def test_level_and_groups_of_several_sizes():
    """The 80 % interval of a mean over rows whose groups have 1 to 6 rows (400 sets: standard deviation 2 %)."""
    estimates = []
    for seed in range(400):
        random = np.random.default_rng(seed)
        sizes = random.integers(1, 7, 60)
        values = np.repeat(random.standard_normal(60), sizes) + random.standard_normal(sizes.sum()) + 3
        groups = np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
        estimates.append(interval(values, groups, level=0.8, resamples=300, seed=seed))
    assert 0.73 <= coverage(estimates, 3) <= 0.86


def test_a_paired_interval_is_as_narrow_as_the_difference():
    hits, widths, unpaired = 0, [], []
    for seed in range(300):
        base, groups = clustered(40, 4, 2.0, seed)
        random = np.random.default_rng(10_000 + seed)
        a, b = base + 0.2 + 0.3 * random.standard_normal(160), base + 0.3 * random.standard_normal(160)
        estimate = paired_interval(a, b, groups, resamples=400, seed=seed)
        assert estimate.value == pytest.approx(a.mean() - b.mean())
        hits += estimate.low <= 0.2 <= estimate.high
        widths.append(estimate.high - estimate.low)
        alone = interval(a, groups, resamples=50, seed=seed)
        unpaired.append(alone.high - alone.low)
    assert 0.9 <= hits / 300 <= 0.98
    assert np.mean(widths) < 0.15 * np.mean(unpaired)


def test_interval_of_a_distance_covers_its_expectation():
    """Fréchet at 60 rows of 3 columns: centred intervals hold its mean at that size; those not centred lie above, as rows double."""
    reference = torch.randn(2000, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    draw = lambda seed: torch.randn(60, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    truth = np.mean([frechet_distance(draw(20_000 + s), reference) for s in range(400)])
    mean, root = reference.mean(0), torch.linalg.cholesky(reference.T.cov()).T
    assert truth > float(mean.sub(0.5).square().sum())
    distance = lambda x: distances._frechet(x.mean(0), distances._root_of_rows(x), mean, root)  # the reference's root once
    assert distance(draw(0)) == pytest.approx(frechet_distance(draw(0), reference), rel=1e-9)
    groups = torch.arange(60).reshape(30, 2).tolist()
    centred, plain = [], []
    for seed in range(120):
        x = draw(seed)
        options = {"resamples": 100, "seed": seed}
        centred.append(interval(lambda rows, x=x: distance(x[rows]), groups, **options))
        plain.append(interval(lambda rows, x=x: distance(x[rows]), groups, centred=False, **options))
    assert 0.87 <= coverage(centred, truth) <= 0.99
    assert all(e.low <= e.value <= e.high for e in centred)
    assert np.mean([e.low for e in plain]) > np.mean([e.low for e in centred])


def test_a_function_of_rows_gives_what_values_give():
    values, groups = clustered(12, 3, 1.0, 5)
    groups[0], groups[3] = groups[0][:1], groups[3] + groups[0][1:]
    by_function = interval(lambda rows: values[rows.numpy()].mean(), groups, resamples=200, seed=3, centred=False)
    by_value = interval(torch.from_numpy(values), groups, resamples=200, seed=3)
    assert by_function.as_json() == pytest.approx(by_value.as_json())
    a, b = lambda rows: values[rows.numpy()].mean(), lambda rows: (2 * values[rows.numpy()]).mean()
    paired = paired_interval(a, b, groups, resamples=200, seed=3, centred=False)
    assert (paired.value, paired.low, paired.high) == pytest.approx((-by_value.value, -by_value.high, -by_value.low))


def test_what_was_resampled_once_gives_intervals_and_differences():
    (a, groups), (b, _) = clustered(12, 3, 1.0, 5), clustered(12, 3, 1.0, 6)
    one, two = (resample(values, groups, resamples=300, seed=3) for values in (a, b))
    assert one.estimate() == interval(a, groups, resamples=300, seed=3)
    assert one.minus(two).estimate().as_json() == pytest.approx(paired_interval(a, b, groups, resamples=300, seed=3).as_json())
    assert one.minus(one).estimate().high == 0
    square = lambda rows: float(a[rows.numpy()].mean() ** 2)
    assert resample(square, groups, resamples=30).estimate() == interval(square, groups, resamples=30)
    alone = resample(square, groups, resamples=0)
    assert alone.minus(alone).estimate() == Estimate(0.0, None, None, 36, 12, 0)
    with pytest.raises(ValueError, match="same rows, groups and resamples, 36, 12 and 300, got 36, 12 and 30"):
        one.minus(resample(a, groups, resamples=30))


def test_an_estimate_is_reproducible_and_goes_into_json():
    values, groups = clustered(20, 3, 1.0, 1)
    one = interval(values, groups[:15], seed=4)
    assert one == interval(values, groups[:15], seed=4) != interval(values, groups[:15], seed=5)
    wanted = {"value": one.value, "low": one.low, "high": one.high, "n": 45, "groups": 15, "resamples": 2000, "level": 0.95}
    assert json.loads(json.dumps(one.as_json())) == wanted and one.value == pytest.approx(values[:45].mean())
    assert one.low < one.value < one.high
    with pytest.raises(AttributeError):
        one.value = 0
    assert interval(torch.ones(6, dtype=torch.bool), [[0, 1], [2, 3, 4, 5]]).as_json()["low"] == 1


def test_means_of_5000_rows_take_well_under_a_second():
    values = np.random.default_rng(0).standard_normal(5000)
    for size in (1, 5):
        groups = np.arange(5000).reshape(-1, size).tolist()
        seconds = []
        for _ in range(3):
            start = time.process_time()
            interval(values, groups)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v, g: interval(v, g[:1]), ValueError, "groups must be at least two, got 1"),
        (lambda v, g: interval(v, g, level=95), ValueError, "level must be between 0 and 1, got 95"),
        (lambda v, g: interval(v, g, resamples=0), ValueError, "resamples must be at least 1, got 0"),
        (lambda v, g: interval(v[None], g), ValueError, r"values must be \[N\], one number per picture, got \[1, 6\]"),
        (lambda v, g: interval(v / 0, g), ValueError, "values must be finite, got 6 of 6 that are not"),
        (lambda v, g: interval(["a"] * 6, g), TypeError, "values must be numbers or a function of rows"),
        (lambda v, g: interval(lambda rows: math.nan, g), ValueError, "the function gave nan on all rows"),
        (lambda v, g: paired_interval(v, lambda rows: 0.0, g), TypeError, "both be values or both be functions"),
        (lambda v, g: paired_interval(v, v[:5], g), ValueError, "the same pictures, got 6 and 5 values"),
    ],
)
def test_bad_arguments_of_intervals_are_refused(call, error, message):
    with np.errstate(divide="ignore"), pytest.raises(error, match=message):
        call(np.arange(1.0, 7), [[0, 1], [2, 3], [4, 5]])
