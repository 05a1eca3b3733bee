"""Targets and losses of training: by hand, by their gradients, and on mixtures whose denoiser is known."""

import math

import pytest
import torch
from torch.nn.functional import mse_loss

from sage.plan import Leaf, Node, SharingPlan
from sage.training.losses import consistency_loss, denoising_loss, min_snr_weight, weighted_mse
from sage.training.targets import (
    Segments,
    branch_batch,
    denoised_from,
    model_target,
    noised,
    posterior_weights,
    trunk_batch,
    weighted_sum,
)
from sage_kernels.coefficients.convert import PREDICTION_TYPES, denoised_weights

PAIR_AND_ONE = Segments.of([7, 3, 7])  # rows 0 and 2, row 1
VP = (0.8, 0.6)
LEVELS = {kind: (0.25, 0.75) if kind == "flow_prediction" else VP for kind in PREDICTION_TYPES}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def levels(count, kind="epsilon", dtype=torch.float32):
    alpha, sigma = LEVELS[kind]
    return torch.full((count,), alpha, dtype=dtype), torch.full((count,), sigma, dtype=dtype)


# ---- segments


def test_group_ids_become_nodes_in_the_order_of_their_first_row():
    segments = Segments.of([5, 2, 5, 9, 2])
    assert segments.rows.tolist() == [0, 2, 1, 4, 3] and segments.offsets.tolist() == [0, 2, 4, 5]
    assert segments.counts.tolist() == [2, 2, 1] and segments.node_of.tolist() == [0, 0, 1, 1, 2] and len(segments) == 3
    assert Segments.of(torch.tensor([4])).rows.tolist() == [0]


def test_a_tree_is_its_partition_at_each_call():
    tree = Node((0, 1, 2), 1, 0.25, (Node((0, 2), 0, 0.5, (Node.single(0), Node.single(2))), Node.single(1)))
    plan = SharingPlan.tree([Leaf("a"), Leaf("b"), Leaf("c"), Leaf("d")], [tree]).resolve(4)
    seen = [(segments.rows.tolist(), segments.offsets.tolist()) for segments in (Segments.at(plan, call) for call in range(4))]
    assert seen == [([0, 1, 2, 3], [0, 3, 4]), ([0, 2, 1, 3], [0, 2, 3, 4]), *[([0, 1, 2, 3], [0, 1, 2, 3, 4])] * 2]
    later = Segments.join([Segments.at(plan, 1), Segments.at(plan, 0, first_row=4)])
    assert later.rows.tolist() == [0, 2, 1, 3, 4, 5, 6, 7] and later.offsets.tolist() == [0, 2, 3, 4, 7, 8]


def test_gathered_expanded_and_reduced():
    x = torch.tensor([[1.0], [2.0], [5.0]])
    assert PAIR_AND_ONE.gather(x).tolist() == [[1.0], [5.0], [2.0]]
    assert PAIR_AND_ONE.expand(x[:2]).tolist() == [[1.0], [1.0], [2.0]]
    assert PAIR_AND_ONE.reduce(PAIR_AND_ONE.gather(x), "sum").tolist() == [[6.0], [2.0]]
    with pytest.raises(ValueError, match="row for each of 2 nodes"):
        PAIR_AND_ONE.expand(x)


@pytest.mark.parametrize("rows, offsets, error, message", [
    ([0.0], [0, 1], TypeError, "rows must be an int64 vector on the CPU, got torch.float32"),
    ([0, 1], [0, 1], ValueError, "ascend from 0 to 2"),
    ([0, 1], [0, 0, 2], ValueError, "none empty"),
    ([], [0], ValueError, "at least one node"),
    ([-1], [0, 1], ValueError, "at least 0, got -1"),
])  # fmt: skip
def test_segments_that_are_none_are_refused(rows, offsets, error, message):
    with pytest.raises(error, match=message):
        Segments(torch.tensor(rows, dtype=None if rows else torch.int64), torch.tensor(offsets))
    with pytest.raises(ValueError, match="integers"):
        Segments.of([0.5])


# ---- parametrisations


