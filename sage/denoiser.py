"""The denoiser under sharing: reduce the arguments' rows to nodes, run in pieces that fit, give every picture its row.

A call is intercepted outside everything else that is attached to the module: outside a compiled graph, outside other hooks
(offloading, caches, layer-wise casting, the user's own), all of which see the rows that are computed.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from sage.families import DENOISERS, LATENTS, ROWS_SECOND
from sage.rows import Rows, like, map_outputs, map_rows

logger = logging.get_logger(__name__)

# The shared call under way in this thread: a denoiser that two pipelines have in common obeys only the one that runs.
current: ContextVar[Any] = ContextVar("sage_run", default=None)

_MOST_REDUCED = 4  # of each argument: conditional and unconditional ones do not change from call to call
_installing = threading.Lock()


def denoisers_of(pipe) -> dict[str, torch.nn.Module]:
    """The denoisers of a pipeline by the names of its attributes; each once."""
    found: dict[str, torch.nn.Module] = {}
    for name in DENOISERS:
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module) and not any(module is other for other in found.values()):
            found[name] = module
    return found


class Interception:
    """Stands in front of one module's call while any shared call is under way, in whatever thread.

    `torch.nn.Module.__call__` hands over to the module's `_compiled_call_impl` if there is one: `Module.compile` puts the
    compiled graph there, and so does this class, in front of it.
    """

    def __init__(self, module: torch.nn.Module):
        self.module, self.users = module, 0
        self.compiled = module.__dict__.get("_compiled_call_impl")  # what Module.compile left

    def __call__(self, *args, **kwargs):
        run = current.get()
        if run is None or run.name_of(self.module) is None or _calling_scheduler(run) is not run.pipe.scheduler:
            return self.stock(*args, **kwargs)
        return run.denoise(run.name_of(self.module), self, args, kwargs)

    def stock(self, *args, **kwargs):
        """The module's own call."""
        return (self.compiled or self.module._call_impl)(*args, **kwargs)

    @classmethod
    def install(cls, module: torch.nn.Module) -> Interception:
        """Intercept the module's calls until `remove`; may be nested."""
        with _installing:
            there = module.__dict__.get("_compiled_call_impl")
            if not isinstance(there, cls):
                there = module.__dict__["_compiled_call_impl"] = cls(module)
            there.users += 1
            return there

    def remove(self) -> None:
        """Undo one `install`; the last one gives the module back as it was, or as somebody else has made it meanwhile."""
        with _installing:
            self.users -= 1
            if self.users or self.module.__dict__.get("_compiled_call_impl") is not self:
                return
            del self.module.__dict__["_compiled_call_impl"]
            if self.compiled is not None:
                self.module.__dict__["_compiled_call_impl"] = self.compiled


def _calling_scheduler(run: Any) -> Any:
    """The scheduler of the pipeline whose call is under way innermost: another one may run inside a callback of ours.

    Frames of the run's own pipeline are known by their code: reading their variables would keep tensors alive.
    """
    calls, frame = [], sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            calls.append(frame)
        frame = frame.f_back
    nested = sum(call.f_code is run.code for call in calls) > 1
    for call in calls:
        if call.f_code is run.code and not nested:
            break
        caller = call.f_locals.get("self")
        if isinstance(caller, DiffusionPipeline):
            return getattr(caller, "scheduler", None)
    return run.pipe.scheduler


class Arguments:
    """The arguments of one denoiser call, by name; `passed` gives them back as they were passed."""

    def __init__(self, module: torch.nn.Module, args: tuple, kwargs: dict):
        names = _parameters(type(_unwrapped(module)))
        names = names + tuple(f"argument {number}" for number in range(len(names), len(args)))  # what `forward` takes as *args
        self._positional, self._keywords = names[: len(args)], list(kwargs)
        self.given = {**dict(zip(names, args)), **kwargs}

    def latents(self, name: str) -> Any:
        """The latents, a tensor [k·B, ...] or a list of k·B rows."""
        for key in LATENTS:
            if torch.is_tensor(self.given.get(key)) or isinstance(self.given.get(key), list):
                return self.given[key]
        raise ValueError(
            f"{name} was called without a latents argument that sage knows ({', '.join(LATENTS)}), got {', '.join(self.given)}; "
            "pass them by name"
        )

    def passed(self, given: dict) -> tuple[tuple, dict]:
        """(args, kwargs) with the values of `given`."""
        return tuple(given[name] for name in self._positional), {name: given[name] for name in self._keywords}


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module whose `forward` names the arguments: inside torch.compile's and peft's wrappers."""
    module = getattr(module, "_orig_mod", module)
    return _unwrapped(module.get_base_model()) if hasattr(module, "get_base_model") else module


@lru_cache(maxsize=None)
def _parameters(cls: type) -> tuple[str, ...]:
    """Names of the positional arguments of a module class's `forward`."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


