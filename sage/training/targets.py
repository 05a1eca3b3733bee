"""What a model is trained on: noisy latents of a group's nodes and members, and the denoised estimates that it should make of them.

Everything here is a pure function of tensors. A noise level is (alpha, sigma), one of each per row: z = alpha·x + sigma·noise, with
alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod) for variance-preserving schedules and alpha = 1 - sigma for rectified
flow. `z` is the noisy row, `x` a clean latent, `denoised` an estimate of x. Half-precision latents are taken to float32: dividing by a
small sigma what was rounded to eight bits would leave no target. Cast z for the model afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from sage.resolved import ResolvedPlan
from sage.rows import Rows
from sage_kernels.coefficients.convert import PREDICTION_TYPES

TRUNK_KINDS = ("mean", "own", "posterior")


@dataclass(frozen=True, eq=False)
class Segments:
    """Nodes of a batch: node i consists of the rows[offsets[i]:offsets[i + 1]] of the batch.

    A flat grouping and a tree look the same here: at one timestep a tree is the partition of its leaves at that call. Rows may be in
    no node (they are left out) or in several.

    Args:
        rows: int64 [M] on the CPU, rows of the batch, node after node.
        offsets: int64 [nodes + 1] on the CPU, ascending from 0 to M; at least one node, none of them empty.
    """

    rows: torch.Tensor
    offsets: torch.Tensor

    def __post_init__(self):
        for name, value in (("rows", self.rows), ("offsets", self.offsets)):
            if not torch.is_tensor(value) or value.dtype != torch.int64 or value.ndim != 1 or value.device.type != "cpu":
                raise TypeError(f"Segments: {name} must be an int64 vector on the CPU, got {describe(value)}")
        bounds = self.offsets.tolist()
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(self.rows) or any(b <= a for a, b in pairwise(bounds)):
            raise ValueError(f"Segments: offsets must ascend from 0 to {len(self.rows)}, the length of rows, with at least one node and "
                             f"none empty, got {bounds[:8]}{' …' if len(bounds) > 8 else ''}")
        if int(self.rows.min()) < 0:
            raise ValueError(f"Segments: rows must be at least 0, got {int(self.rows.min())}")

    @classmethod
    def of(cls, group_ids: Sequence[int] | np.ndarray | torch.Tensor) -> Segments:
        """Rows with the same id are a node; nodes in the order of their first row, as in a plan.

        Args:
            group_ids: integers [B], one per row of the batch; any values.
        """
        ids = np.asarray(group_ids.cpu() if torch.is_tensor(group_ids) else group_ids)
        if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"Segments.of: group_ids must be integers [B], at least one, got {ids.dtype} {list(ids.shape)}")
        _, first, label = np.unique(ids, return_index=True, return_inverse=True)
        first_row = first[label]  # [B] of each row's group
        rows = np.argsort(first_row, kind="stable")
        counts = np.unique(first_row, return_counts=True)[1]
        return cls(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(np.cumsum([0, *counts]).astype(np.int64)))

    @classmethod
    def at(cls, plan: ResolvedPlan, call: int, first_row: int = 0) -> Segments:
        """The nodes of a plan at a call. Leaf i of the plan is row first_row + i of the batch."""
        labels = plan.labels(call)
        nodes = plan.members[int(call)]
        rows = np.concatenate([np.flatnonzero(labels == node) for node in range(len(nodes))]) + first_row
        return cls(torch.from_numpy(rows), torch.from_numpy(np.cumsum([0, *map(len, nodes)]).astype(np.int64)))

    @classmethod
    def join(cls, parts: Sequence[Segments]) -> Segments:
        """The nodes of all parts, in their order: a batch of groups, each at a call of its own plan."""
        starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        ends = [part.offsets[1:] + int(start) for part, start in zip(parts, starts)]
        return cls(torch.cat([part.rows for part in parts]), torch.cat([torch.zeros(1, dtype=torch.int64), *ends]))

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self.offsets) - 1

    @cached_property
    def counts(self) -> torch.Tensor:
        """int64 [nodes]: members of each node."""
        return self.offsets.diff()

    @cached_property
    def node_of(self) -> torch.Tensor:
        """int64 [M]: the node that each entry of `rows` is in."""
        return torch.repeat_interleave(torch.arange(len(self)), self.counts)

    @cached_property
    def partition(self) -> Rows:
        """The nodes as `sage.rows` has them in sampling, over the M rows that `gather` gives."""
        members = tuple(tuple(range(begin, end)) for begin, end in pairwise(self.offsets.tolist()))
        return Rows(members, self.offsets[:-1].numpy(), len(self.rows))

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[B, ...] of the batch → [M, ...]: each member's, node after node."""
        return values.index_select(0, self.rows.to(values.device))

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """[nodes, ...] → [M, ...]: each member gets its node's; for one noise per node, say."""
        if len(values) != len(self):
            raise ValueError(f"Segments.expand: values must have a row for each of {len(self)} nodes, got {describe(values)}")
        return values.index_select(0, self.node_of.to(values.device))

    def reduce(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """[M, ...] → [nodes, ...]: the members' "sum" or "min", in their order (the same bits every time)."""
        return torch.segment_reduce(values, how, offsets=self.offsets.to(values.device), axis=0)


class Batch(NamedTuple):
    """What the model is given and what it should make of it."""

    z: torch.Tensor  # [R, ...]
    denoised: torch.Tensor  # [R, ...]


def noised(denoised: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """z = alpha·x + sigma·noise.

    Args:
        denoised, noise: [R, ...], floating point.
        alpha, sigma: [R].

    Returns:
        [R, ...], float32 (float64 if an input is).
    """
    _check_alike("noised", "noise", noise, denoised)
    x, noise = _real(denoised, noise)
    return _per_row("noised", "alpha", alpha, x) * x + _per_row("noised", "sigma", sigma, x) * noise


def model_target(
    denoised: torch.Tensor, z: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The model output that says `denoised`, given z; the inverse of `denoised_from`.

        sigma·y = s·z − r·x      epsilon: (s, r) = (1, alpha)    v_prediction: (alpha, 1)    flow_prediction: (1, 1)
        sample: y = x

    the parametrisations of `sage_kernels.coefficients.convert`: y is the noise, alpha·noise − sigma·x (arXiv:2202.00512, App. D; needs
    alpha² + sigma² = 1), noise − x (needs alpha = 1 − sigma), or x.

    Args:
        denoised, z: [R, ...].
        alpha, sigma: [R]; sigma above 0, but for "sample". Values on a device other than the CPU are not looked at (that would wait
            for it): a sigma of 0 gives infinities there.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".

    Returns:
        [R, ...], float32 (float64 if an input is).
    """
    _check_alike("model_target", "z", z, denoised)
    x, z = _real(denoised, z)
    alpha, sigma = _per_row("model_target", "alpha", alpha, x), _per_row("model_target", "sigma", sigma, x)
    if check_prediction_type("model_target", prediction_type) == "sample":
        return x
    if sigma.device.type == "cpu" and bool((sigma <= 0).any()):
        raise ValueError(f"model_target: sigma must be above 0 for {prediction_type}, as without noise z does not say what it is, got "
                         f"{float(sigma.min()):g}; train on timesteps that have some")
    s, r = _weights(prediction_type, alpha)
    return (s * z - r * x) / sigma


def denoised_from(
    model_output: torch.Tensor, z: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The denoised estimate that a model output says, given z; see `model_target` for arguments and formulas.

    For epsilon, alpha must be above 0: at zero terminal SNR the noise says nothing about x, and the result is not finite.
    """
    _check_alike("denoised_from", "z", z, model_output)
    y, z = _real(model_output, z)
    alpha, sigma = _per_row("denoised_from", "alpha", alpha, y), _per_row("denoised_from", "sigma", sigma, y)
    if check_prediction_type("denoised_from", prediction_type) == "sample":
        return y
    s, r = _weights(prediction_type, alpha)
    return (s * z - sigma * y) / r


@torch.no_grad()
def posterior_weights(
    z: torch.Tensor, latents: torch.Tensor, segments: Segments, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """How likely each member is to be what z was made of: w_n = softmax_n(−‖z − alpha·x_n‖² / (2·sigma²)) inside each node.

    The members are equally likely beforehand and p(z | x_n) = N(alpha·x_n, sigma²), so w is Bayes' posterior. The exponents are taken
    relative to the nearest member's. As sigma → 0 the nearest member has all the weight (nearest ones, if several are equally near,
    share it); with alpha = 0, and among equal members, every one has exactly 1/n.

    Args:
        z: [nodes, ...].
        latents: [B, ...], of the batch that `segments` refers to.
        alpha, sigma: [nodes].

    Returns:
        float64 [M], in the order of `segments.rows`; no gradient.
    """
    _check_nodes("posterior_weights", "z", z, segments, latents)
    mean = segments.expand(_per_row("posterior_weights", "alpha", alpha, z).double()) * segments.gather(latents).double()
    variance = segments.expand(_per_row("posterior_weights", "sigma", sigma, z).double().flatten()).square()
    distance = (segments.expand(z).double() - mean).flatten(1).square().sum(1)  # [M]
    excess = distance - segments.expand(segments.reduce(distance, "min"))
    likelihood = torch.where(excess > 0, -excess / (2 * variance), 0.0).exp()  # 0 at the nearest, also where sigma is 0
    return likelihood / segments.expand(segments.reduce(likelihood, "sum"))


@torch.no_grad()
def trunk_batch(
    kind: str,
    latents: torch.Tensor,
    noise: torch.Tensor,
    segments: Segments,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    generator: torch.Generator | None = None,
) -> Batch:
    """One row per node for the trunk: z, and the soft target that the model should predict of it under the mean condition.

    What the trunk should predict is the denoiser of the group's mixture, E[x | z] with n uniform among the members and
    z = alpha·x_n + sigma·noise: sampling does not know yet which of the members the row will become.

    own        z and target from one random member n. The minimiser of E‖f(z) − x_n‖² over f is E[x_n | z], which is the mixture's
               denoiser: unbiased, but single targets scatter around it.
    posterior  z as before, the target Σ_n w_n·x_n with `posterior_weights` w: that is E[x_n | z, members], the expectation of the
               target of `own` over everything but z and the members. It is exact for the group's empirical mixture, has the same
               minimiser, and never scatters more (Stable Target Field, arXiv:2302.00670). In many dimensions w is one-hot but at the
               highest noise levels, where the two then differ.
    mean       z and target from the mean x̄ of the members' latents. As alpha/sigma → 0, w → 1/n, so the target of `posterior` goes
               to x̄, and z, whose centre is off by alpha·(x_n − x̄) ≪ sigma, to the same distribution: there it is right, without the
               scatter. Elsewhere z lies between the members, where sampling never comes, and the target is their blur.

    In a node of one member all three are the ordinary z and x, exactly.

    Args:
        kind: "mean", "own" or "posterior".
        latents: [B, ...], clean latents of the batch.
        noise: [nodes, ...], one for each node: the members share it, as they do in sampling.
        alpha, sigma: [nodes].
        generator: on the CPU; draws the random members, one number per node ("mean" draws none).

    Returns:
        Batch of [nodes, ...], float32 (float64 if an input is); no gradient.
    """
    if kind not in TRUNK_KINDS:
        raise ValueError(f"trunk_batch: kind must be one of {', '.join(map(repr, TRUNK_KINDS))}, got {kind!r}")
    _check_nodes("trunk_batch", "noise", noise, segments, latents)
    latents, noise = _real(latents, noise)
    if kind == "mean":
        mean = segments.partition.mean(segments.gather(latents), 1)
        return Batch(noised(mean, noise, alpha, sigma), mean)
    own = latents.index_select(0, _random_members(segments, generator).to(latents.device))
    z = noised(own, noise, alpha, sigma)
    if kind == "own":
        return Batch(z, own)
    weights = posterior_weights(z, latents, segments, alpha, sigma)
    return Batch(z, weighted_sum(segments.gather(latents), weights, segments))


@torch.no_grad()
def branch_batch(latents: torch.Tensor, noise: torch.Tensor, segments: Segments, alpha: torch.Tensor, sigma: torch.Tensor) -> Batch:
    """One row per member for the branches: the ordinary z and target, with the noise of its node.

    Args:
        latents: [B, ...], clean latents of the batch.
        noise: [nodes, ...], one for each node.
        alpha, sigma: [M], in the order of `segments.rows`: the members may be at timesteps of their own.

    Returns:
        Batch of [M, ...] in the order of `segments.rows`, float32 (float64 if an input is); no gradient.
    """
    _check_nodes("branch_batch", "noise", noise, segments, latents)
    latents, noise = _real(latents, noise)
    own = segments.gather(latents)
    return Batch(noised(own, segments.expand(noise), alpha, sigma), own)


def weighted_sum(values: torch.Tensor, weights: torch.Tensor, segments: Segments) -> torch.Tensor:
    """[M, ...] and weights [M] → [nodes, ...]: Σ_n w_n·values_n of each node's members, summed in float64; float32 (or float64)."""
    (values,) = _real(values)
    weighted = _per_row("weighted_sum", "weights", weights.double(), values.double()) * values.double()
    return segments.reduce(weighted, "sum").to(values.dtype)


def check_prediction_type(op: str, prediction_type: str) -> str:
    """`prediction_type`, refused where it is none of those that there are."""
    if prediction_type not in PREDICTION_TYPES:
        raise NotImplementedError(f"{op}: prediction_type {prediction_type!r}; there are {', '.join(PREDICTION_TYPES)}")
    return prediction_type


def _weights(prediction_type: str, alpha: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """(s, r) of sigma·y = s·z − r·x; see `model_target`."""
    return {"epsilon": (1.0, alpha), "v_prediction": (alpha, 1.0), "flow_prediction": (1.0, 1.0)}[prediction_type]


def _random_members(segments: Segments, generator: torch.Generator | None) -> torch.Tensor:
    """int64 [nodes]: a row of the batch for each node, uniformly from its members."""
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"trunk_batch: generator must be on the CPU, where the members are chosen, got {generator.device}")
    drawn = torch.rand(len(segments), generator=generator, dtype=torch.float64)
    place = torch.minimum((drawn * segments.counts).long(), segments.counts - 1)
    return segments.rows[segments.offsets[:-1] + place]


def _real(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All in float64 if one is, else in float32."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def _per_row(op: str, name: str, level: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[R] → [R, 1, ...], in the dtype and on the device of `like` [R, ...]."""
    if not torch.is_tensor(level) or level.shape != like.shape[:1]:
        raise ValueError(f"{op}: {name} must be a tensor [{len(like)}], one number per row, got {describe(level)}")
    return level.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def _check_alike(op: str, name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.shape != like.shape or value.ndim < 2:
        raise ValueError(f"{op}: {name} must have the shape of the other rows, [R, ...] = {list(like.shape)}, got {describe(value)}")


def _check_nodes(op: str, name: str, value: torch.Tensor, segments: Segments, latents: torch.Tensor) -> None:
    """Refuse what has not a row like the latents' for each node."""
    if latents.ndim < 2 or value.shape != (len(segments), *latents.shape[1:]):
        raise ValueError(f"{op}: {name} must be {[len(segments), *latents.shape[1:]]}, a row like a latent's for each node, got "
                         f"{describe(value)} with latents {list(latents.shape)}")


def describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)} on {value.device}" if torch.is_tensor(value) else repr(value)
