"""A step back: the members of a group that parts return to an earlier noise level, each with noise of its own, and go on alone.

After call s, at the level (alpha, sigma) where it ends, a row that parts is noised up to the level (alpha_b, sigma_b) at which
call b = s + 1 - r began (at the earliest the run's first call), by the forward process between the two,

    x_b = (alpha_b/alpha)*x + sqrt(sigma_b^2 - (alpha_b/alpha*sigma)^2)*noise

and calls b ... s are made again, for the rows that part alone and under their own conditions. A sample of x = alpha*x0 +
sigma*noise' becomes one of alpha_b*x0 + sigma_b*noise'': what the group had settled between the two levels is open again.

The solver's memory is what it was at call b: denoised samples that the group stored in the calls before stay valid, since they do
not depend on the noise. A corrector (UniPC) would go back to the sample before the noise, so call b is made without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from sage.calls import Schedule, State, first_call
from sage.plan import ResolvedPlan
from sage_kernels import CoefficientTable, branch_step
from sage_kernels.coefficients import PARTED, branch_rows
from sage_kernels.coefficients.table import row as coefficient_row


class _Return(NamedTuple):
    """What the n rows that part after one call are told; all on the device before the loop starts."""

    begin: int  # b, counted from the run's first call
    parted: torch.Tensor  # int64 [n], among the R_{s+1} rows
    copies: torch.Tensor  # int64 [k·n], the same among the k·R_{s+1} of model inputs and conditions
    parent: torch.Tensor  # int32 [n], `parted` once more
    itself: torch.Tensor  # int32 [n], 0 … n − 1
    representative: torch.Tensor  # int32 [n], the leaf whose noise each row uses
    seed: torch.Tensor | None  # int64 [n]
    guidance: list[torch.Tensor | None]  # float32 [n], for each of the calls b … s


class StepBack:
    """The steps back of one run of `sage.sample`.

    Args:
        schedule: made with `back`, so that the state keeps what calls b … s and their history need.
        denoise: `denoise(s, model_input, condition_rows)` → model output of call s, counted from the run's first.
        condition_rows: `condition_rows(s)` → the conditions of call s, k·R_s rows.
        draw: `draw(number, like)` → float32 [B, ...]; None: Philox noise from the schedule's seeds. `number` is `draw_number`.
        on_call: called with n after each call that is made again.
    """

    def __init__(
        self,
        schedule: Schedule,
        denoise: Callable[[int, torch.Tensor, Any], torch.Tensor],
        condition_rows: Callable[[int], Any],
        draw: Callable[[int, torch.Tensor], torch.Tensor] | None,
        on_call: Callable[[int], None] | None,
    ):
        self._schedule, self._denoise, self._condition_rows = schedule, denoise, condition_rows
        self._draw, self._on_call = draw, on_call
        parting = [s for s in range(schedule.plan.num_calls) if schedule.plan.branches_after(s)]
        self._returns = {s: self._return(s) for s in parting}
        rows = _coefficients(schedule.table, [(schedule.first + s, schedule.first + self._returns[s].begin) for s in parting])
        self._coefficients = torch.from_numpy(rows.astype(np.float32)).to(schedule.device)  # [2·S + partings, 16]
        self._noising = {s: 2 * len(schedule.table) + number for number, s in enumerate(parting)}

    def __call__(self, s: int, state: State) -> State:
        """The state after call s, R_{s+1} rows, with those that part come again; every part of it then has R_{s+1} rows."""
        back = self._returns.get(s)
        if back is None:
            return state
        older = zip(state.history[1:], self._schedule.calls[s].history_parent)
        history = (*state.history[:1], *(kept.index_select(0, at) for kept, at in older))
        own = self._again(s, back, self._noised(s, back, state, history))
        return State(
            state.sample.index_copy(0, back.parted, own.sample),
            state.model_input.index_copy(0, back.copies, own.model_input),
            tuple(kept.index_copy(0, back.parted, part) for kept, part in zip(history, own.history)),
            None if state.last_sample is None else state.last_sample.index_copy(0, back.parted, own.last_sample),
        )

    def _noised(self, s: int, back: _Return, state: State, history: Sequence[torch.Tensor]) -> State:
        """The rows that part where call b begins, [n, ...].

        Args:
            history: what calls s, s − 1, … stored, R_{s+1} rows each.
        """
        out = branch_step(
            state.sample,
            state.model_input[: len(state.sample)],  # its dtype is the next model input's; no coefficient reads it
            self._coefficients,
            torch.full_like(back.parent, self._noising[s]),
            back.parent,
            want_denoised=False,
            model_input=self._schedule.calls[s].model_input,
            **self._noise(s, s + 1, back, state.sample),
        )
        before = tuple(kept.index_select(0, back.parted) for kept in history[s + 1 - back.begin :])
        return State(out.sample, out.model_input, before)

    def _again(self, s: int, back: _Return, own: State) -> State:
        """Calls b … s of the rows that part, [n, ...]."""
        schedule, table = self._schedule, self._schedule.table
        conditions = _selected(self._condition_rows(s + 1), back.copies)
        for i, guidance in enumerate(back.guidance, back.begin):
            output = self._denoise(i, own.model_input, conditions)
            uncond, cond = (None, output) if guidance is None else output.chunk(2)
            out = branch_step(
                own.sample,
                cond,
                self._coefficients,
                torch.full_like(back.itself, schedule.first + i + (len(table) if i == back.begin else 0)),
                back.itself,
                uncond_output=uncond,
                guidance=guidance,
                history=own.history[: table.history],
                last_sample=own.last_sample,
                want_denoised=table.history > 0,
                want_corrected=table.corrector,
                model_input=schedule.calls[s].model_input,
                **(self._noise(s, i, back, own.sample) if table.stochastic else {}),
            )
            own = State(out.sample, out.model_input, (out.denoised, *own.history)[: schedule.kept], out.corrected)
            if self._on_call is not None:
                self._on_call(len(back.parted))
        return own

    def _noise(self, s: int, i: int, back: _Return, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arguments of `branch_step`: what the rows that part after call s draw at call i, or as they are noised (i = s + 1)."""
        first = self._schedule.first
        number = draw_number(len(self._schedule.table), first + s, first + i)
        if self._draw is None:
            return {"seed": back.seed, "call": torch.full_like(back.itself, number)}
        return {"noise": self._draw(number, like), "noise_index": back.representative}

    def _return(self, s: int) -> _Return:
        schedule, rows = self._schedule, self._schedule.partitions.at(s + 1)
        ints = dict(dtype=torch.int32, device=schedule.device)
        parted, begin = schedule.plan.parted(s), max(0, s + 1 - schedule.back)
        representative = schedule.plan.representatives(s + 1)[parted]
        copies = [parted] if schedule.guidance is None else [parted, parted + rows.num_nodes]
        guidance: list[torch.Tensor | None] = [None] * (s + 1 - begin)
        if schedule.guidance is not None:
            scales = (schedule.guidance.at(i, rows)[parted] for i in range(begin, s + 1))
            guidance = [torch.tensor(scale, dtype=torch.float32, device=schedule.device) for scale in scales]
        return _Return(
            begin,
            torch.tensor(parted, device=schedule.device),
            torch.tensor(np.concatenate(copies), device=schedule.device),
            torch.tensor(parted, **ints),
            torch.arange(len(parted), **ints),
            torch.tensor(representative, **ints),
            None if schedule.seeds is None else schedule.seeds[torch.from_numpy(representative)].to(schedule.device),
            guidance,
        )


