"""The native loop: shared sampling of any denoiser, one fused launch between two denoiser calls.

This is the algorithm, written out. State is compact, one row per node of the plan. At call s the denoiser sees the R_s nodes
under their mean conditions; then one `branch_step` does guidance, the solver's update, the copy of every node's latent to its
children, and the next model input. A denoiser call is made eagerly, or is the replay of a CUDA graph (`sage.graphs`); the
loop is the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sage.calls import Call, Guidance, Schedule, State, coefficient_rows, first_call
from sage.families import RULES
from sage.graphs import CapturedDenoiser
from sage.plan import SharingPlan
from sage.probe import Course, Probe, Probed
from sage.rows import Rows, copied, map_rows
from sage.sampling_checks import (
    check_alike,
    check_branch_back,
    check_branch_noise,
    check_conditions,
    check_noise,
    check_probe,
    check_start,
    check_trunk_guidance,
    guidance_scales,
)
from sage.step_back import StepBack
from sage.trunk import Fingerprint, Trunk
from sage_kernels import CoefficientTable, branch_step


def sample(
    denoise: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor] | CapturedDenoiser,
    plan: SharingPlan,
    table: CoefficientTable,
    x_init: torch.Tensor | Trunk,
    conditions: Any,
    *,
    negative_conditions: Any = None,
    guidance_scale: float | Sequence[float] | torch.Tensor = 1.0,
    trunk_guidance: str = "mean",
    seeds: torch.Tensor | None = None,
    noise: Callable[[int], torch.Tensor] | None = None,
    branch_noise: float = 0.0,
    branch_back: int = 0,
    probe: Probe | None = None,
    on_call: Callable[[int], None] | None = None,
    on_part: Callable[[int, Trunk], None] | None = None,
    on_probe: Callable[[Course], None] | None = None,
    graphs: bool = False,
) -> torch.Tensor:
    """Sample every leaf of a plan.

    Args:
        denoise: `denoise(model_input, timestep, condition_rows)` → model output. `model_input` [k·R, ...] is already scaled
            for the solver, in `x_init`'s dtype at the first call and in the model output's from then on; k is 2 under
            guidance (negative half first), else 1; `timestep` is a 0-dim float32 tensor; `condition_rows` has the structure
            of `conditions` with k·R rows. A `sage.CapturedDenoiser` runs as CUDA graphs, which it keeps for the next run.
        plan: over B leaves; resolved here against the table's calls.
        table: the solver's coefficients (`sage.solvers.table_for`), one row per call. A table that begins later (img2img:
            `table_for(scheduler, begin=...)`) starts there, and the plan is resolved on the calls that remain.
        x_init: [B, ...] float32, bfloat16 or float16: each leaf's initial latents, already at the first noise level. Or a
            `sage.Trunk` that was kept with the same table, on the denoiser's device: every leaf joins it where its group
            parted. The calls before are not run, and the plan is resolved on those that remain.
        conditions: a tensor [B, ...], or a mapping of argument name → tensor, reduced to nodes as in `sage.families.RULES`
            (a lone tensor is averaged).
        negative_conditions: same structure; required when `guidance_scale` is not 1.
        guidance_scale: g in y = u + g·(c − u): a number, a sequence with one for each call that runs, or a tensor [B] with
            one per leaf; 1 everywhere: no guidance, one row per node.
        trunk_guidance: what a node's g and negative conditions are: "mean": its members' mean (of the conditions as in
            `sage.families.RULES`); "representative": those of its representative.
        seeds: int64 [B], one per leaf: Philox noise inside the kernel (stochastic solvers). A node uses its
            representative's.
        noise: instead of `seeds`: `noise(call)` → [B, ...], the leaves' draws at that call, counted from the table's first.
        branch_noise: η in [0, 1]: where a group parts, its members take the stochastic form of that step, of this strength and
            with noise of their own, from `seeds` or `noise` (see `sage_kernels.coefficients.branch_rows`). More diverse members,
            at the same cost; it keeps the noise level, and the distribution as far as x0 is predicted well.
        branch_back: r, denoiser calls that the members of a group are taken back by where it parts: each is noised, from `seeds`
            or `noise`, to the level of r calls earlier (at the earliest the run's first), and makes these calls again under its
            own conditions (see `sage.step_back`). More diverse members, for r calls each at every parting;
            `SharingPlan.cost(..., branch_back=r)` counts them. `noise` is asked for these draws too, with numbers from
            `len(table)` on (`sage.step_back.draw_number`), and the state keeps r older stored samples.
        probe: at some calls the denoiser is also given what every node is to part into, and a node whose members predict otherwise
            than it does parts at once, see `sage.Probe`. The rows of children follow those of the R_s nodes. Costs a row per child
            and one wait for the device per probed call. Its calls, as the plan's, are fractions of those that run.
        on_call: called with the rows after each denoiser call: R_s, those made again, or with those of a probe; for progress bars.
        on_part: called with (index into `plan.roots`, `sage.Trunk`) when a group that began as one row has come to where it
            parts: what later leaves can join.
        on_probe: called after each probe with its `sage.probe.Course`: `plan`, the `ResolvedPlan` as it then is, and `records`.
        graphs: capture the denoiser calls of this run as CUDA graphs, one per row count, and replay them: for a denoiser that
            the host cannot feed fast enough. Opt-in, because a replay repeats what the GPU did at the capture: `denoise` must
            be a function of its inputs alone (no counter, no branch on a timestep's value), see `sage.CapturedDenoiser`. One
            that cannot be captured runs without graphs, with a RuntimeWarning that says why.

    Returns:
        [B, ...], dtype of `x_init`: the denoised latents in the order of the plan's leaves.

    Raises:
        ValueError: rows that do not match the plan, a stochastic table, branch noise or a step back without `seeds` or `noise`,
            branch noise or a step back and `on_part` (a parted member's state is its own), a step back and branch noise or
            graphs, a probe and any of these four (they must know beforehand when a group parts), guidance without
            `negative_conditions`, a trunk made with another table, graphs on a device other than CUDA. Raised before the first
            denoiser call.
        NotImplementedError: graphs where gradients are enabled; branch noise or a step back with a solver that has no such form.
    """
    leaves, trunk = len(plan.leaves), x_init if isinstance(x_init, Trunk) else None
    check_start(x_init, leaves, table)
    first = first_call(table) if trunk is None else trunk.call
    scales = guidance_scales(guidance_scale, len(table) - first, leaves)
    guided = bool((scales != 1.0).any())
    check_trunk_guidance(trunk_guidance)
    check_conditions(conditions, negative_conditions, guidance_scale, guided, leaves)
    check_noise(table, seeds, noise, leaves)
    check_branch_noise(branch_noise, seeds, noise, on_part)
    graphed = graphs or isinstance(denoise, CapturedDenoiser)
    check_branch_back(branch_back, table, branch_noise, seeds, noise, on_part, graphed)
    check_probe(probe, branch_noise, branch_back, on_part, graphed)
    captured = denoise if isinstance(denoise, CapturedDenoiser) else CapturedDenoiser(denoise) if graphs else None
    device = x_init.device if trunk is None else trunk.sample.device
    if captured is not None:
        captured.check(device)
    guidance = Guidance(scales, trunk_guidance) if guided else None
    schedule = Schedule(plan, table, first, guidance, seeds, branch_noise > 0, device, branch_back)
    course = None if probe is None else Course(probe, schedule.plan, schedule.boundaries)
    calls, rows = schedule.calls, schedule.calls[0].rows
    check_alike(rows, conditions)
    coefficients = coefficient_rows(table, branch_noise, device)
    timesteps = torch.tensor(table.timesteps[first:], dtype=torch.float32, device=device)
    state = _begun(x_init, rows, table, guided) if trunk is None else _joined(trunk, rows, guided)
    negatives = negative_conditions if guided else None
    conditions_of = functools.partial(_condition_rows, conditions, negatives, trunk_guidance)
    run = _Eager(denoise if captured is None else captured.denoise, timesteps, schedule, conditions_of)
    draw = None if noise is None else functools.partial(_drawn, noise, leaves=leaves)
    step_back = StepBack(schedule, run.denoise, run.condition_rows, draw, on_call) if branch_back > 0 else None
    replays = contextlib.nullcontext(run)
    if captured is not None:
        replays = captured.run(run, state.sample, state.model_input, [len(call.parent) for call in calls], table)
    with replays as run:
        for s in range(len(calls)):
            probed = None if course is None else course.at(s)
            if probed is None:
                output = run(s, state.model_input)
            else:
                output, state = _probe(s, state, probed, course, schedule, run)
            call = calls[s]
            uncond, cond = output.chunk(2) if guided else (None, output)
            out = branch_step(
                state.sample,
                cond,
                coefficients,
                call.step,
                call.parent,
                uncond_output=uncond,
                guidance=call.guidance,
                history=state.history[: table.history],
                history_parent=call.history_parent[: table.history],
                last_sample=state.last_sample,
                noise=None if draw is None else draw(call.number, state.sample),
                noise_index=None if draw is None else call.representative,
                seed=call.seed,
                call=call.draw,
                want_denoised=table.history > 0,
                want_corrected=table.corrector,
                model_input=call.model_input,
                out=run.out(s),
            )
            state = State(out.sample, out.model_input, (out.denoised, *state.history)[: schedule.kept], out.corrected)
            if on_part is not None:
                _keep(state, call, schedule, on_part)
            if on_call is not None:
                on_call(call.rows.num_nodes if probed is None else probed.num_nodes)
            if probed is not None and on_probe is not None:
                on_probe(course)
            if step_back is not None:
                state = step_back(s, state)
    return state.sample


def _begun(x_init: torch.Tensor, rows: Rows, table: CoefficientTable, guided: bool) -> State:
    """The first state: every node has its representative's latents."""
    x = x_init.index_select(0, rows.representatives.to(x_init.device))
    model_input = x * table.input_scale
    return State(x, torch.cat([model_input, model_input]) if guided else model_input)


def _joined(trunk: Trunk, rows: Rows, guided: bool) -> State:
    """The first state of leaves that join: every node has the trunk's."""

    def spread(one: torch.Tensor, copies: int = 1) -> torch.Tensor:
        return one.repeat(copies * rows.num_nodes, *[1] * (one.ndim - 1))

    last_sample = None if trunk.last_sample is None else spread(trunk.last_sample)
    model_input = spread(trunk.model_input, 2 if guided else 1)
    return State(spread(trunk.sample), model_input, tuple(map(spread, trunk.history)), last_sample)


def _probe(s: int, state: State, probed: Probed, course: Course, schedule: Schedule, run: _Eager) -> tuple[torch.Tensor, State]:
    """The model output of a probed call and the state before it, a row per node that goes on; `schedule` then has the calls of these."""
    nodes, device = len(state.sample), state.sample.device
    copies = len(state.model_input) // nodes
    model_input = state.model_input.index_select(0, copied(probed.node, copies, nodes, device))
    output = run.denoise(s, model_input, run.conditions_of(probed))
    parted = course.decide(s, probed, output, copies)
    output = output.index_select(0, copied(probed.going_on, copies, probed.num_nodes, device))
    if not parted:
        return output, state
    schedule.follow(course.plan, s)
    row = copied(probed.node[probed.going_on], 1, 0, device)  # of the state; m2, m3, ... have the rows of earlier calls
    newest = tuple(stored.index_select(0, row) for stored in state.history[:1])
    last_sample = None if state.last_sample is None else state.last_sample.index_select(0, row)
    return output, State(state.sample.index_select(0, row), None, (*newest, *state.history[1:]), last_sample)


def _keep(state: State, call: Call, schedule: Schedule, on_part: Callable[[int, Trunk], None]) -> None:
    """Hand over copies of the groups that part after a call."""
    plan = schedule.leaves_plan
    for root, row, history in call.partings:
        members, leader = plan.roots[root].members, plan.leaves[plan.roots[root].representative]
        record = {"prompts": [plan.leaves[leaf].prompt for leaf in members], "prompt": leader.prompt, "seed": leader.seed}
        last_sample = None if state.last_sample is None else state.last_sample[row : row + 1].clone()
        stored = tuple(kept[at : at + 1].clone() for kept, at in zip(state.history, history))
        tensors = state.sample[row : row + 1].clone(), state.model_input[row : row + 1].clone(), stored, last_sample
        on_part(root, Trunk(*tensors, call.row + 1, Fingerprint.of(schedule.table), record | {"encoder": plan.encoder}))


def _drawn(noise: Callable[[int], torch.Tensor], number: int, sample: torch.Tensor, leaves: int) -> torch.Tensor:
    drawn, wanted = noise(number), (leaves, *sample.shape[1:])
    if not torch.is_tensor(drawn) or drawn.shape != wanted:
        got = tuple(drawn.shape) if torch.is_tensor(drawn) else type(drawn).__name__
        raise ValueError(f"noise({number}) must be a tensor {wanted}, a row per leaf of the plan, got {got}")
    return drawn.to(device=sample.device, dtype=torch.float32)


class _Eager:
    """The denoiser calls of a run, one after the other; every result is new memory."""

    def __init__(self, denoise, timesteps: torch.Tensor, schedule: Schedule, conditions_of: Callable[[Rows], Any]):
        self.timesteps = timesteps  # [S]
        self.conditions_of = conditions_of  # rows → their conditions
        self._denoise, self._schedule = denoise, schedule
        self._partition = self._condition_rows = None

    def condition_rows(self, s: int) -> Any:
        """The conditions of call s, made anew only where the partition changes."""
        rows = self._schedule.partitions.at(s)
        if rows is not self._partition:
            self._partition, self._condition_rows = rows, self.conditions_of(rows)
        return self._condition_rows

    def __call__(self, s: int, model_input: torch.Tensor) -> torch.Tensor:
        return self.denoise(s, model_input, self.condition_rows(s))

    def denoise(self, s: int, model_input: torch.Tensor, condition_rows: Any) -> torch.Tensor:
        """The model output of call s for any rows, under conditions that are given."""
        return self._denoise(model_input, self.timesteps[s], condition_rows)

    def out(self, s: int) -> None:
        """Where `branch_step` writes after call s: into new memory."""
        return None


def _condition_rows(conditions: Any, negative: Any, trunk_guidance: str, rows: Rows) -> Any:
    """[B, ...] conditions → [R, ...], or [2R, ...] with the negative half first.

    Args:
        trunk_guidance: "representative": a node's negative conditions are its representative's.
    """
    reduced = _reduced(conditions, rows, None)
    if negative is None:
        return reduced
    negative = _reduced(negative, rows, "representative" if trunk_guidance == "representative" else None)
    if not isinstance(conditions, Mapping):
        return torch.cat([negative, reduced])
    return {name: torch.cat([negative[name], value]) for name, value in reduced.items()}


def _reduced(given: Any, rows: Rows, instead: str | None) -> Any:
    """[B, ...] values → [R, ...], as their rules say, or all of them as `instead` says."""
    if rows.trivial:
        return given
    alone = not isinstance(given, Mapping)
    named = {"encoder_hidden_states": given} if alone else given
    reduced = map_rows(named, rows.num_leaves, RULES, lambda name, value, how, mask: rows.reduce(value, instead or how, 1, mask))
    return reduced["encoder_hidden_states"] if alone else reduced
