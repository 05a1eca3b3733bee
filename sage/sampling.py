"""The native loop: shared sampling of any denoiser, one fused launch between two denoiser calls.

This is the algorithm, written out. State is compact, one row per node of the plan. At call s the denoiser sees the R_s nodes
under their mean conditions; then one `branch_step` does guidance, the solver's update, the copy of every node's latent to its
children, and the next model input. A denoiser call is made eagerly, or is the replay of a CUDA graph (`sage.graphs`); the
loop is the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sage.families import RULES, PlanRows, Rows, map_rows
from sage.graphs import CapturedDenoiser
from sage.plan import ResolvedPlan, SharingPlan
from sage_kernels import CoefficientTable, branch_step


def sample(
    denoise: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor] | CapturedDenoiser,
    plan: SharingPlan,
    table: CoefficientTable,
    x_init: torch.Tensor,
    conditions: Any,
    *,
    negative_conditions: Any = None,
    guidance_scale: float = 1.0,
    seeds: torch.Tensor | None = None,
    noise: Callable[[int], torch.Tensor] | None = None,
    on_call: Callable[[int], None] | None = None,
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
        x_init: [B, ...] float32, bfloat16 or float16: each leaf's initial latents, already at the first noise level.
        conditions: a tensor [B, ...], or a mapping of argument name → tensor, reduced to nodes as in `sage.families.RULES`
            (a lone tensor is averaged).
        negative_conditions: same structure; required when `guidance_scale` is not 1.
        guidance_scale: g in y = u + g·(c − u); 1: no guidance, one row per node.
        seeds: int64 [B], one per leaf: Philox noise inside the kernel (stochastic solvers). A node uses its
            representative's.
        noise: instead of `seeds`: `noise(call)` → [B, ...], the leaves' draws at that call.
        on_call: called with R_s after each call; for progress bars.
        graphs: capture the denoiser calls of this run as CUDA graphs, one per row count, and replay them: for a denoiser that
            the host cannot feed fast enough. Opt-in, because a replay repeats what the GPU did at the capture: `denoise` must
            be a function of its inputs alone (no counter, no branch on a timestep's value), see `sage.CapturedDenoiser`. One
            that cannot be captured runs without graphs, with a RuntimeWarning that says why.

    Returns:
        [B, ...], dtype of `x_init`: the denoised latents in the order of the plan's leaves.

    Raises:
        ValueError: rows that do not match the plan, a stochastic table without `seeds` or `noise`, guidance without
            `negative_conditions`, graphs on a device other than CUDA. Raised before the first denoiser call.
        NotImplementedError: graphs where gradients are enabled.
    """
    _check(plan, table, x_init, conditions, negative_conditions, guidance_scale, seeds, noise)
    captured = denoise if isinstance(denoise, CapturedDenoiser) else CapturedDenoiser(denoise) if graphs else None
    if captured is not None:
        captured.check(x_init.device)
    guided = guidance_scale != 1.0
    device, first = x_init.device, int(table.rows.any(axis=1).argmax())  # rows before `begin` are zero
    resolved = plan.resolve(len(table) - first, [stage == 0 for stage in table.stage[first:]])
    coefficients, timesteps = table.tensor(device), torch.tensor(table.timesteps[first:], dtype=torch.float32, device=device)
    calls = _schedule(resolved, first, table.history, guidance_scale if guided else None, seeds, device)

    x = x_init.index_select(0, calls[0].rows.representatives.to(device))
    model_input = x * table.input_scale
    if guided:
        model_input = torch.cat([model_input, model_input])
    history: list[torch.Tensor] = []  # m1, m2, m3: what the solver stored, newest first
    last_sample = None
    conditions_of = functools.partial(_condition_rows, conditions, negative_conditions if guided else None)
    run = _Eager(denoise if captured is None else captured.denoise, timesteps, [call.rows for call in calls], conditions_of)
    rows_after = [len(call.parent) for call in calls]
    with contextlib.nullcontext(run) if captured is None else captured.run(run, x, model_input, rows_after, table) as run:
        for s, call in enumerate(calls):
            output = run(s, model_input)
            uncond, cond = output.chunk(2) if guided else (None, output)
            out = branch_step(
                x,
                cond,
                coefficients,
                call.step,
                call.parent,
                uncond_output=uncond,
                guidance=call.guidance,
                history=tuple(history),
                history_parent=call.history_parent,
                last_sample=last_sample,
                noise=None if noise is None else _drawn(noise, s, x_init),
                noise_index=None if noise is None else call.representative,
                seed=call.seed,
                want_denoised=table.history > 0,
                want_corrected=table.corrector,
                model_input=call.model_input,
                out=run.out(s),
            )
            x, last_sample, model_input = out.sample, out.corrected, out.model_input
            history = [out.denoised, *history][: table.history]
            if on_call is not None:
                on_call(call.rows.num_nodes)
    return x


