"""Noise of their own for the members of a group that parts, where noise is torch's: in pipelines, by either engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from sage.calls import coefficient_rows, kinds_of_rows
from sage.plan import ResolvedPlan
from sage_kernels import CoefficientTable
from sage_kernels.coefficients import PARTING


class BranchNoise:
    """What the leaves of a plan do differently where their groups part, see `sage_kernels.coefficients.branch_rows`.

    The noise is drawn from clones of the leaves' generators, made at the first parting: the generators themselves end where
    they would without. A leaf's draws depend on its own generator and its own partings alone.

    Args:
        plan: over B leaves.
        eta: strength, in (0, 1].
        generators: the leaves', B of them; one for all; or None: torch's global one.
    """

    def __init__(self, plan: ResolvedPlan, eta: float, generators: Sequence[torch.Generator] | torch.Generator | None):
        self.plan, self.eta = plan, eta
        self._generators = generators
        self._clones: list[torch.Generator] | torch.Generator | None = None
        self._rows: tuple[CoefficientTable, torch.device, torch.Tensor] | None = None

    def kinds(self, call: int) -> np.ndarray:
        """int64 [B]: the kind of every leaf's row in the step after a call; `PARTING`, `PARTED`, their sum, or 0."""
        if call >= self.plan.num_calls:  # more than the plan was resolved for: nothing parts any more
            return np.zeros(self.plan.num_leaves, dtype=np.int64)
        kinds = kinds_of_rows(self.plan, call)
        return kinds if call == self.plan.num_calls - 1 else kinds[self.plan.labels(call + 1)]

    def noise_of(self, call: int) -> np.ndarray:
        """int64 [B]: the leaf whose noise every leaf's row uses: its node's representative, a parting member's own node's."""
        now = self.plan.rep_of(min(call, self.plan.num_calls - 1))
        parting = self.kinds(call) & PARTING != 0
        return np.where(parting, self.plan.rep_of(call + 1), now) if parting.any() else now

    def coefficients(self, table: CoefficientTable, device: torch.device) -> torch.Tensor:
        """float32 [4·S, 16]; kept as long as table and device stay."""
        if self._rows is None or self._rows[0] is not table or self._rows[1] != device:
            self._rows = table, device, coefficient_rows(table, self.eta, device)
        return self._rows[2]

    def draw(self, call: int, like: torch.Tensor) -> torch.Tensor | None:
        """float32 [B, ...]: noise of the leaves that part after a call, the others' 0; None if none does.

        Args:
            like: [B, ...].
        """
        parting = self.kinds(call) & PARTING != 0
        if not parting.any():
            return None
        if self._clones is None:
            self._clones = _clones(self._generators, like.device)
        options = dict(device=like.device, dtype=torch.float32)
        if not isinstance(self._clones, list):
            return randn_tensor(like.shape, generator=self._clones, **options)
        noise = torch.zeros(like.shape, **options)
        for leaf in np.flatnonzero(parting):
            noise[leaf] = randn_tensor(like.shape[1:], generator=self._clones[leaf], **options)
        return noise


def _clones(generators, device: torch.device) -> list[torch.Generator] | torch.Generator:
    """Generators in the same states; one for several leaves stays one for them."""
    if isinstance(generators, (list, tuple)) and len(generators) > 1:
        made = {id(generator): _clone(generator) for generator in generators}
        return [made[id(generator)] for generator in generators]
    if isinstance(generators, (list, tuple)):
        generators = generators[0]
    if generators is None:
        generators = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    return _clone(generators)


def _clone(generator: torch.Generator) -> torch.Generator:
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    return clone