def test_targets_by_hand():
    """x = 2, noise = 3: what each prediction type calls them."""
    x, noise = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)
    for kind, want in {"epsilon": 3.0, "v_prediction": 0.8 * 3 - 0.6 * 2, "sample": 2.0, "flow_prediction": 1.0}.items():
        alpha, sigma = levels(1, kind, torch.float64)
        z = noised(x, noise, alpha, sigma)
        assert z.item() == pytest.approx(alpha.item() * 2 + sigma.item() * 3)
        assert model_target(x, z, alpha, sigma, kind).item() == pytest.approx(want)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_target_and_its_inverse_agree_with_the_kernels(kind):
    alpha = torch.tensor([0.99, 0.6, 0.05], dtype=torch.float64)
    sigma = 1 - alpha if kind == "flow_prediction" else (1 - alpha**2).sqrt()
    z, output = draw(3, 2, 4, dtype=torch.float64), draw(3, 2, 4, seed=1, dtype=torch.float64)
    denoised = denoised_from(output, z, alpha, sigma, kind)
    for row in range(3):
        p, q = denoised_weights(kind, alpha[row].item(), sigma[row].item())
        assert torch.allclose(denoised[row], p * z[row] + q * output[row], rtol=1e-12)
    assert torch.allclose(model_target(denoised, z, alpha, sigma, kind), output, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda y, z: denoised_from(y, z, alpha, sigma, kind), (output.requires_grad_(), z.requires_grad_()))
    assert torch.autograd.gradcheck(lambda x, z: model_target(x, z, alpha, sigma, kind), (denoised.detach().requires_grad_(), z))


def test_half_precision_latents_give_float32_targets():
    x, noise = draw(1, 64).bfloat16(), draw(1, 64, seed=1).bfloat16()
    alpha, sigma = torch.tensor([0.9996]), torch.tensor([0.0283])
    z = noised(x, noise, alpha, sigma)
    assert z.dtype == torch.float32
    assert torch.allclose(model_target(x, z, alpha, sigma, "epsilon"), noise.float(), atol=1e-4)


def test_levels_and_types_that_say_nothing_are_refused():
    x = draw(2, 3)
    with pytest.raises(ValueError, match="sigma must be above 0 for epsilon"):
        model_target(x, x, torch.ones(2), torch.tensor([0.1, 0.0]), "epsilon")
    assert torch.equal(model_target(x, 2 * x, torch.ones(2), torch.zeros(2), "sample"), x)
    with pytest.raises(NotImplementedError, match="'trigflow'; there are epsilon, v_prediction, sample, flow_prediction"):
        model_target(x, x, *levels(2), "trigflow")
    with pytest.raises(ValueError, match=r"alpha must be a tensor \[2\]"):
        noised(x, x, torch.ones(1), torch.ones(2))
    with pytest.raises(ValueError, match="noise must have the shape"):
        noised(x, x[:1], *levels(2))


# ---- posterior weights


def test_weights_by_hand():
    """x = 0 and 1 seen at z = 0.5 + d: the odds are exp(alpha·(z − alpha/2) / sigma²)."""
    latents, alpha, sigma = torch.tensor([[0.0], [9.0], [1.0]]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 1.0])
    weights = posterior_weights(torch.tensor([[0.7], [4.0]]), latents, PAIR_AND_ONE, alpha, sigma)
    odds = math.exp((0.7 - 0.5) / 0.25)
    assert weights.tolist() == pytest.approx([1 / (1 + odds), odds / (1 + odds), 1.0], rel=1e-6)