class Reducer:
    """Reduces arguments by rule, and remembers the reduced conditions: pipelines pass the same ones at every call."""

    def __init__(self, rules: dict[str, str]):
        self.rules = rules
        self._rows: Rows | None = None  # the partition that what is kept was reduced to
        self._kept: dict[tuple[str, str], OrderedDict] = {}  # (denoiser, argument) → the last few

    def __call__(self, name: str, given: dict, rows: Rows, batch: int, copies: int, check: bool) -> dict:
        """k·B rows → k·R rows of every argument.

        Args:
            check: refuse arguments under the rule "alike" whose rows differ inside a node (costs a device sync).
        """
        if rows is not self._rows:
            self._rows = rows
            self._kept.clear()

        def apply(key, value, how, mask):
            if how == "alike" and check:
                self._refuse_different(name, key, value, rows, copies)
            calculates = how in ("mean", "masked mean", "union") and torch.is_tensor(value) and key not in ROWS_SECOND
            if not calculates or value.is_inference() or (mask is not None and mask.is_inference()):  # those tell no versions
                return rows.reduce(value, how, copies, mask)
            return self._remembered(self._kept.setdefault((name, key), OrderedDict()), value, how, mask, copies)

        return map_rows(given, batch, self.rules, apply)

    def _remembered(self, kept: OrderedDict, value: torch.Tensor, how: str, mask: torch.Tensor | None, copies: int) -> torch.Tensor:
        key = (id(value), value._version, id(mask), None if mask is None else mask._version, copies)
        if key not in kept:
            kept[key] = (self._rows.reduce(value, how, copies, mask), value, mask)  # alive, so that ids stay theirs
            if len(kept) > _MOST_REDUCED:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key][0]

    @staticmethod
    def _refuse_different(name: str, key: str, value: Any, rows: Rows, copies: int) -> None:
        if torch.is_tensor(value):
            pair = rows.alike(value, copies) if value.stride(0) else None
        else:
            pair = _different_items(value, rows)
        if pair is not None:
            refuse_different(f"the argument {key!r} of {name}", key, pair)


def refuse_different(what: str, key: str, pair: tuple[int, int]) -> None:
    """Raise for two pictures of one group that cannot share a row."""
    raise ValueError(
        f"{what} differs between pictures {pair[0]} and {pair[1]}, which the plan puts into one group: one row would run for "
        f"both. Group only pictures that have the same, or accept the representative's for all: pass "
        f'rules={{{key!r}: "representative"}} to sage.enable'
    )


def _different_items(items: list, rows: Rows) -> tuple[int, int] | None:
    for index in range(len(items)):
        leaf = index % rows.num_leaves
        other = index - leaf + int(rows.representative_of[leaf])
        if not _same(items[index], items[other]):
            return leaf, int(rows.representative_of[leaf])
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a is b or a == b


class Pieces:
    """How the R nodes of a call go through the denoiser: all at once, or in pieces of whole nodes.

    A node's guidance copies stay in one piece, in the layout of the full call: blocks of nodes, a block per copy.

    Args:
        copies: k.
        most_nodes: the most nodes of a piece.
        padded: round a piece's size up to one of `buckets` (the last node is repeated).
    """

    def __init__(self, num_nodes: int, copies: int, most_nodes: int, padded: bool = False):
        self.num_nodes, self.copies = num_nodes, copies
        self._moved: dict[tuple[torch.device, int | None], torch.Tensor] = {}
        starts = range(0, num_nodes, most_nodes)
        self.sizes = [min(most_nodes, num_nodes - start) for start in starts]
        self.padded = [min(bucket(size), most_nodes) if padded else size for size in self.sizes]
        self.whole = len(self.sizes) == 1 and self.padded == self.sizes

    @cached_property
    def _rows(self) -> list[torch.Tensor]:
        """Per piece, int64 [k·padded]: which of the k·R rows it has."""
        starts = np.cumsum([0, *self.sizes])[:-1].tolist()
        nodes = [torch.arange(start, start + size) for start, size in zip(starts, self.sizes)]
        nodes = [torch.cat([n, n[-1:].expand(more - len(n))]) for n, more in zip(nodes, self.padded)]
        return [torch.cat([n + c * self.num_nodes for c in range(self.copies)]) for n in nodes]

    @cached_property
    def _where(self) -> torch.Tensor:
        """int64 [k·R]: where each row stands among all pieces' rows."""
        where, first = torch.empty(self.copies * self.num_nodes, dtype=torch.int64), 0
        for rows, size, padded in zip(self._rows, self.sizes, self.padded):
            for c in range(self.copies):
                where[rows[c * padded : c * padded + size]] = first + c * padded + torch.arange(size)
            first += self.copies * padded
        return where

    def _on(self, device: torch.device, number: int | None) -> torch.Tensor:
        """The rows of a piece, or for None `_where`, on a device: moved there once."""
        if (device, number) not in self._moved:
            self._moved[device, number] = (self._where if number is None else self._rows[number]).to(device)
        return self._moved[device, number]

    def cut(self, number: int, given: dict, rules: dict[str, str]) -> dict:
        """The arguments of one piece, from those of all k·R rows."""
        if self.whole:
            return given
        rows = self._rows[number]

        def apply(key, value, how, mask):
            if torch.is_tensor(value):
                return value.index_select(0, self._on(value.device, number))
            return like(value, (value[i] for i in rows))

        return map_rows(given, self.num_nodes * self.copies, rules, apply)

    def join(self, outputs: list[Any], row_lists: bool) -> Any:
        """The pieces' outputs as one of k·R rows."""
        if self.whole:
            return outputs[0]

        def apply(parts):
            if torch.is_tensor(parts[0]):
                return torch.cat(list(parts)).index_select(0, self._on(parts[0].device, None))
            joined = [row for part in parts for row in part]
            return [joined[i] for i in self._where]

        return map_outputs(outputs, apply, row_lists)


