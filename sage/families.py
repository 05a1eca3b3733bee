"""What the arguments of a denoiser mean when several rows become one: the only place that knows pipelines by name.

Sharing runs one row for a whole group. Every batch-shaped argument of the denoiser is reduced **by its name**, never by
its shape (a rotary table can have as many rows as the batch and still not be one). `RULES` is that table; a user's own
pipeline adds to it with ``sage.enable(pipe, ..., rules={"my_argument": "mean"})``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sage.plan import ResolvedPlan
from sage_kernels import group_mean

# The pipeline attributes that hold a denoiser, in the order they are hooked.
DENOISERS = ("unet", "transformer", "transformer_2", "controlnet")

# The denoiser's latent argument: its rows are B leaves times k copies (k = 2 under classifier-free guidance).
LATENTS = ("sample", "hidden_states")

# The ways in which the rows of a node's members become the node's one row.
HOW = ("mean", "union", "representative", "never batched")

RULES: dict[str, str] = {
    # the latents themselves, and what is alike for every member of a node
    "sample": "representative",
    "hidden_states": "representative",
    "timestep": "representative",
    "timestep_cond": "representative",
    "class_labels": "representative",
    "time_ids": "representative",
    # what the prompt says
    "encoder_hidden_states": "mean",
    "text_embeds": "mean",
    "image_embeds": "mean",
    # which of its tokens count
    "attention_mask": "union",
    "encoder_attention_mask": "union",
    # spatial conditions (ControlNet, T2I-Adapter)
    "down_block_additional_residuals": "representative",
    "mid_block_additional_residual": "representative",
    "down_intrablock_additional_residuals": "representative",
    # options, not data
    "return_dict": "never batched",
}


def check_rules(rules: Mapping[str, str] | None) -> dict[str, str]:
    """Merge a user's rules over `RULES`.

    Raises:
        ValueError: a rule is none of `HOW`.
    """
    for name, how in (rules or {}).items():
        if how not in HOW:
            raise ValueError(f"rules[{name!r}] must be one of {', '.join(map(repr, HOW))}, got {how!r}")
    return {**RULES, **(rules or {})}


class Rows:
    """The partition of B leaves at one denoiser call, ready to reduce and expand tensors of k·B rows.

    Args:
        members: the nodes of the call, each a tuple of leaf indices.
        representatives: [R] the leaf whose latents and noise each node uses.
        num_leaves: B.
    """

    def __init__(self, members: tuple[tuple[int, ...], ...], representatives: np.ndarray, num_leaves: int):
        self.num_leaves, self.num_nodes = num_leaves, len(members)
        self.trivial = self.num_nodes == num_leaves
        labels = np.empty(num_leaves, dtype=np.int64)
        for node, leaves in enumerate(members):
            labels[list(leaves)] = node
        self.labels = torch.from_numpy(labels)  # [B] node of each leaf
        self.representatives = torch.from_numpy(np.array(representatives, dtype=np.int64))  # [R]
        self.representative_of = self.representatives[self.labels]  # [B]
        self._leaves = np.concatenate([np.asarray(leaves) for leaves in members])  # [B] leaves, node after node
        self._bounds = np.cumsum([0, *map(len, members)])  # [R + 1] where each node's leaves begin
        self._segments: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def _index(self, index: torch.Tensor, copies: int, stride: int, device: torch.device) -> torch.Tensor:
        """`index` once per guidance copy, each copy `stride` rows further on."""
        return torch.cat([index + c * stride for c in range(copies)]).to(device)

    def representative(self, x: torch.Tensor, copies: int) -> torch.Tensor:
        """[k·B, ...] → [k·R, ...]: the representative's row."""
        return x.index_select(0, self._index(self.representatives, copies, self.num_leaves, x.device))

    def _groups(self, copies: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`indptr` and `members` of `sage_kernels.group_mean`, once per guidance copy."""
        if (copies, device) not in self._segments:
            leaves = [self._leaves + c * self.num_leaves for c in range(copies)]
            bounds = [self._bounds[1:] + c * self.num_leaves for c in range(copies)]
            segments = np.concatenate([[0], *bounds]), np.concatenate(leaves)
            self._segments[copies, device] = tuple(torch.from_numpy(s.astype(np.int32)).to(device) for s in segments)
        return self._segments[copies, device]

    def mean(self, x: torch.Tensor, copies: int) -> torch.Tensor:
        """[k·B, ...] → [k·R, ...]: the members' mean, summed in float64 so that equal rows give exactly that row."""
        return group_mean(x, *self._groups(copies, x.device)).rows

    def union(self, x: torch.Tensor, copies: int) -> torch.Tensor:
        """[k·B, ...] → [k·R, ...]: the members' element-wise maximum (a token that counts for one counts for the node)."""
        nothing = x.new_empty(len(x), 0, dtype=torch.float32)  # rows of no elements: only the masks are united
        return group_mean(nothing, *self._groups(copies, x.device), mask=x).mask

    def expand(self, x: torch.Tensor, copies: int) -> torch.Tensor:
        """[k·R, ...] → [k·B, ...]: every leaf gets its node's row."""
        return x.index_select(0, self._index(self.labels, copies, self.num_nodes, x.device))


class PlanRows:
    """The `Rows` of every call of a resolved plan; calls with the same partition get the same object."""

    def __init__(self, plan: ResolvedPlan):
        self.plan = plan
        self._rows: dict[int, Rows] = {}

    def at(self, call: int) -> Rows:
        """The partition at a call; calls after the last have the last one's."""
        call = min(call, self.plan.num_calls - 1)
        members = self.plan.members[call]  # one tuple object per partition
        if id(members) not in self._rows:
            self._rows[id(members)] = Rows(members, self.plan.representatives(call), self.plan.num_leaves)
        return self._rows[id(members)]


def map_rows(name: str, value: Any, batch: int, rules: Mapping[str, str], apply: Callable[[torch.Tensor, str], Any]) -> Any:
    """Apply `apply(tensor, how)` to every tensor of a denoiser argument that has one row per latent.

    Containers are walked: the entries of a mapping go by their own names, the items of a list by the list's.

    Args:
        batch: k·B, the rows that a batch-shaped tensor has.

    Raises:
        ValueError: an argument without a rule has `batch` rows, or one with a rule has another number of rows.
    """
    how = rules.get(name)
    if how == "never batched" or value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {key: map_rows(key, item, batch, rules, apply) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_rows(name, item, batch, rules, apply) for item in value)
    if not torch.is_tensor(value) or value.ndim == 0:
        return value
    if how is None:
        if value.shape[0] != batch:
            return value
        raise ValueError(
            f"the denoiser's argument {name!r} has {batch} rows, one per latent, and no rule says how the rows of a group "
            f'become one; pass rules={{{name!r}: "mean"}} (or "union", "representative", "never batched") to sage.enable'
        )
    if value.shape[0] == 1 and batch > 1:
        return value  # one row for everybody: broadcast by the denoiser
    if value.shape[0] != batch:
        raise ValueError(
            f"the denoiser's argument {name!r} must have {batch} rows, one per latent, to be reduced by \"{how}\", got shape "
            f'{tuple(value.shape)}; pass rules={{{name!r}: "never batched"}} to sage.enable if its rows are not the batch\'s'
        )
    return apply(value, how)


def map_outputs(outputs: Sequence[Any], apply: Callable[[Sequence[torch.Tensor]], torch.Tensor]) -> Any:
    """Apply `apply` to the corresponding tensors of several denoiser outputs (tensors, tuples, lists, diffusers outputs)."""
    first = outputs[0]
    if torch.is_tensor(first):
        return apply(outputs) if first.ndim else first
    if isinstance(first, Mapping):
        return type(first)(**{key: map_outputs([o[key] for o in outputs], apply) for key in first})
    if isinstance(first, (list, tuple)):
        return type(first)(map_outputs(items, apply) for items in zip(*outputs))
    return first
