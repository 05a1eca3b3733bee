"""Where trunk and branch meet: t*, the timestep at which a group parts, and the timesteps that training draws on either side of it.

    timeline = Timeline.of(scheduler)
    t_star = torch.full((groups,), branch_timestep(scheduler, 0.4, num_inference_steps=20))
    t = timeline.draw("trunk", t_star, generator)                  # one per group, in [t*, T)
    t = timeline.draw("branch", t_star[group_of_row], generator)   # one per row, in [0, t*)
    alpha, sigma = timeline.levels(t)

T is the scheduler's `num_train_timesteps`. For flow matching a timestep is T·sigma, any real number; otherwise an integer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sage.plan import Leaf, SharingPlan
from sage.plan_checks import fraction, integer
from sage.solver_readers import NotInTable, array
from sage.solvers import stock_class, table_for

PARTS = ("trunk", "branch", "joint")


def branch_timestep(scheduler: Any, share: float, num_inference_steps: int, **schedule: Any) -> float:
    """t* of one share; see `branch_timesteps`."""
    return float(branch_timesteps(scheduler, [share], num_inference_steps, **schedule)[0])


def branch_timesteps(scheduler: Any, shares: Sequence[float], num_inference_steps: int, **schedule: Any) -> torch.Tensor:
    """t*: the timestep of the first call that each member makes alone, for every share.

    It is the scheduler's own timestep at the call where a `SharingPlan` of that share parts: calls are counted, not steps (Heun's
    makes two calls a step), rounded as the plan does it, and inside a step of the solver moved to its end.

    Trunk timesteps are those at or above t*, branch timesteps those below. (A member's first call is at t* itself; a denoiser does not
    tell it from its neighbour below.) A trunk of no calls has t* = T: nothing is at or above it. A group that never parts has t* = 0.

    Args:
        scheduler: a diffusers scheduler, as sampling will use it; it is left as it is.
        shares: in [0, 1], one per group, say.
        num_inference_steps: as sampling will use it.
        schedule: further arguments of its `set_timesteps` (`mu` for dynamic shifting, `sigmas`).

    Returns:
        float64 [len(shares)].

    Raises:
        NotImplementedError: timesteps that do not count noise down from T (EDM's, Mochi's).
    """
    _is_flow(scheduler)
    steps = integer(num_inference_steps, "branch_timesteps: num_inference_steps", 1)
    shares = [fraction(share, f"branch_timesteps: shares[{number}]") for number, share in enumerate(shares)]
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, **schedule)
    timesteps, boundaries = array(scheduler.timesteps), _boundaries(scheduler)
    ends = {0: float(scheduler.config.num_train_timesteps), len(timesteps): 0.0}
    calls = (_branch_call(share, len(timesteps), boundaries) for share in shares)
    return torch.tensor([ends[call] if call in ends else timesteps[call] for call in calls], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Timeline:
    """The timesteps of a scheduler in training: noise levels, and draws on either side of t*.

    A timestep's position is the timestep itself, or, for flow matching, what it was before the scheduler's shift; draws are uniform in
    position, as in diffusers' training scripts (without further weighting). Positions of flow matching begin at 1, the least of the
    scheduler's own in training, so that sigma is never 0.

    Args:
        num_train_timesteps: T.
        alphas_cumprod: float64 [T]; None for flow matching.
        shift: of flow matching, sigma = shift·u / (1 + (shift − 1)·u) with u = position/T.
    """

    num_train_timesteps: int
    alphas_cumprod: torch.Tensor | None = None
    shift: float = 1.0

    @classmethod
    def of(cls, scheduler: Any, mu: float | None = None) -> Timeline:
        """Read a diffusers scheduler.

        Args:
            mu: of dynamic shifting, as its `set_timesteps` takes it; needed where the config says `use_dynamic_shifting`.
        """
        config = scheduler.config
        if not _is_flow(scheduler):
            return cls(config.num_train_timesteps, torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64).cpu())
        if not getattr(config, "use_dynamic_shifting", False):
            return cls(config.num_train_timesteps, None, float(getattr(scheduler, "shift", config.get("flow_shift", 1.0))))
        if mu is None:
            raise ValueError("Timeline.of: mu is required, as the scheduler shifts by it (use_dynamic_shifting); pass what its "
                             "set_timesteps is given for pictures of this size")
        linear = config.get("time_shift_type", "exponential") == "linear"
        return cls(config.num_train_timesteps, None, mu if linear else math.exp(mu))

    def levels(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, sigma) of timesteps [R]: float64 [R] each, on their device."""
        if self.alphas_cumprod is None:
            sigma = timesteps.double() / self.num_train_timesteps
            return 1 - sigma, sigma
        level = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return level.sqrt(), (1 - level).sqrt()

    def draw(self, part: str, t_star: torch.Tensor, generator: torch.Generator | None = None, width: float = 0.05) -> torch.Tensor:
        """One timestep per row, at random on its side of its own t*.

        Rows are stratified: each takes its own of R equal parts of its range, in random order, so that a batch covers all noise levels.

        Args:
            part: "trunk": [t*, T). "branch": [0, t*). "joint": around t*, for consistency.
            t_star: [R] on the CPU, t* of each row.
            generator: on the CPU.
            width: of "joint": how far from t*, to both sides, as a fraction of T.

        Returns:
            [R] on the CPU, int64, or float32 for flow matching.

        Raises:
            ValueError: a row's range is empty (a trunk at t* = T, where nothing is shared; a branch at t* = 0): leave the row out.
        """
        t_star = self._check("draw", t_star)
        return self.place(part, t_star, _strata(len(t_star), generator), width)

    def place(self, part: str, t_star: torch.Tensor, quantile: torch.Tensor, width: float = 0.05) -> torch.Tensor:
        """The timestep at a quantile of each row's side of its own t*: what `draw` gives for random quantiles.

        Args:
            part, t_star, width: see `draw`.
            quantile: float64 [R] in [0, 1), on the CPU; of the position, 0 is the least noise.

        Returns, raises: as `draw`.
        """
        if part not in PARTS:
            raise ValueError(f"Timeline.place: part must be one of {', '.join(map(repr, PARTS))}, got {part!r}")
        t_star = self._check("place", t_star)
        if quantile.shape != t_star.shape or not bool(((quantile >= 0) & (quantile < 1)).all()):
            raise ValueError(f"Timeline.place: quantile must be {list(t_star.shape)} numbers in [0, 1), one for each t*, got "
                             f"{list(quantile.shape)}: {quantile.tolist()[:8]}")
        low, high = self._range(part, t_star, fraction(width, "Timeline.place: width"))
        empty = (high <= low).nonzero()
        if len(empty):
            row = int(empty[0])
            raise ValueError(f"Timeline.place: t_star[{row}] = {float(t_star[row]):g} leaves no timestep for the {part}; leave out rows "
                             "that share nothing (t* = T), or everything (t* = 0)")
        position = low + (high - low) * quantile.double()
        if self.alphas_cumprod is not None:
            return torch.minimum(position.floor(), high - 1).long()
        timesteps, edge = self._shifted(position).float(), t_star.float()
        edge = torch.where(edge < t_star, edge.nextafter(torch.full_like(edge, math.inf)), edge)  # the least float32 at or above t*
        if part == "trunk":
            return torch.maximum(timesteps, edge)
        return torch.minimum(timesteps, edge.nextafter(torch.zeros_like(edge))) if part == "branch" else timesteps

    def trunk_fraction(self, t_star: torch.Tensor) -> torch.Tensor:
        """Which part of all positions is the trunk's, float64 [R]: (T − t*)/T for timesteps that are integers.

        Trunks drawn with this probability, and branches otherwise, spread over all timesteps as ordinary training does.

        Args:
            t_star: [R] on the CPU.
        """
        t_star = self._check("trunk_fraction", t_star)
        low, high = self._range("trunk", t_star, 0.0)
        first, _ = self._range("branch", t_star, 0.0)
        return (high - low) / (high - first)

    def jittered(self, t_star: torch.Tensor, jitter: float, generator: torch.Generator | None = None) -> torch.Tensor:
        """t* drawn anew around its value, so that the model serves more shares than one.

        Uniform in position within `jitter`·T to both sides, stratified over the rows, and kept where trunk and branch both have
        timesteps. A t* of 0 or T (share 1 or 0) stays. Draw once per group, and give trunk and branch the same.

        Args:
            t_star: [R] on the CPU.
            jitter: fraction of T, in [0, 1]. 0: t* stays.

        Returns:
            float64 [R].
        """
        t_star, last = self._check("jittered", t_star), self.num_train_timesteps
        if fraction(jitter, "Timeline.jittered: jitter") == 0:
            return t_star
        moved = self._position(t_star) + jitter * last * (2 * _strata(len(t_star), generator) - 1)
        return torch.where((t_star > 0) & (t_star < last), self._shifted(moved.clamp(2, last - 1)), t_star)

    def _range(self, part: str, t_star: torch.Tensor, width: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high) of the positions of each row, float64 [R] each; integers where timesteps are."""
        flow, last = self.alphas_cumprod is None, float(self.num_train_timesteps)
        position = self._position(t_star)
        first = torch.full_like(position, float(flow))
        final = torch.full_like(position, last)
        middle = position if flow else position.ceil()
        if part == "trunk":
            return torch.maximum(middle, first), final
        if part == "branch":
            return first, middle
        inside = (t_star > 0) & (t_star < last)
        low, high = (position - width * last).clamp(min=float(flow)), (position + width * last).clamp(max=last)
        if not flow:
            low, high = low.ceil().clamp(max=last - 1), torch.maximum(high.ceil(), low.ceil() + 1).clamp(max=last)
        return low, torch.where(inside, high, low)

    def _position(self, timesteps: torch.Tensor) -> torch.Tensor:
        u = timesteps / self.num_train_timesteps
        return timesteps if self.shift == 1 else self.num_train_timesteps * u / (self.shift - (self.shift - 1) * u)

    def _shifted(self, position: torch.Tensor) -> torch.Tensor:
        u = position / self.num_train_timesteps
        return position if self.shift == 1 else self.num_train_timesteps * self.shift * u / (1 + (self.shift - 1) * u)

    def _check(self, op: str, t_star: torch.Tensor) -> torch.Tensor:
        if not torch.is_tensor(t_star) or t_star.ndim != 1 or t_star.device.type != "cpu":
            got = f"{list(t_star.shape)} on {t_star.device}" if torch.is_tensor(t_star) else repr(t_star)
            raise ValueError(f"Timeline.{op}: t_star must be a tensor [R] on the CPU, got {got}")
        t_star = t_star.double()
        if not bool(((t_star >= 0) & (t_star <= self.num_train_timesteps)).all()):
            raise ValueError(f"Timeline.{op}: t_star must be in [0, {self.num_train_timesteps}], got {t_star.tolist()[:8]}")
        return t_star


def _strata(count: int, generator: torch.Generator | None) -> torch.Tensor:
    """float64 [count] in [0, 1): one number from each of `count` equal parts, in random order."""
    order = torch.randperm(count, generator=generator)
    return (order + torch.rand(count, generator=generator, dtype=torch.float64)) / max(count, 1)


def _branch_call(share: float, num_calls: int, boundaries: list[bool] | None) -> int:
    """The call before which a group of that share parts; `num_calls` if it never does."""
    pair = SharingPlan.flat([Leaf("", 0), Leaf("", 1)], [[0, 1]], share)
    return pair.resolve(num_calls, boundaries).branch_call(0)


def _boundaries(scheduler: Any) -> list[bool] | None:
    """Per denoiser call, whether a group may part after it; None where its own `step` runs, and it may after every one."""
    try:
        return [bool(stage == 0) for stage in table_for(scheduler).stage]
    except NotInTable:
        return None


def _is_flow(scheduler: Any) -> bool:
    """Whether timesteps are T·sigma of flow matching (True), or indices of `alphas_cumprod` (False)."""
    name = getattr(stock_class(type(scheduler)), "__name__", type(scheduler).__name__)
    config = scheduler.config
    if name.startswith("FlowMatch") or getattr(config, "use_flow_sigmas", False):
        if getattr(config, "invert_sigmas", False):
            raise NotImplementedError(f"{name}: invert_sigmas counts timesteps up from 0; train with a scheduler that counts down")
        return True
    if torch.is_tensor(getattr(scheduler, "alphas_cumprod", None)):
        return False
    raise NotImplementedError(f"{name}: its timesteps are neither indices of alphas_cumprod nor those of flow matching; train with "
                              "DDPMScheduler or FlowMatchEulerDiscreteScheduler")