def _drawn(noise: Callable[[int], torch.Tensor], s: int, x_init: torch.Tensor) -> torch.Tensor:
    drawn = noise(s)
    if not torch.is_tensor(drawn) or drawn.shape != x_init.shape:
        got = tuple(drawn.shape) if torch.is_tensor(drawn) else type(drawn).__name__
        raise ValueError(f"noise({s}) must be a tensor {tuple(x_init.shape)}, a row per leaf of the plan, got {got}")
    return drawn.to(device=x_init.device, dtype=torch.float32)


class _Eager:
    """The denoiser calls of a run, one after the other; every result is new memory."""

    def __init__(self, denoise, timesteps: torch.Tensor, rows: list[Rows], conditions_of: Callable[[Rows], Any]):
        self.timesteps = timesteps  # [S]
        self._denoise, self._rows, self._conditions_of = denoise, rows, conditions_of
        self._partition = self._condition_rows = None

    def condition_rows(self, s: int) -> Any:
        """The conditions of call s, made anew only where the partition changes."""
        if self._rows[s] is not self._partition:
            self._partition = self._rows[s]
            self._condition_rows = self._conditions_of(self._partition)
        return self._condition_rows

    def __call__(self, s: int, model_input: torch.Tensor) -> torch.Tensor:
        return self._denoise(model_input, self.timesteps[s], self.condition_rows(s))

    def out(self, s: int) -> None:
        """Where `branch_step` writes after call s: into new memory."""
        return None


class _Call:
    """Everything `branch_step` needs to know of one call, on the device before the loop starts.

    Output rows are the nodes of the next call (the leaves, after the last). A row draws its noise, and takes its table row,
    as its parent node does: children of one node part by their conditions alone.
    """

    def __init__(self, partitions: PlanRows, s: int, row: int, ancestors, guidance: float | None, seeds, device: torch.device):
        plan = partitions.plan
        self.rows = partitions.at(s)
        parent = _parent(plan, s)
        representative = plan.representatives(s)[parent]
        ints = dict(dtype=torch.int32, device=device)
        self.parent = torch.tensor(parent, **ints)  # [R_{s+1}]
        self.history_parent = tuple(torch.tensor(index, **ints) for index in ancestors)  # m1, m2, m3: [R_{s+1}] each
        self.representative = torch.tensor(representative, **ints)  # [R_{s+1}] leaf
        self.step = torch.full((len(parent),), row, **ints)
        self.guidance = None if guidance is None else torch.full((len(parent),), guidance, device=device)
        self.seed = None if seeds is None else seeds[torch.from_numpy(np.array(representative))].to(device)
        self.model_input = None if s == plan.num_calls - 1 else "single" if guidance is None else "double"


def _schedule(plan: ResolvedPlan, first: int, history: int, guidance: float | None, seeds, device: torch.device) -> list[_Call]:
    partitions, ancestors, calls = PlanRows(plan), [], []
    for s in range(plan.num_calls):
        parent = _parent(plan, s)
        # m1 has the rows that the state has now, m2 those of a call earlier: one more generation back.
        ancestors = [parent, *(index[parent] for index in ancestors)][: min(s, history)]
        calls.append(_Call(partitions, s, first + s, ancestors, guidance, seeds, device))
    return calls


