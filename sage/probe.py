"""The probe at run time: what a group predicts against what its members would, and an early parting where the two differ.

A plan says beforehand when a group parts. A probe looks: at some calls the denoiser is also given, for every node that will part
later, the nodes that it parts into (the members, in a flat plan), at the node's own latents and under their own conditions. Where
they predict something else than the node does, they go on from this very call, with the outputs that were just computed.

Both engines use this module: `Course` knows the plan as it has become, `Probed` the rows of a probed call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sage.plan_checks import fraction, items
from sage.resolved import ResolvedPlan
from sage.rows import Rows


@dataclass(frozen=True)
class Probe:
    """When groups are probed, and how far their members' predictions may be from theirs.

    At a probed call every node that is to part later is compared with the nodes that it parts into by the plan, its children. Its
    deviation is the largest, over its children, of

        ‖y_child − y_node‖ / ‖y_node‖        0 where both are 0, infinite where only ‖y_node‖ is

    with y the denoiser's raw output for a row, all of its guidance copies together and before guidance, and sums in float32. Where it
    is above `tolerance` the node parts before this call; its children, which part by the plan in turn, are probed from the next
    probe on. A probe costs a row per child, which are counted; parting by it costs nothing more than the node's own row.

    Args:
        calls: fractions in [0, 1) of the denoiser calls that run, at least one: call ⌊f·S + 0.5⌋ is probed, the second call at the
            earliest (a node that has made none has no latents of its own). Where groups may not part before that call, inside a
            step of Heun's or KDPM2's, the next call where they may is probed; where there is none, nothing is.
        tolerance: at least 0. 0: a node parts at the first probe, unless its children predict the same to the bit; `math.inf`:
            never, and the probe only measures.

    Raises:
        TypeError, ValueError: an argument is of another type, or out of range.

    Notes:
        Every probed call waits once for the device, to bring the deviations to the host: the decision is the host's.

        Deviations depend on the model, on its guidance copies (equal negative halves lower them) and on the solver's schedule: measure
        with `math.inf` before choosing. The defaults are the embedded model's; the figures are those of benchmarks/results/probe.json.

        Deviations fall somewhat from the second of ten calls to the sixth: to 0.90 of it in the median of 40 pairs of prompts, to
        between 0.61 and 1.10 of it in single ones. Their order stays (rank correlation 0.96), so one early probe tells what later ones
        would. At the second call all 6 pairs of cosine below 0.4 are above 0.8, but so are 9 of the other 34, all of cosine below
        0.8. How far pictures come out from their own is ranked by deviation (0.61) hardly better than by cosine (0.55).

        Groups of cosine 0.6 at a share of 0.4: the default parts 10.5 of 22 in the mean of two seeds, and 734 rows run instead of 614,
        71 of them for the probe; pictures were not measurably better for it. A tolerance of 1 parts little: 3 of the 40 pairs are
        above it, 1 of the 22 of cosine 0.6 and more.
    """

    calls: Sequence[float] = (0.1,)
    tolerance: float = 0.8

    def __post_init__(self):
        calls = sorted(fraction(call, f"Probe: calls[{number}]") for number, call in enumerate(items(self.calls, "Probe: calls")))
        if not calls or calls[-1] == 1.0:
            raise ValueError(f"Probe: calls must be at least one fraction below 1 of the denoiser calls, got {self.calls!r}")
        object.__setattr__(self, "calls", tuple(calls))
        tolerance = self.tolerance
        if isinstance(tolerance, (bool, str)) or not isinstance(tolerance, (int, float, np.integer, np.floating)):
            raise TypeError(f"Probe: tolerance must be a number of at least 0, got {tolerance!r}")
        if not tolerance >= 0:  # NaN fails too
            raise ValueError(f"Probe: tolerance must be at least 0, got {tolerance}; math.inf never parts")
        object.__setattr__(self, "tolerance", float(tolerance))

    def at(self, num_calls: int, boundaries: Sequence[bool] | None = None) -> list[int]:
        """The calls that are probed, ascending, of S calls.

        Args:
            boundaries: bool [S]; whether a group may part after each call; None: after every one.
        """
        may_part = [False] + ([True] * (num_calls - 1) if boundaries is None else list(boundaries[: num_calls - 1]))
        wanted = (max(1, math.floor(call * num_calls + 0.5)) for call in self.calls)
        found = (next((call for call in range(first, num_calls) if may_part[call]), None) for first in wanted)
        return sorted({call for call in found if call is not None})


class Probed(Rows):
    """The rows of a probed call: its R nodes and, behind them, the c children of those that are probed.

    Reduces what has k·B rows to k·(R + c). Expands as `Rows` does, so that every leaf gets its node's row; once `settle` has been told
    which nodes go on, that is its child's where the node has parted.

    Attributes:
        nodes: the probed ones among the R.
        node: int64 [R + c], the node whose latents each row has.
        going_on: int64 [R'], the row of each node that goes on.
    """

    def __init__(self, plan: ResolvedPlan, call: int):
        found = {node: plan.children(call, node) for node, members in enumerate(plan.members[call]) if len(members) > 1}
        self.nodes = [node for node, children in found.items() if children]
        children = [child for node in self.nodes for child in found[node]]
        leaders = [*plan.node_representatives[call], *(leader for _, leader in children)]
        super().__init__((*plan.members[call], *(leaves for leaves, _ in children)), np.array(leaders), plan.num_leaves)
        self.trivial = False  # also where R + c is B
        owners = [node for node in self.nodes for _ in found[node]]
        self.node = np.array([*range(plan.rows[call]), *owners])
        self.num_children = len(children)  # c
        self.settle(plan.members[call])
        self.representative_of = self.representatives[self.labels]

    def settle(self, going_on: Sequence[tuple[int, ...]]) -> None:
        """Take the nodes, by their members, that partition the leaves from here on."""
        row_of = {members: row for row, members in enumerate(self.members)}
        self.going_on = np.array([row_of[members] for members in going_on])
        for row in self.going_on:
            self.labels[list(self.members[row])] = int(row)

    def deviations(self, output: torch.Tensor, copies: int) -> list[float]:
        """The deviation of each of `nodes` (see `Probe`), from the denoiser's output [k·(R + c), ...]. Waits for the device."""
        rows = output.detach().unflatten(0, (copies, self.num_nodes)).transpose(0, 1).flatten(1)  # [R + c, k·n]
        owners = torch.from_numpy(self.node[-self.num_children :]).to(rows.device)
        children, own = rows[-self.num_children :].float(), rows.index_select(0, owners).float()
        apart = (children - own).norm(dim=1)
        ratios = torch.where(apart > 0, apart / own.norm(dim=1), apart)
        worst = ratios.new_zeros(self.num_nodes).scatter_reduce(0, owners, ratios, "amax").tolist()
        return [worst[node] for node in self.nodes]


class Course:
    """The plan that a probed run follows: as given, and with what has parted early since.

    Args:
        plan: over B leaves and S calls.
        boundaries: bool [S]; whether a group may part after each call; None: after every one.

    Attributes:
        plan: the plan as it is now.
        calls: those in which the given plan has nodes to probe.
        records: a dict per probe made: `call` (counted from the run's first), `nodes` (how many were probed), `parted` (how many of
            them), `rows` (evaluated for their children), `groups` (per node its `leaves`, its `deviation`, and whether it `parted`).
    """

    def __init__(self, probe: Probe, plan: ResolvedPlan, boundaries: Sequence[bool] | None):
        self.plan, self.records, self._tolerance = plan, [], probe.tolerance
        self.calls = [call for call in probe.at(plan.num_calls, boundaries) if Probed(plan, call).nodes]

    def at(self, call: int) -> Probed | None:
        """What the denoiser is called for at a call; None where nothing is probed."""
        probed = Probed(self.plan, call) if call in self.calls else None
        return probed if probed is not None and probed.nodes else None

    def decide(self, call: int, probed: Probed, output: torch.Tensor, copies: int) -> bool:
        """Part the nodes whose children's output is too far from theirs; says whether there are any.

        Args:
            probed: the rows of this call, which then knows what goes on.
            output: [k·(R + c), ...], any floating dtype.
        """
        deviations, members = probed.deviations(output, copies), self.plan.members[call]
        parting = [node for node, deviation in zip(probed.nodes, deviations) if deviation > self._tolerance]
        groups = [
            {"leaves": list(members[node]), "deviation": deviation, "parted": node in parting}
            for node, deviation in zip(probed.nodes, deviations)
        ]
        counts = {"call": call, "nodes": len(groups), "parted": len(parting), "rows": probed.num_children}
        self.records.append(counts | {"groups": groups})
        if parting:
            self.plan = self.plan.parted_before(call, parting)
            probed.settle(self.plan.members[call])
        return bool(parting)