def test_at_either_end_of_the_noise_and_far_away():
    latents = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    one_node = Segments.of([0, 0, 0])
    cases = {
        (1.0, 0.0): [0.0, 1.0, 0.0],  # no noise: the nearest
        (1.0, 1e-30): [0.0, 1.0, 0.0],  # its square is 0 in float32
        (0.0, 1.0): [1 / 3] * 3,  # no signal
        (0.0, 0.0): [1 / 3] * 3,
    }
    for (alpha, sigma), want in cases.items():
        level = torch.tensor([alpha]), torch.tensor([sigma])
        assert posterior_weights(torch.tensor([[0.9, 0.8]]), latents, one_node, *level).tolist() == want
    far = posterior_weights(torch.full((1, 2), -1e4), latents, one_node, torch.ones(1), torch.full((1,), 1e-3))
    assert far.tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_members_have_exactly_equal_weights(count):
    latents = draw(1, 3, 33).expand(count, 3, 33)
    weights = posterior_weights(draw(1, 3, 33, seed=1), latents, Segments.of([0] * count), *levels(1))
    assert (weights == 1 / count).all()


def test_permuting_members_permutes_weights_and_leaves_the_target():
    latents, z = draw(4, 6), draw(1, 6, seed=1)
    order = torch.tensor([2, 0, 3, 1])
    offsets = torch.tensor([0, 4])
    one, other = Segments(torch.arange(4), offsets), Segments(order, offsets)
    level = torch.tensor([0.5]), torch.tensor([0.9])
    weights = posterior_weights(z, latents, one, *level)
    permuted = posterior_weights(z, latents, other, *level)
    assert torch.allclose(permuted, weights[order], rtol=1e-12) and weights.unique().numel() == 4
    assert torch.allclose(weighted_sum(latents, weights, one), weighted_sum(latents[order], permuted, other), rtol=1e-6)
    noise = draw(1, 6, seed=2)
    means = [trunk_batch("mean", latents, noise, segments, *level).z for segments in (one, other)]
    assert torch.allclose(*means, atol=1e-6)


# ---- batches


def test_mean_and_own_by_hand():
    latents, noise = torch.tensor([[1.0], [7.0], [4.0]]), torch.tensor([[10.0], [20.0]])
    alpha, sigma = torch.tensor([0.5, 1.0]), torch.tensor([0.1, 0.2])
    z, denoised = trunk_batch("mean", latents, noise, PAIR_AND_ONE, alpha, sigma)
    assert denoised.flatten().tolist() == [2.5, 7.0] and z.flatten().tolist() == pytest.approx([2.25, 11.0])
    picked = set()
    for seed in range(20):
        z, denoised = trunk_batch("own", latents, noise, PAIR_AND_ONE, alpha, sigma, torch.Generator().manual_seed(seed))
        first, second = denoised.flatten().tolist()
        assert second == 7.0 and z.flatten().tolist() == pytest.approx([0.5 * first + 1, 11.0])
        picked.add(first)
    assert picked == {1.0, 4.0}


def test_members_are_drawn_equally_often():
    counts = torch.tensor([3] * 1500 + [5] * 1500)
    segments = Segments(torch.arange(12000), torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))
    place = torch.arange(12000) - segments.expand(segments.offsets[:-1])  # of each row in its node
    level = torch.ones(3000)
    z, _ = trunk_batch("own", place[:, None].float(), torch.zeros(3000, 1), segments, level, level, torch.Generator().manual_seed(0))
    of_three, of_five = (torch.bincount(part.flatten().long()) for part in z.split(1500))
    assert len(of_three) == 3 and len(of_five) == 5
    assert (of_three - 500).abs().max() < 80 and (of_five - 300).abs().max() < 70  # over four standard deviations


def test_posterior_has_the_latents_of_own_and_the_weighted_target():
    latents, noise, level = draw(3, 5), draw(2, 5, seed=1), levels(2)
    own = trunk_batch("own", latents, noise, PAIR_AND_ONE, *level, torch.Generator().manual_seed(3))
    z, denoised = trunk_batch("posterior", latents, noise, PAIR_AND_ONE, *level, torch.Generator().manual_seed(3))
    assert torch.equal(z, own.z) and not torch.allclose(denoised[0], own.denoised[0], atol=1e-3)
    weights = posterior_weights(z, latents, PAIR_AND_ONE, *level)
    assert torch.allclose(denoised[0], (weights[0] * latents[0] + weights[1] * latents[2]).float())
    assert torch.equal(denoised[1], latents[1])


