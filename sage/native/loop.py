"""One call of a pipeline through the native loop: schedule, encode, draw noise, `sage.sample`, decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from sage.branch_noise import BranchNoise
from sage.clock import now
from sage.denoiser import Launcher, is_static
from sage.families import RULES
from sage.native.base import Adapter, NotNative
from sage.plan import ResolvedPlan, SharingPlan
from sage.probe import Course, Probe
from sage.sampling import sample
from sage.sampling_checks import check_probe
from sage.solvers import NotInTable, noise_draws, noise_dtype, table_for
from sage.step_back import OwnNoise
from sage.trunk import Trunk
from sage_kernels import CoefficientTable


def run(
    adapter: Adapter,
    plan: SharingPlan,
    prompts: list[str],
    negatives: list[str] | None,
    generators: list[torch.Generator],
    *,
    on_call: Callable[[int, int], None] | None,
    max_rows: int | None,
    graphs: bool,
    trunk: Trunk | None,
    on_part: Callable[[int, Trunk], None] | None,
    branch_noise: float,
    branch_back: int,
    probe: Probe | None,
) -> tuple[Any, dict[str, Any], ResolvedPlan]:
    """See `sage.native.draw`."""
    pipe = adapter.pipe
    check_probe(probe, branch_noise, branch_back, on_part, graphs)
    adapter.check_inputs(prompts, negatives)
    if probe is not None:
        adapter.check_probe()
    adapter.schedule()
    options = adapter.step_arguments(generators)
    table, draws = _table(pipe.scheduler, options.get("eta"))
    if trunk is not None:
        trunk.check_table(table)
    joined = 0 if trunk is None else trunk.call  # calls that the trunk has behind it
    boundaries = [bool(stage == 0) for stage in table.stage[joined:]]
    resolved = plan.resolve(len(table) - joined, boundaries)
    conditions, negative_conditions = adapter.encode(prompts, negatives)
    x = adapter.latents(conditions["encoder_hidden_states"].dtype, generators)
    denoiser = _Denoiser(adapter, max_rows, len(plan.leaves))
    branch = BranchNoise(resolved, branch_noise, generators) if branch_noise > 0 else None
    back = OwnNoise(resolved, generators) if branch_back > 0 else None
    step_noise = _StepNoise(pipe.scheduler, draws, x, options.get("generator"), denoiser, branch, back, joined)
    if trunk is not None:
        trunk = _joinable(trunk, x, denoiser)
        for call in np.flatnonzero(draws[:joined]):
            step_noise(call)  # what the pictures' generators would have drawn as members of the group
    launches, made = 0, []
    courses: list[Course] = []  # one and the same, once for every probe made

    def called(rows: int) -> None:
        nonlocal launches
        launches += denoiser.pieces(rows)
        made.append(rows)
        if on_call is not None:
            on_call(rows, resolved.num_calls)

    began = now(x.device)
    x = sample(
        denoiser,
        plan,
        table,
        x if trunk is None else trunk,
        conditions,
        negative_conditions=negative_conditions,
        guidance_scale=adapter.guidance_scale(table.timesteps[joined:].tolist()) if adapter.guided else 1.0,
        noise=step_noise if draws.any() or branch is not None or back is not None else None,
        branch_noise=branch_noise,
        branch_back=branch_back,
        probe=probe,
        on_call=called,
        on_part=on_part,
        on_probe=courses.append,
        graphs=graphs,
    )
    ended = now(x.device)
    pictures = adapter.decode(x, generators)
    pipe.maybe_free_model_hooks()
    stats = _stats(resolved, made, len(table), boundaries, denoiser, launches, ended - began)
    if probe is not None:
        stats["probes"] = courses[-1].records if courses else []
    return pictures, stats, courses[-1].plan if courses else resolved


def _joinable(trunk: Trunk, x: torch.Tensor, denoiser: _Denoiser) -> Trunk:
    """The trunk on the pipeline's device; refused where its latents are not the like of `x` [B, ...], the pictures' own."""
    if trunk.sample.shape[1:] != x.shape[1:] or trunk.sample.dtype != x.dtype:
        raise ValueError(
            f"the trunk must hold latents [1, {', '.join(map(str, x.shape[1:]))}] {x.dtype}, as the pipeline's are, got "
            f"{list(trunk.sample.shape)} {trunk.sample.dtype}; ask for pictures of the trunk's size, in its pipeline's dtype"
        )
    denoiser.dtype = trunk.model_input.dtype
    return trunk.to(x.device)


def _table(scheduler, eta: float | None) -> tuple[CoefficientTable, np.ndarray]:
    """The solver's table, and bool [S]: the calls in which the scheduler's own `step` draws noise."""
    try:
        return table_for(scheduler, eta=eta), noise_draws(scheduler, eta=eta)
    except NotInTable as error:
        raise NotNative(
            f"the native loop steps through the coefficient table, which this scheduler leaves ({error}); take another solver, or call "
            "the pipeline inside sage.enable"
        ) from error


class _Denoiser:
    """`denoise` of `sage.sample`: the adapter's, in pieces that fit.

    Attributes:
        copies: k, guidance copies of a row.
        launcher: what runs the pieces.
        dtype: of the last model output.
    """

    def __init__(self, adapter: Adapter, max_rows: int | None, num_leaves: int):
        self.copies, self.launcher = 2 if adapter.guided else 1, Launcher(max_rows, RULES)
        self.dtype: torch.dtype | None = None
        self._adapter, self._together = adapter, 1 if adapter.guides_apart else self.copies
        modules = adapter.denoisers()
        static = any(is_static(module, module.__dict__.get("_compiled_call_impl")) for module in modules)
        self._pad_to = num_leaves * self.copies // self._together if static else 0

    def __call__(self, model_input: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        def call(piece: dict[str, torch.Tensor]) -> torch.Tensor:
            rows = dict(piece)
            return self._adapter.denoise(rows.pop("sample"), timestep, rows)

        num_nodes = len(model_input) // self._together
        output = self.launcher(call, {"sample": model_input, **conditions}, num_nodes, self._together, self._pad_to)
        self.dtype = output.dtype
        return output

    def pieces(self, rows: int) -> int:
        """In how many pieces a call of so many rows, guidance copies not counted, goes through: also where a graph replays it."""
        return self.launcher.count(rows * self.copies // self._together, self._together)


class _StepNoise:
    """`noise` of `sage.sample`: what the scheduler's own `step` would draw, whether or not a coefficient uses it; where that draws
    nothing, the noise of the members that part.

    Args:
        draws: bool [S].
        x: [B, ...] the initial latents.
        generators: the leaves'; None: the pipeline passes none to `step`, and torch's global one draws.
        denoiser: knows the dtype of the model output.
        branch: draws the noise of members that part; None if they get none.
        back: draws for members that are taken back, numbered as `draw_number` does; None if they are not.
        joined: the call at which the plan begins.
    """

    def __init__(
        self,
        scheduler,
        draws: np.ndarray,
        x: torch.Tensor,
        generators: list[torch.Generator] | None,
        denoiser: _Denoiser,
        branch: BranchNoise | None,
        back: OwnNoise | None,
        joined: int,
    ):
        self._branch, self._back, self._joined = branch, back, joined
        self._scheduler, self._draws, self._generators, self._denoiser = scheduler, draws, generators, denoiser
        self._nothing, self._dtype = torch.zeros_like(x, dtype=torch.float32), x.dtype

    def __call__(self, call: int) -> torch.Tensor:
        """[B, ...]"""
        if call >= len(self._draws):  # of a step back after table row `call // S − 1`
            return self._back.draw(call // len(self._draws) - 1 - self._joined, self._nothing)
        if not self._draws[call]:
            drawn = None if self._branch is None else self._branch.draw(call - self._joined, self._nothing)
            return self._nothing if drawn is None else drawn
        dtype = noise_dtype(self._scheduler, self._dtype, self._denoiser.dtype)
        return randn_tensor(self._nothing.shape, generator=self._generators, device=self._nothing.device, dtype=dtype)


def _stats(
    resolved: ResolvedPlan,
    rows: list[int],
    calls: int,
    boundaries: list[bool],
    denoiser: _Denoiser,
    launches: int,
    seconds: float,
) -> dict[str, Any]:
    """See `sage.Sharing.stats`.

    Args:
        rows: of every denoiser call made, in order; those made again in a step back, and those of probes, are among them.
        calls: denoiser calls of a picture on its own, those that a trunk has behind it included.
    """
    nfe, independent = sum(rows), resolved.num_leaves * calls
    return {
        "nfe": nfe,
        "nfe_independent": independent,
        "saving": 1.0 - nfe / independent,
        "guidance_copies": denoiser.copies,
        "denoiser_rows": nfe * denoiser.copies,
        "rows": rows,
        "num_calls": resolved.num_calls,
        "launches": launches,
        "copies_per_launch": denoiser.copies,
        "max_rows": denoiser.launcher.max_rows,
        "boundaries": None if all(boundaries) else boundaries,
        "cache": None,
        "probes": None,
        "denoise_seconds": seconds,
        "solver_path": "table",
    }
