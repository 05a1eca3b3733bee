"""One step of training: the rows that a batch of groups gives the denoiser, and what its predictions of them cost.

    step = Step(family, Timeline.of(pipe.scheduler), Objective(t_star=599, soft_target="posterior"))
    losses = step(batch, latents, conditions)
    losses.loss.backward()

A step has one row per picture, as many as ordinary training has. Each group of the batch trains either its trunk (all its rows at or
above t*, under the mean condition) or its branches (each member below t*, under its own condition, with the group's noise), the trunk
with the probability that a timestep of [0, T) is at or above t*: over the steps all timesteps are trained equally often. A picture
alone draws its timestep from the whole of [0, T).

What is random depends on (seed, epoch, number of the group) alone, see `sage.training.sampler.GroupBatch.groups`: not on the other
groups of the batch, on what was drawn before, or on the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sage.plan_checks import fraction, integer
from sage.training.data import draw
from sage.training.families import Family
from sage.training.joint import Timeline
from sage.training.losses import consistency_loss, min_snr_weight, weighted_mse
from sage.training.options import CONSISTENCY_TARGETS, SOFT_TARGETS
from sage.training.sampler import GroupBatch
from sage.training.targets import (
    TRUNK_KINDS,
    Segments,
    branch_batch,
    model_target,
    noised,
    posterior_weights,
    trunk_batch,
)

# Steps of the additive sequence that fills a square evenly: 1/g and 1/g² with g³ = g + 1, the golden ratio's relative in two dimensions.
TO_DECISION, TO_QUANTILE = 0.7548776662466927, 0.5698402909980532

Conditions = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """What is to be learned.

    Args:
        t_star: t*, see `sage.training.joint.branch_timestep`.
        soft_target: of the trunk, see `sage.training.targets.trunk_batch`; "none": nothing is shared, each picture is trained on under
            its own caption, with noise and a timestep of its own.
        branch_weight: weight of rows below t*; those at or above it have 1.
        consistency_weight: of the consistency at the joint, see `sage.training.losses.consistency_loss`; 0: it is left out, and costs
            nothing. A group's one row there counts as often as the group has pictures.
        consistency_target: how the members' predictions are weighted, "posterior" or "equal". Equally weighted they are the score of
            the geometric mean of the members' densities, which is high where all of them agree.
        share_jitter: t* is moved in each group by up to this fraction of T to both sides.
        snr_gamma: of min-SNR weights; None: none.
        caption_dropout: probability that a group's captions are dropped, all together.
        seed: of all that is random.
    """

    t_star: float
    soft_target: str = "posterior"
    branch_weight: float = 1.0
    consistency_weight: float = 0.0
    consistency_target: str = "posterior"
    share_jitter: float = 0.0
    snr_gamma: float | None = None
    caption_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, known in (("soft_target", SOFT_TARGETS), ("consistency_target", CONSISTENCY_TARGETS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Objective: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("branch_weight", "consistency_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Objective: {name} must be a number of at least 0, got {getattr(self, name)!r}")
        for name in ("share_jitter", "caption_dropout"):
            fraction(getattr(self, name), f"Objective: {name}")
        integer(self.seed, "Objective: seed")


class JointRows(NamedTuple):
    """One row per group for consistency, at a timestep around t*."""

    z: torch.Tensor  # [G, ...]
    timesteps: torch.Tensor  # [G], on the CPU
    members: Segments  # the rows of the batch in each group, M together
    weights: torch.Tensor  # float64 [M], of the members' predictions


class StepRows(NamedTuple):
    """What a batch gives the denoiser: R rows, one per picture."""

    z: torch.Tensor  # [R, ...]
    denoised: torch.Tensor  # [R, ...], what the denoiser should make of them
    timesteps: torch.Tensor  # [R], on the CPU
    is_trunk: torch.Tensor  # bool [R], on the CPU: at or above t*
    nodes: Segments  # the rows of the batch whose mean condition a node has
    node_of: torch.Tensor  # int64 [R], on the CPU: each row's node
    dropped: tuple[int, ...]  # rows of the batch whose caption is dropped
    joint: JointRows | None


class StepLosses(NamedTuple):
    """What a step cost.

    Attributes:
        loss: 0-dim, with gradient: this process's part of the sum over all processes, divided by the pictures of all of them.
        sums: float64 [6], on the CPU or the device, to be added over processes: loss; errors and number of trunk rows; of branch rows;
            and the consistency error, in units of the loss.
    """

    loss: torch.Tensor
    sums: torch.Tensor


class _GroupRows(NamedTuple):
    """The rows of one group; as `StepRows`."""

    z: torch.Tensor
    denoised: torch.Tensor
    timesteps: torch.Tensor
    is_trunk: torch.Tensor
    nodes: list[tuple[int, ...]]
    dropped: tuple[int, ...]
    joint: JointRows | None


def step_rows(batch: GroupBatch, latents: torch.Tensor, timeline: Timeline, objective: Objective) -> StepRows:
    """Draw the rows of a step.

    Args:
        batch: n pictures in groups.
        latents: [n, ...], clean latents in the order of `batch.rows`.
        timeline: of the scheduler.
        objective: what is to be learned.

    Returns:
        StepRows with R = n, group after group in the batch's order.
    """
    members: dict[int, list[int]] = {}
    for row, number in enumerate(batch.groups):
        members.setdefault(number, []).append(row)
    groups = [_group_rows(batch.epoch, number, rows, latents, timeline, objective) for number, rows in members.items()]
    nodes = [node for group in groups for node in group.nodes]
    node_of: list[int] = []
    for group in groups:  # a trunk has one node for all its rows, the others one for each
        first, rows = node_of[-1] + 1 if node_of else 0, len(group.z)
        node_of += [first] * rows if len(group.nodes) == 1 else range(first, first + rows)
    return StepRows(
        z=torch.cat([group.z for group in groups]),
        denoised=torch.cat([group.denoised for group in groups]),
        timesteps=torch.cat([group.timesteps for group in groups]),
        is_trunk=torch.cat([group.is_trunk for group in groups]),
        nodes=_segments(nodes),
        node_of=torch.tensor(node_of),
        dropped=tuple(row for group in groups for row in group.dropped),
        joint=_joined([group.joint for group in groups if group.joint is not None]),
    )


def _group_rows(
    epoch: int, number: int, members: list[int], latents: torch.Tensor, timeline: Timeline, objective: Objective
) -> _GroupRows:
    """The rows of one group: of its trunk, of its branches, or of pictures alone."""
    count, seed = len(members), objective.seed
    generator = torch.Generator().manual_seed(draw("step", seed, epoch, number))
    decision, quantile = (
        (draw(name, seed, epoch) / 2**64 + number * to_next) % 1 for name, to_next in (("decision", TO_DECISION), ("quantile", TO_QUANTILE))
    )
    t_star = timeline.jittered(torch.tensor([objective.t_star], dtype=torch.float64), objective.share_jitter, generator)
    dropped = float(torch.rand([], generator=generator, dtype=torch.float64)) < objective.caption_dropout
    alone = count == 1 or objective.soft_target not in TRUNK_KINDS
    trunk = not alone and decision < float(timeline.trunk_fraction(t_star))
    part, end = ("trunk", t_star) if trunk else ("branch", torch.full_like(t_star, timeline.num_train_timesteps) if alone else t_star)
    # Evenly spaced in a circle: each row of the group is anywhere equally often, and together they cover the range.
    timesteps = timeline.place(part, end.expand(count), (quantile + torch.arange(count, dtype=torch.float64) / count) % 1)
    alpha, sigma = timeline.levels(timesteps)
    if trunk:
        noise = _noise(count, latents, generator)
        rows = trunk_batch(objective.soft_target, latents, noise, _segments([tuple(members)] * count), alpha, sigma, generator)
    else:
        # One node with one noise for all branches of a group; pictures alone are a node each.
        nodes = _segments([(row,) for row in members] if alone else [tuple(members)])
        rows = branch_batch(latents, _noise(len(nodes), latents, generator), nodes, alpha, sigma)
    joint = None
    if objective.consistency_weight > 0 and not alone:
        joint = _joint_row(members, latents, t_star, timeline, objective, generator)
    return _GroupRows(
        z=rows.z,
        denoised=rows.denoised,
        timesteps=timesteps,
        is_trunk=timesteps >= t_star,
        nodes=[tuple(members)] if trunk else [(row,) for row in members],
        dropped=tuple(members) if dropped else (),
        joint=joint,
    )


def _joint_row(
    members: list[int], latents: torch.Tensor, t_star: torch.Tensor, timeline: Timeline, objective: Objective, generator: torch.Generator
) -> JointRows:
    """The row of a group at a timestep around t*, made of a random member."""
    timesteps = timeline.draw("joint", t_star, generator)
    alpha, sigma = timeline.levels(timesteps)
    own = members[int(torch.randint(len(members), [], generator=generator))]
    segments = _segments([tuple(members)])
    z = noised(latents[own : own + 1], _noise(1, latents, generator), alpha, sigma)
    if objective.consistency_target == "posterior":
        weights = posterior_weights(z, latents, segments, alpha, sigma)
    else:
        weights = torch.full([len(members)], 1 / len(members), dtype=torch.float64, device=z.device)
    return JointRows(z, timesteps, segments, weights)


def _joined(rows: list[JointRows]) -> JointRows | None:
    if not rows:
        return None
    return JointRows(
        torch.cat([row.z for row in rows]),
        torch.cat([row.timesteps for row in rows]),
        _segments([tuple(row.members.rows.tolist()) for row in rows]),
        torch.cat([row.weights for row in rows]),
    )


def _noise(rows: int, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 [rows, ...] like the latents; drawn on the CPU, the same for every device."""
    return torch.randn([rows, *latents.shape[1:]], generator=generator).to(latents.device)