def test_with_little_signal_posterior_goes_to_mean():
    latents, noise = draw(3, 5), draw(2, 5, seed=1)
    for alpha, off in ((1e-2, 0.1), (1e-4, 1e-3)):
        level = torch.full((2,), alpha), torch.ones(2)
        mean = trunk_batch("mean", latents, noise, PAIR_AND_ONE, *level)
        posterior = trunk_batch("posterior", latents, noise, PAIR_AND_ONE, *level, torch.Generator().manual_seed(0))
        assert 0 < (posterior.denoised - mean.denoised).abs().max() < off and (posterior.z - mean.z).abs().max() < 4 * alpha


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("soft", ["mean", "own", "posterior"])
def test_groups_of_one_have_the_ordinary_loss_exactly(soft, kind):
    latents, noise, output, level = draw(4, 2, 8), draw(4, 2, 8, seed=1), draw(4, 2, 8, seed=2), levels(4, kind)
    alone = Segments.of(range(4))
    trunk, branch = trunk_batch(soft, latents, noise, alone, *level), branch_batch(latents, noise, alone, *level)
    assert torch.equal(trunk.z, branch.z) and torch.equal(trunk.denoised, branch.denoised)
    loss = denoising_loss(output, *trunk, *level, kind)
    assert torch.equal(loss, denoising_loss(output, *branch, *level, kind))
    alpha, sigma = LEVELS[kind]
    velocity = alpha * noise - sigma * latents
    ordinary = {"epsilon": noise, "v_prediction": velocity, "sample": latents, "flow_prediction": noise - latents}[kind]
    assert loss.item() == pytest.approx(mse_loss(output, ordinary).item(), rel=1e-5)


def test_members_of_a_branch_share_the_noise_and_have_their_own_level():
    latents, noise = torch.zeros(3, 1), torch.tensor([[10.0], [20.0]])
    z, denoised = branch_batch(latents + 1, noise, PAIR_AND_ONE, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.1, 0.2, 0.3]))
    assert z.flatten().tolist() == pytest.approx([2.0, 2.0, 7.0]) and (denoised == 1).all()


def test_what_does_not_fit_is_refused():
    latents, noise, level = draw(3, 5), draw(2, 5), levels(2)
    with pytest.raises(ValueError, match="'mean', 'own', 'posterior', got 'median'"):
        trunk_batch("median", latents, noise, PAIR_AND_ONE, *level)
    with pytest.raises(ValueError, match=r"noise must be \[2, 5\], a row like a latent's for each node, got .*\[3, 5\]"):
        trunk_batch("own", latents, draw(3, 5), PAIR_AND_ONE, *level)
    with pytest.raises(ValueError, match=r"alpha must be a tensor \[2\]"):
        trunk_batch("own", latents, noise, PAIR_AND_ONE, torch.ones(3), level[1])


# ---- losses


def test_min_snr_by_hand():
    """snr = 9 and 1/9 for gamma = 5; with alpha² + sigma² = 1."""
    alpha, sigma = torch.tensor([0.9, 0.1], dtype=torch.float64).sqrt(), torch.tensor([0.1, 0.9], dtype=torch.float64).sqrt()
    want = {"epsilon": [5 / 9, 1.0], "v_prediction": [5 / 10, 0.1], "sample": [5.0, 1 / 9]}
    for kind, weights in want.items():
        assert min_snr_weight(alpha, sigma, kind, 5.0).tolist() == pytest.approx(weights)
    flow = torch.tensor([0.25, 0.9], dtype=torch.float64)  # snr = 9 and 1/81
    assert min_snr_weight(1 - flow, flow, "flow_prediction", 5.0).tolist() == pytest.approx([5 * 0.0625, 0.01])
    assert min_snr_weight(alpha, sigma, "epsilon", None) is None
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="snr_gamma must be a number above 0"):
            min_snr_weight(alpha, sigma, "epsilon", gamma)


