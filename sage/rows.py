"""Rows of a denoiser call: how the rows of a group's members become one, and how its result goes back to all of them.

The way for each argument is data, `sage.families.RULES`; this module walks arguments and applies it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from sage.families import MASKS, ROW_LISTS, ROWS_SECOND
from sage.plan import ResolvedPlan
from sage_kernels import group_mean

logger = logging.get_logger(__name__)


class Rows:
    """The partition of B leaves at one denoiser call, ready to reduce and expand what has k·B rows.

    Args:
        members: the nodes of the call, each a tuple of leaf indices.
        representatives: [R] the leaf whose latents and noise each node uses.
        num_leaves: B.
    """

    def __init__(self, members: tuple[tuple[int, ...], ...], representatives: np.ndarray, num_leaves: int):
        self.num_leaves, self.num_nodes, self.members = num_leaves, len(members), members
        self.trivial = self.num_nodes == num_leaves
        labels = np.empty(num_leaves, dtype=np.int64)
        for node, leaves in enumerate(members):
            labels[list(leaves)] = node
        self.labels = torch.from_numpy(labels)  # [B] node of each leaf
        self.representatives = torch.from_numpy(np.array(representatives, dtype=np.int64))  # [R]
        self.representative_of = self.representatives[self.labels]  # [B]
        self._leaves = np.concatenate([np.asarray(leaves) for leaves in members])  # [B] leaves, node after node; more if nodes overlap
        self._bounds = np.cumsum([0, *map(len, members)])  # [R + 1] where each node's leaves begin
        self._indices: dict[tuple[str, int, torch.device], torch.Tensor] = {}
        self._segments: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def reduce(self, value: Any, how: str, copies: int, mask: torch.Tensor | None = None) -> Any:
        """k·B rows (a tensor [k·B, ...], or a list of k·B tensors) → k·R rows, as the rule `how` says."""
        if isinstance(value, (list, tuple)):
            return like(value, self._reduce_list(value, how, copies))
        if how in ("representative", "alike"):
            return self.representative(value, copies)
        if how == "union":
            return self.union(value, copies)
        if how == "masked mean" and mask is not None:
            if mask.ndim == 2 and mask.shape[1] >= value.shape[1]:
                return self.masked_mean(value, mask[:, : value.shape[1]], copies)  # Chroma's goes on over the image tokens
            _warn_mask(tuple(mask.shape), tuple(value.shape))
        return self.mean(value, copies)

    def _index(self, kind: str, copies: int, device: torch.device) -> torch.Tensor:
        """One of `labels`, `representatives`, `representative_of`, once per guidance copy, on a device: made and moved there once."""
        if (kind, copies, device) not in self._indices:
            stride = self.num_nodes if kind == "labels" else self.num_leaves  # each copy is so many rows further on
            index = torch.cat([getattr(self, kind) + c * stride for c in range(copies)])
            self._indices[kind, copies, device] = index.to(device)
        return self._indices[kind, copies, device]

    def representative_rows(self, device: torch.device, copies: int = 1) -> torch.Tensor:
        """int64 [k·B] on a device: the row that each row equals."""
        return self._index("representative_of", copies, device)

    def representative(self, x: torch.Tensor, copies: int) -> torch.Tensor:
        """[k·B, ...] → [k·R, ...]: the representative's row."""
        return x.index_select(0, self._index("representatives", copies, x.device))

    def alike(self, x: torch.Tensor, copies: int) -> tuple[int, int] | None:
        """Two members of one node whose rows of `x` [k·B, ...] differ; None if all are equal."""
        index = self.representative_rows(x.device, copies)
        same = (x.index_select(0, index) == x).flatten(1).all(1) if x.ndim > 1 else x.index_select(0, index) == x
        if bool(same.all()):
            return None
        leaf = int((~same).nonzero()[0]) % self.num_leaves
        return leaf, int(self.representative_of[leaf])

    def _groups(self, copies: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`indptr` and `members` of `sage_kernels.group_mean`, once per guidance copy."""
        if (copies, device) not in self._segments:
            leaves = [self._leaves + c * self.num_leaves for c in range(copies)]
            bounds = [self._bounds[1:] + c * len(self._leaves) for c in range(copies)]
            segments = np.concatenate([[0], *bounds]), np.concatenate(leaves)
            self._segments[copies, device] = tuple(torch.from_numpy(s.astype(np.int32)).to(device) for s in segments)
        return self._segments[copies, device]

    def mean(self, x: torch.Tensor, copies: int) -> torch.Tensor:
        """[k·B, ...] → [k·R, ...]: the members' mean, summed in float64 so that equal rows give exactly that row."""
        return group_mean(x, *self._groups(copies, x.device)).rows

    def masked_mean(self, x: torch.Tensor, mask: torch.Tensor, copies: int) -> torch.Tensor:
        """[k·B, L, ...] → [k·R, L, ...]: at each token the mean of the members whose mask [k·B, L] is on there.

        Where no member's mask is on, the token counts for nobody and the plain mean stands.
        """
        on = (mask != 0).double().view(*mask.shape, *[1] * (x.ndim - 2))
        share = group_mean(on, *self._groups(copies, x.device)).rows  # [k·R, L, ...] of the members
        total = group_mean(x.double() * on, *self._groups(copies, x.device)).rows
        return torch.where(share > 0, (total / share).to(x.dtype), self.mean(x, copies))

    def union(self, x: torch.Tensor, copies: int) -> torch.Tensor:
        """[k·B, ...] → [k·R, ...]: the members' element-wise maximum (a token that counts for one counts for the node)."""
        nothing = x.new_empty(len(x), 0, dtype=torch.float32)  # rows of no elements: only the masks are united
        return group_mean(nothing, *self._groups(copies, x.device), mask=x).mask

    def _reduce_list(self, rows: Sequence[torch.Tensor], how: str, copies: int) -> list[torch.Tensor]:
        """A list of k·B tensors → k·R. They may differ in length: a mean goes over the members that reach so far."""
        if how in ("representative", "alike"):
            return [rows[i] for i in self._index("representatives", copies, torch.device("cpu"))]
        if how not in ("mean", "masked mean") or not all(torch.is_tensor(row) for row in rows):
            raise ValueError(f'a list of {type(rows[0]).__name__} cannot be reduced by "{how}"; use "alike" or "representative"')
        shifted = ([leaf + c * self.num_leaves for leaf in leaves] for c in range(copies) for leaves in self.members)
        return [_ragged_mean([rows[i] for i in members]) for members in shifted]

    def expand(self, x: Any, copies: int) -> Any:
        """k·R rows → k·B: every leaf gets its node's row."""
        if isinstance(x, (list, tuple)):
            return like(x, (x[i] for i in self._index("labels", copies, torch.device("cpu"))))
        return x.index_select(0, self._index("labels", copies, x.device))


@functools.lru_cache(maxsize=None)
def _warn_mask(mask: tuple[int, ...], value: tuple[int, ...]) -> None:
    """Once for each pair of shapes."""
    logger.warning(f"a token mask of shape {mask} does not say which tokens of {value} count: the plain mean of the members is taken")


def _ragged_mean(rows: list[torch.Tensor]) -> torch.Tensor:
    """Tensors [L_i, ...] → [max L_i, ...]: at each position the mean of those that have it."""
    if len(rows) == 1:
        return rows[0]
    longest = max(rows, key=len)
    total, count = torch.zeros_like(longest, dtype=torch.float64), torch.zeros(len(longest), dtype=torch.float64)
    for row in rows:
        total[: len(row)] += row
        count[: len(row)] += 1
    return (total / count.to(total.device).view(-1, *[1] * (total.ndim - 1))).to(longest.dtype)


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


def copied(index: np.ndarray, copies: int, stride: int, device: torch.device) -> torch.Tensor:
    """int64 [k·n] on a device: an index [n] once for each of k guidance copies, which are `stride` rows apart."""
    return torch.from_numpy(np.concatenate([index + copy * stride for copy in range(copies)])).to(device)


def like(value: Sequence, items: Iterable) -> Any:
    """A list, tuple or named tuple of the items, as `value` is."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def map_rows(given: Mapping[str, Any], batch: int, rules: Mapping[str, str], apply: Callable[..., Any]) -> dict[str, Any]:
    """Apply `apply(name, value, how, mask)` to everything in a denoiser's arguments that has one row per latent.

    Containers are walked: the entries of a mapping go by their own names, the items of a list by the list's. The lists
    named in `ROW_LISTS` are rows themselves.

    Args:
        given: argument name → value.
        batch: k·B, the rows that a batch-shaped value has.

    Raises:
        ValueError: an argument without a rule has `batch` rows, or one with a rule has another number of rows.
    """
    return {name: _map(name, value, given, batch, rules, apply) for name, value in given.items()}


def _map(name: str, value: Any, siblings: Mapping[str, Any], batch: int, rules, apply) -> Any:
    how = rules.get(name)
    if how == "never batched" or value is None or isinstance(value, (bool, int, float, str)):
        return value
    if how == "refused":
        raise ValueError(f"the denoiser's argument {name!r} carries state from call to call that sage cannot share: call without it")
    if isinstance(value, Mapping):
        return {key: _map(key if isinstance(key, str) else name, value[key], value, batch, rules, apply) for key in value}
    if isinstance(value, (list, tuple)) and not (name in ROW_LISTS or (len(value) == batch and not _hold_tensors(value))):
        return like(value, (_map(name, item, siblings, batch, rules, apply) for item in value))
    if not isinstance(value, (list, tuple)) and (not isinstance(value, (torch.Tensor, np.ndarray)) or value.ndim == 0):
        return value
    if name in ROWS_SECOND:
        return _map_rows_second(name, value, batch, rules, apply)
    rows = len(value)
    if how is None:
        if rows != batch:
            return value
        raise ValueError(
            f"the denoiser's argument {name!r} has {batch} rows, one per latent, and no rule says how the rows of a group "
            f'become one; pass rules={{{name!r}: "mean"}} (or "masked mean", "union", "alike", "representative", "never batched") '
            "to sage.enable"
        )
    if (rows == 1 and batch > 1) or (name in ROW_LISTS and rows != batch and not torch.is_tensor(value[0])):
        return value  # one row for everybody, or sizes that are not the rows': the denoiser knows what to make of them
    if rows != batch:
        raise ValueError(
            f"the denoiser's argument {name!r} must have {batch} rows, one per latent, to be reduced by \"{how}\", got "
            f"{'shape ' + str(tuple(value.shape)) if torch.is_tensor(value) else str(rows) + ' rows'}"
            + _advice(name, rows, batch)
        )
    if isinstance(value, np.ndarray):
        raise ValueError(f"the denoiser's argument {name!r} must be a torch tensor to be reduced by \"{how}\", got a NumPy array")
    return apply(name, value, how, _mask_of(name, siblings) if how == "masked mean" else None)


def _advice(name: str, rows: int, batch: int) -> str:
    if rows % batch == 0:
        return f": {rows // batch} for each latent (frames?), which sage cannot share; share nothing in this pipeline"
    return f'; pass rules={{{name!r}: "never batched"}} to sage.enable if its rows are not the batch\'s'


def _hold_tensors(items: Sequence[Any]) -> bool:
    return any(item is None or isinstance(item, (torch.Tensor, Mapping, list, tuple)) for item in items)


def _map_rows_second(name: str, value: torch.Tensor, batch: int, rules, apply) -> torch.Tensor:
    """`_map` of a tensor [layers, k·B, ...]."""
    if value.shape[1] != batch:
        raise ValueError(f"the denoiser's argument {name!r} must be [layers, {batch}, ...], got {tuple(value.shape)}")
    return apply(name, value.transpose(0, 1).contiguous(), rules[name], None).transpose(0, 1)


def _mask_of(name: str, siblings: Mapping[str, Any]) -> torch.Tensor | None:
    """The token mask [k·B, L] that goes with an embedding, by name."""
    found = (siblings.get(mask) for mask in (*MASKS.get(name, ()), f"{name}_mask"))
    return next((mask for mask in found if torch.is_tensor(mask)), None)


def map_outputs(outputs: Sequence[Any], apply: Callable[[Sequence[Any]], Any], row_lists: bool = False) -> Any:
    """Apply `apply` to the corresponding values of several denoiser outputs (tensors, tuples, lists, diffusers outputs).

    Args:
        row_lists: the denoiser takes and gives a list of rows: a list of tensors is one value, not a container.
    """
    first = outputs[0]
    if torch.is_tensor(first):
        return apply(outputs) if first.ndim else first
    if isinstance(first, Mapping):
        mapped = {key: map_outputs([o[key] for o in outputs], apply, row_lists) for key in first}
        return mapped if type(first) is dict else type(first)(**mapped)  # plain, as Z-Image's ControlNet gives, or an output class
    if isinstance(first, list) and row_lists:
        return apply(outputs)
    if isinstance(first, (list, tuple)):
        return like(first, (map_outputs(items, apply, row_lists) for items in zip(*outputs)))
    return first