def _segments(nodes: list[tuple[int, ...]]) -> Segments:
    offsets = torch.tensor([0, *(len(node) for node in nodes)]).cumsum(0)
    return Segments(torch.tensor([row for node in nodes for row in node]), offsets)


class Step:
    """A batch in, a loss out.

    Args:
        family: of the pipeline.
        timeline: of its scheduler.
        objective: what is to be learned.
        empty: one row of what stands in for a dropped caption (`Family.encode_empty`); needed with `caption_dropout`.
        teacher: a context in which the denoiser predicts for the members at the joint; None: as it is.
    """

    def __init__(
        self,
        family: Family,
        timeline: Timeline,
        objective: Objective,
        empty: Conditions | None = None,
        teacher: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    ):
        if objective.caption_dropout > 0 and empty is None:
            raise ValueError("Step: empty is needed with caption_dropout; use family.encode_empty(1)")
        self.family, self.timeline, self.objective, self.empty = family, timeline, objective, empty
        self.teacher = contextlib.nullcontext if teacher is None else teacher

    def __call__(
        self, batch: GroupBatch, latents: torch.Tensor, conditions: Conditions, denoiser: torch.nn.Module | None = None
    ) -> StepLosses:
        """What a batch costs.

        Args:
            batch: n pictures in groups.
            latents: [n, ...], clean latents, on the denoiser's device.
            conditions: n rows of each, of the captions.
            denoiser: see `Family.predict`; the joint's teacher is always the family's own module.
        """
        rows = step_rows(batch, latents, self.timeline, self.objective)
        conditions = self._with_dropped(conditions, rows.dropped)
        by_node = self.family.mean_conditions(conditions, rows.nodes)
        given = {name: value.index_select(0, rows.node_of.to(value.device)) for name, value in by_node.items()}
        z, timesteps, joint, taught = rows.z, rows.timesteps, rows.joint, None
        if joint is not None:
            taught = self._members_predictions(joint, conditions)  # before the graph of the step, as the teacher may switch layers
            means = self.family.mean_conditions(conditions, joint.members)
            given = {name: torch.cat([value, means[name]]) for name, value in given.items()}
            z, timesteps = torch.cat([z, joint.z]), torch.cat([timesteps, joint.timesteps])
        output = self.family.predict(z, timesteps.to(z.device), given, denoiser)
        return self._losses(batch, rows, output[: len(rows.z)], output[len(rows.z) :], taught)

    def _with_dropped(self, conditions: Conditions, dropped: tuple[int, ...]) -> Conditions:
        """The conditions with those of dropped captions replaced."""
        if not dropped:
            return conditions
        rows = torch.tensor(dropped)
        return {
            name: value.index_copy(0, rows.to(value.device), self.empty[name].to(value).expand(len(rows), *value.shape[1:]))
            for name, value in conditions.items()
        }

    @torch.no_grad()
    def _members_predictions(self, joint: JointRows, conditions: Conditions) -> torch.Tensor:
        """[M, ...]: every member's prediction of its group's row at the joint."""
        given = {name: joint.members.gather(value) for name, value in conditions.items()}
        z = joint.members.expand(joint.z)
        timesteps = joint.timesteps[joint.members.node_of]
        with self.teacher():
            return self.family.predict(z, timesteps.to(z.device), given)

    def _losses(
        self, batch: GroupBatch, rows: StepRows, output: torch.Tensor, joint_output: torch.Tensor, taught: torch.Tensor | None
    ) -> StepLosses:
        objective, kind, real = self.objective, self.family.prediction_type, 0.0 if batch.filler else 1.0
        alpha, sigma = self.timeline.levels(rows.timesteps)
        target = model_target(rows.denoised, rows.z, alpha, sigma, kind)
        weight = min_snr_weight(alpha, sigma, kind, objective.snr_gamma)
        weight = torch.full_like(alpha, real) if weight is None else real * weight
        branch_weight = torch.where(rows.is_trunk, 1.0, objective.branch_weight)
        loss = weighted_mse(output, target, weight * branch_weight, batch.global_images)
        consistency = torch.zeros_like(loss)
        if taught is not None:
            consistency = self._consistency(rows.joint, joint_output, taught, real, batch.global_images)
            loss = loss + objective.consistency_weight * consistency
        with torch.no_grad():
            trunk, branch = (weighted_mse(output, target, weight * part, 1) for part in (rows.is_trunk, ~rows.is_trunk))
            counts = [real * float(part.sum()) for part in (rows.is_trunk, ~rows.is_trunk)]
            sums = torch.stack([loss, trunk, loss.new_tensor(counts[0]), branch, loss.new_tensor(counts[1]), consistency]).double()
        return StepLosses(loss, sums)

    def _consistency(self, joint: JointRows, output: torch.Tensor, taught: torch.Tensor, real: float, images: int) -> torch.Tensor:
        kind = self.family.prediction_type
        alpha, sigma = self.timeline.levels(joint.timesteps)
        weight = min_snr_weight(alpha, sigma, kind, self.objective.snr_gamma)
        counts = real * joint.members.counts.double()
        return consistency_loss(output, taught, joint.weights, joint.members, counts if weight is None else counts * weight, images)