def test_min_snr_without_signal_or_noise_is_finite():
    alpha, sigma = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    found = {kind: min_snr_weight(alpha, sigma, kind, 5.0).tolist() for kind in PREDICTION_TYPES}
    assert found == {"epsilon": [1, 0], "v_prediction": [0, 0], "sample": [0, 5], "flow_prediction": [0, 0]}


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_a_weighted_error_is_the_same_whatever_is_predicted(gamma):
    """min(snr, gamma) times the error in x."""
    for same in (PREDICTION_TYPES[:3], PREDICTION_TYPES[2:]):
        alpha, sigma = levels(2, same[-1], torch.float64)
        z, x, guess = (draw(2, 5, seed=seed, dtype=torch.float64) for seed in range(3))
        losses = [denoising_loss(model_target(guess, z, alpha, sigma, kind), z, x, alpha, sigma, kind, snr_gamma=gamma) for kind in same]
        snr = min((alpha[0] / sigma[0]).square().item(), gamma)
        assert [loss.item() for loss in losses] == pytest.approx([snr * mse_loss(guess, x).item()] * len(same))


def test_the_loss_is_a_sum_divided_by_a_count():
    prediction, target = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert weighted_mse(prediction, target).item() == (2.5 + 0.5) / 2
    assert weighted_mse(prediction, target, torch.tensor([2.0, 4.0])).item() == (5 + 2) / 2
    assert weighted_mse(prediction, target, count=torch.tensor(10)).item() == pytest.approx(0.3)
    parts = [weighted_mse(prediction[rows], target[rows], count=2).item() for rows in (slice(0, 1), slice(1, 2), slice(2, 2))]
    assert parts == [1.25, 0.25, 0.0] and weighted_mse(prediction[:0], target[:0]).item() == 0
    half = weighted_mse(prediction.bfloat16(), target)
    assert half.dtype == torch.float32 and half.item() == 1.5
    with pytest.raises(ValueError, match=r"weight must be \[2\]"):
        weighted_mse(prediction, target, torch.ones(2, 1))
    with pytest.raises(ValueError, match="target must have the prediction's shape"):
        weighted_mse(prediction, target[:1])


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_gradients_of_the_denoising_loss(kind):
    alpha, sigma = levels(3, kind, torch.float64)
    output, z, x = (draw(3, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    output.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: denoising_loss(y, z, x, alpha, sigma, kind, snr_gamma=2.0), output)


def test_consistency_by_hand_and_its_gradient():
    trunk = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    members = torch.tensor([[3.0], [5.0], [2.5]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.25, 0.75, 1.0], dtype=torch.float64)
    loss = consistency_loss(trunk, members, weights, PAIR_AND_ONE)
    assert loss.item() == ((4.5 - 1) ** 2 + 0.5**2) / 2
    loss.backward()
    assert trunk.grad.tolist() == [[-3.5], [-0.5]] and members.grad is None
    assert torch.autograd.gradcheck(lambda y: consistency_loss(y, members, weights, PAIR_AND_ONE, torch.tensor([2.0, 1.0])), trunk)
    assert consistency_loss(trunk, members, weights, PAIR_AND_ONE, torch.tensor([0.0, 4.0]), count=1).item() == 1.0
    with pytest.raises(ValueError, match=r"member_outputs must be \[3, 1\]"):
        consistency_loss(trunk, members[:2], weights, PAIR_AND_ONE)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_mixture_denoiser_is_consistent_with_its_members(kind):
    """Members that are points: each one's denoiser is itself, and the trunk's the posterior mean. Then there is nothing to learn."""
    latents, noise, level = draw(3, 5, dtype=torch.float64), draw(2, 5, seed=1), levels(2, kind, torch.float64)
    z, denoised = trunk_batch("posterior", latents, noise, PAIR_AND_ONE, *level, torch.Generator().manual_seed(0))
    members = (PAIR_AND_ONE.gather(latents), PAIR_AND_ONE.expand(z), *map(PAIR_AND_ONE.expand, level))
    weights = posterior_weights(z, latents, PAIR_AND_ONE, *level)
    outputs = model_target(*members, kind)
    assert consistency_loss(model_target(denoised, z, *level, kind), outputs, weights, PAIR_AND_ONE).item() < 1e-25
    mean = PAIR_AND_ONE.reduce(members[0], "sum") / PAIR_AND_ONE.counts[:, None]
    assert consistency_loss(model_target(mean, z, *level, kind), outputs, weights, PAIR_AND_ONE).item() > 1e-4


# ---- what minimises the trunk's loss, on mixtures whose denoiser is known

ALPHA, SIGMA = 0.8, 0.6
GROUPS = 40000


def group_batch(latents, kind):
    """z and targets [GROUPS, D] of groups with latents [GROUPS, N, D]; the noise and the members drawn are those of every kind."""
    groups, members = latents.shape[:2]
    segments = Segments(torch.arange(groups * members), torch.arange(0, groups * members + 1, members))
    level = torch.full((groups,), ALPHA), torch.full((groups,), SIGMA)
    noise = draw(groups, latents.shape[2], seed=5)
    return trunk_batch(kind, latents.flatten(0, 1), noise, segments, *level, torch.Generator().manual_seed(6))


def gaussian_denoiser(z, centres, spread):
    """E[x | z] for x from N(centre, spread²) of an equally likely centre, z = ALPHA·x + SIGMA·noise; z [R, D], centres [N, D]."""
    variance = (ALPHA * spread) ** 2 + SIGMA**2
    off = z[:, None] - ALPHA * centres  # [R, N, D]
    likely = (-off.square().sum(2) / (2 * variance)).softmax(1)
    return (likely[..., None] * (centres + ALPHA * spread**2 / variance * off)).sum(1)


@pytest.mark.parametrize("soft, right", [("own", True), ("posterior", True), ("mean", False)])
def test_least_squares_finds_the_denoiser_of_a_mixture_of_gaussians(soft, right):
    """A group has one latent from each of three Gaussians in the plane. The targets, regressed on the analytic denoiser of their
    mixture, on z and on 1, must be that denoiser with nothing of z or 1."""
    centres, spread = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.5]]), 0.3
    latents = centres + spread * draw(GROUPS, 3, 2, seed=4)
    z, target = group_batch(latents, soft)
    for axis in range(2):
        features = torch.stack([gaussian_denoiser(z, centres, spread)[:, axis], z[:, 0], z[:, 1], torch.ones(len(z))], dim=1).double()
        found = torch.linalg.lstsq(features, target[:, axis, None].double()).solution.flatten()
        assert (torch.allclose(found, torch.tensor([1.0, 0, 0, 0]).double(), atol=0.03)) is right