def draw_number(calls: int, parting: int, row: int) -> int:
    """Which draw it is: a number that no other draw of a run has, the call in the counter of Philox noise or in `noise(call)`.

    Args:
        calls: S, rows of the table.
        parting: the table row of the call that the step back begins after.
        row: the table row of the call that is made again; parting + 1: the noise that takes the sample back.
    """
    return calls * (parting + 1) + row


class OwnNoise:
    """The draws of a step back where noise is torch's: in pipelines.

    Every leaf has a generator of its own for them, seeded by what a clone of its given one would draw next: the given ones end
    where they would without, and what they still draw is other noise. A leaf's draws depend on its own generator and its own
    partings alone.

    Args:
        plan: over B leaves.
        generators: the leaves', B of them; those of several leaves may be one.
    """

    def __init__(self, plan: ResolvedPlan, generators: Sequence[torch.Generator]):
        made = {id(generator): _offspring(generator) for generator in generators}
        self._plan, self._generators = plan, [made[id(generator)] for generator in generators]

    def draw(self, call: int, like: torch.Tensor) -> torch.Tensor:
        """float32 [B, ...]: noise of the leaves whose nodes part after a call, the others' 0.

        Args:
            like: [B, ...].
        """
        noise = torch.zeros(like.shape, device=like.device, dtype=torch.float32)
        parted = np.isin(self._plan.labels(call + 1), self._plan.parted(call))
        for leaf in np.flatnonzero(parted):
            noise[leaf] = randn_tensor(like.shape[1:], generator=self._generators[leaf], device=like.device, dtype=torch.float32)
        return noise


def _offspring(generator: torch.Generator) -> torch.Generator:
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    seed = torch.randint(2**63 - 1, (), generator=clone, device=generator.device).item()
    return torch.Generator(generator.device).manual_seed(seed)


def _coefficients(table: CoefficientTable, steps_back: Sequence[tuple[int, int]]) -> np.ndarray:
    """float64 [2·S + n, 16]: the table's rows, the same without corrector, and a row that noises for every step back.

    Args:
        steps_back: n pairs of table rows, of the call that it begins after and of the call that it goes back to.
    """
    calls, scale = len(table), table.column("s")
    kinds = branch_rows(table, 0.0)
    noising = []
    for after, to in steps_back:
        (alpha, sigma), (alpha_to, sigma_to) = table.levels.end[after], table.levels.begin[to]
        ratio = alpha_to / alpha
        deviation = np.sqrt(max(sigma_to**2 - (ratio * sigma) ** 2, 0.0))
        input_scale = table.input_scale if to == first_call(table) else scale[to - 1]
        noising.append(coefficient_row(a=ratio, c=deviation, s=input_scale))
    return np.concatenate([table.rows, kinds[PARTED * calls : (PARTED + 1) * calls], np.reshape(noising, (-1, table.rows.shape[1]))])


def _selected(conditions: Any, index: torch.Tensor) -> Any:
    """Some rows of a tensor, or of every tensor in a mapping."""
    if isinstance(conditions, Mapping):
        return {name: value.index_select(0, index.to(value.device)) for name, value in conditions.items()}
    return conditions.index_select(0, index.to(conditions.device))