class Launcher:
    """Runs the rows of a denoiser call in pieces of at most `max_rows` rows, and halves that when memory runs out.

    Args:
        max_rows: the most rows (guidance copies counted) at once; None: no limit until memory runs out.
        rules: argument name → how its rows become one; says which arguments have rows.

    Attributes:
        launches: denoiser calls made.
    """

    def __init__(self, max_rows: int | None, rules: dict[str, str]):
        self.max_rows, self.launches, self._rules, self._halved = max_rows, 0, rules, False
        self._pieces: dict[tuple, Pieces] = {}

    def __call__(
        self,
        call: Callable[[dict], Any],
        given: dict,
        num_nodes: int,
        copies: int,
        pad_to: int = 0,
        row_lists: bool = False,
    ) -> Any:
        """The denoiser's output of k·R rows.

        Args:
            call: the denoiser, from the arguments of a piece.
            given: argument name → value, of all k·R rows.
            num_nodes: R.
            copies: k, rows of a node that stay in one piece.
            pad_to: ask the denoiser for few different row counts (see `Pieces`), of this many nodes at most; 0: for those there are.
            row_lists: the denoiser takes and gives a list of rows.
        """
        while True:
            key = num_nodes, copies, self._most_nodes(max(num_nodes, pad_to), copies), pad_to > 0
            if key not in self._pieces:
                self._pieces[key] = Pieces(*key)
            pieces = self._pieces[key]
            outputs: list[Any] = []
            try:
                for number in range(len(pieces.sizes)):
                    outputs.append(call(pieces.cut(number, given, self._rules)))
                    self.launches += 1
                return pieces.join(outputs, row_lists)
            except torch.OutOfMemoryError:
                if max(pieces.sizes) == 1:
                    raise
                outputs.clear()
            self._halve(max(pieces.sizes), copies)  # outside the handler: the failed call's tensors are free by now

    def count(self, num_nodes: int, copies: int) -> int:
        """In how many pieces so many nodes go through."""
        return -(-num_nodes // self._most_nodes(num_nodes, copies))

    def _most_nodes(self, num_nodes: int, copies: int) -> int:
        if self.max_rows is None:
            return num_nodes
        if self.max_rows < copies and self._halved:
            return 1  # another denoiser, of fewer copies, ran out of memory
        if self.max_rows < copies:
            raise ValueError(f"max_rows must be at least {copies}, the rows of one picture with its guidance copies, got {self.max_rows}")
        return min(num_nodes, self.max_rows // copies)

    def _halve(self, nodes: int, copies: int) -> None:
        self.max_rows, self._halved = max(1, nodes // 2) * copies, True
        logger.warning(f"out of memory with {nodes * copies} rows at once: going on with max_rows={self.max_rows}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def bucket(size: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, …: the row counts that a statically compiled denoiser is asked for."""
    power = 1 << max(size - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def is_static(module: torch.nn.Module, compiled: Any) -> bool:
    """Whether the module was compiled with `dynamic=False`: then every new row count is a new graph."""
    cells = [cell.cell_contents for cell in getattr(compiled, "__closure__", None) or ()]  # where Module.compile has its context
    return any(getattr(context, "_dynamic", None) is False for context in (module.__dict__.get("dynamo_ctx"), *cells))