@pytest.mark.parametrize("soft", ["own", "posterior", "mean"])
def test_the_best_prediction_at_each_noise_level_is_the_mixtures_but_for_mean(soft):
    """Two Gaussians on a line: averages of the target over narrow bins of z, which no function of z predicts better, against the
    denoiser. The mean of the members stays near the middle whatever z is."""
    centres, spread = torch.tensor([[-1.0], [1.0]]), 0.25
    z, target = group_batch(centres + spread * draw(GROUPS, 2, 1, seed=4), soft)
    bins = ((z.flatten() + 1.2) / 0.1).floor().long()
    inside = (bins >= 0) & (bins < 24)
    count = torch.bincount(bins[inside], minlength=24)
    best, analytic = (
        torch.bincount(bins[inside], weights=values.flatten()[inside].double(), minlength=24) / count
        for values in (target, gaussian_denoiser(z, centres, spread))
    )
    worst = (best - analytic).abs().max().item()
    assert count.min() > 300 and (worst > 0.7 if soft == "mean" else worst < 0.1)


def test_posterior_targets_scatter_less_than_own_around_the_same_denoiser():
    centres, spread = torch.tensor([[-1.0], [1.0]]), 0.25
    latents = centres + spread * draw(GROUPS, 2, 1, seed=4)
    left = {}
    for soft in ("own", "posterior"):
        z, target = group_batch(latents, soft)
        left[soft] = (target - gaussian_denoiser(z, centres, spread)).square().mean().item()
    assert left["posterior"] < 0.6 * left["own"]