def _parent(plan: ResolvedPlan, s: int) -> np.ndarray:
    """int64 [R_{s+1}]: the node of call s that each row after it comes from."""
    return plan.labels(s) if s == plan.num_calls - 1 else plan.parent(s)


def _condition_rows(conditions: Any, negative: Any, rows: Rows) -> Any:
    """[B, ...] conditions → [R, ...], or [2R, ...] with the negative half first."""
    if isinstance(conditions, Mapping):
        return {
            key: _condition_rows_of(key, value, None if negative is None else negative[key], rows)
            for key, value in conditions.items()
        }
    return _condition_rows_of("encoder_hidden_states", conditions, negative, rows)


def _condition_rows_of(name: str, value: torch.Tensor, negative: torch.Tensor | None, rows: Rows) -> torch.Tensor:
    both = value if negative is None else torch.cat([negative, value])
    copies = 1 if negative is None else 2
    if rows.trivial:
        return both
    return map_rows(name, both, len(both), RULES, lambda x, how: getattr(rows, how)(x, copies))


def _check(plan, table, x_init, conditions, negative, guidance_scale, seeds, noise) -> None:
    leaves = len(plan.leaves)
    if x_init.ndim < 2 or len(x_init) != leaves:
        raise ValueError(f"x_init must be [{leaves}, ...], a row per leaf of the plan, got {tuple(x_init.shape)}")
    if x_init.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x_init must be float32, bfloat16 or float16, got {x_init.dtype}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
    if guidance_scale != 1.0 and negative is None:
        raise ValueError(f"negative_conditions are required for guidance_scale {guidance_scale}; pass them or use 1.0")
    names = _check_conditions("conditions", conditions, leaves)
    if negative is not None and _check_conditions("negative_conditions", negative, leaves) != names:
        raise ValueError("negative_conditions must have the structure of conditions: a tensor, or a mapping of the same names")
    unknown = [name for name in names if name and name not in RULES]
    if unknown:
        raise ValueError(f"conditions[{unknown[0]!r}] has no rule that says how a group's rows become one; known: {', '.join(RULES)}")
    if seeds is not None and noise is not None:
        raise ValueError("seeds and noise exclude each other: pass seeds for noise inside the kernel, or noise to bring it")
    if table.stochastic and seeds is None and noise is None:
        raise ValueError(f"{table.solver} draws noise at every step: pass seeds (int64 [{leaves}]) or noise")
    if seeds is not None and not torch.is_tensor(seeds):
        raise TypeError(f"seeds must be an int64 tensor [{leaves}], got {type(seeds).__name__}; use torch.tensor(seeds)")
    if seeds is not None and (seeds.dtype != torch.int64 or tuple(seeds.shape) != (leaves,)):
        raise ValueError(f"seeds must be int64 [{leaves}], got {seeds.dtype} {tuple(seeds.shape)}")


def _check_conditions(what: str, given: Any, leaves: int) -> list[str]:
    """The names in `given` ("" for a lone tensor), after checking that every value has a row per leaf."""
    entries = dict(given) if isinstance(given, Mapping) else {"": given}
    for name, value in entries.items():
        where = f"{what}[{name!r}]" if name else what
        if not torch.is_tensor(value):
            raise TypeError(f"{where} must be a tensor{'' if name else ' or a mapping of tensors'}, got {type(value).__name__}")
        if value.ndim == 0 or len(value) != leaves:
            raise ValueError(f"{where} must have {leaves} rows, one per leaf of the plan, got {tuple(value.shape)}")
        if RULES.get(name or "encoder_hidden_states") == "mean" and not value.is_floating_point():
            raise TypeError(f"{where} is averaged over a group and must have a floating dtype, got {value.dtype}; use {where}.float()")
    return sorted(entries)
