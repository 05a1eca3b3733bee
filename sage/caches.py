"""The caches of diffusers under sharing: what they remember of a group goes along when its members part.

A cache (`pipe.transformer.enable_cache(...)`) skips blocks or attention layers and uses what they gave at an earlier call instead.
Its hooks hold tensors with a row per denoiser row, most of them for each context that the pipeline names ("cond", "uncond"). Where
rows multiply, every new row begins with its parent's: a member goes on from what its group had cached, as it does from its latents.

Whether to skip is the cache's own decision: First Block Cache and SeaCache decide by all rows of a call together, shared or not.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sage.denoiser import Interception, Launcher, denoisers_of
from sage.rows import Rows

_DISABLED = "disable the cache (pipe.transformer.disable_cache())"
_DISABLE = f"{_DISABLED}, or share nothing"


@dataclass(frozen=True)
class Parting:
    """The way from the nodes of one denoiser call to those of a later one.

    Args:
        parent: int64 [R_new], the old node that holds each new one.
        num_nodes: R_old.
        copies: c, guidance copies that a state has rows of.
        holder: the state's class, for errors.
    """

    parent: torch.Tensor
    num_nodes: int
    copies: int
    holder: str

    @classmethod
    def between(cls, old: Rows, new: Rows, copies: int, holder: str = "") -> Parting:
        """From one partition to another, however many calls lie between."""
        return cls(old.labels[new.representatives], old.num_nodes, copies, holder)

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 [c·R_new]: the old row of each new one."""
        return torch.cat([self.parent + copy * self.num_nodes for copy in range(self.copies)])

    def rows(self, value: Any) -> Any:
        """Tensors [c·R_old·m, ...] → [c·R_new·m, ...], in any nesting; a picture's m rows (frames, say) stand together."""
        if isinstance(value, Mapping):
            return type(value)((key, self.rows(item)) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return type(value)(self.rows(item) for item in value)
        if not torch.is_tensor(value):
            return value
        size = self._of_each(len(value))
        return value.unflatten(0, (-1, size)).index_select(0, self.index.to(value.device)).flatten(0, 1)

    def spectra(self, value: torch.Tensor) -> torch.Tensor:
        """`rows` of spectra that FasterCache has shifted, along the rows too."""
        if not _shifts_rows():
            return self.rows(value)
        return torch.fft.fftshift(self.rows(torch.fft.ifftshift(value, dim=0)), dim=0)

    def row_list(self, value: list) -> list:
        """A list of c·R_old·m rows → c·R_new·m."""
        size = self._of_each(len(value))
        return [value[int(i) * size + j] for i in self.index for j in range(size)]

    def count(self, value: int) -> int:
        """A number of rows."""
        return value // self.num_nodes * len(self.parent)

    def shapes(self, value: tuple[torch.Size, ...]) -> tuple[torch.Size, ...]:
        """Shapes of tensors whose first dimension is rows."""
        return tuple(torch.Size([self.count(shape[0]), *shape[1:]]) for shape in value)

    def _of_each(self, rows: int) -> int:
        """m: how many of so many rows are one node's."""
        each, rest = divmod(rows, self.copies * self.num_nodes)
        if rest or not each:
            raise ValueError(
                f"{self.holder} has {rows} rows where the denoiser ran {self.copies * self.num_nodes}: sage cannot tell which picture "
                f"they belong to; {_DISABLE}"
            )
        return each


# State class → what in it has rows, and how that goes along. Nothing else in a state is touched.
STATES: dict[str, dict[str, Callable]] = {
    "FBCSharedBlockState": dict.fromkeys(["head_block_output", "head_block_residual", "tail_block_residuals"], Parting.rows),
    "MagCacheState": dict.fromkeys(["previous_residual", "head_block_input"], Parting.rows),
    "PyramidAttentionBroadcastState": {"cache": Parting.rows},
    "TaylorSeerState": {"taylor_factors": Parting.rows, "inactive_shapes": Parting.shapes},
    "FasterCacheDenoiserState": dict.fromkeys(["low_frequency_delta", "high_frequency_delta"], Parting.spectra),
    "FasterCacheBlockState": {"cache": Parting.rows, "batch_size": Parting.count},
    "SeaCacheContextState": {"history": Parting.rows, "previous_indicator": Parting.row_list},
}

# Hook class → its cache, for the hooks that stand in front of a block or layer and may skip it.
SKIPPING = {
    **dict.fromkeys(["FBCHeadBlockHook", "FBCBlockHook"], "FirstBlockCache"),
    **dict.fromkeys(["MagCacheHeadHook", "MagCacheBlockHook"], "MagCache"),
    **dict.fromkeys(["SeaCacheLeaderBlockHook", "SeaCacheBlockHook"], "SeaCache"),
    "PyramidAttentionBroadcastHook": "PyramidAttentionBroadcast",
    "TaylorSeerCacheHook": "TaylorSeerCache",
    "FasterCacheBlockHook": "FasterCache",
}
COUNTED = (*SKIPPING, "FasterCacheDenoiserHook")  # the latter leaves unconditional rows out of some calls


class Caches:
    """The caches of one pipeline call's denoisers: carries their states along and counts what they computed."""

    def __init__(self):
        self._hooks: dict[int, list] = {}  # id of the denoiser → the hooks of caches in it
        # (id of the denoiser, context or None for any) → partition and guidance copies at the last call
        self._last: dict[tuple[int, str | None], tuple[Rows, int]] = {}
        self._counted: list = []  # hooks whose `fn_ref` counts
        self._names: dict[str, None] = {}
        self._under_way = self._computed = self._possible = 0
        self._compiled = False

    @contextlib.contextmanager
    def installed(self, modules: list[torch.nn.Module]) -> Iterator[None]:
        """Caches begin the `with` block empty and end it empty, so that a call that broke off leaves no rows to the next."""
        self._hooks = {id(module): _hooks_in([module]) for module in modules}
        self._reset()
        try:
            yield
        finally:
            for hook in self._counted:
                hook.fn_ref = hook.fn_ref.fn_ref
            self._reset()

    def carry(self, module: torch.nn.Module, rows: Rows, copies: int, shares: bool) -> None:
        """Before a denoiser is called: bring what its caches remember to the rows of this call.

        Args:
            rows, copies: what the call computes.
            shares: whether the plan shares at all; if not, caches are left alone.

        Raises:
            ValueError: a cache that sage does not know how to carry along, or cannot.
        """
        hooks = self._hooks[id(module)]
        if not hooks:
            return
        last = self._last.get((id(module), None), (None, copies))
        if last[0] is not rows:  # the first call, or groups have parted
            self._look(module, hooks, shares)
        for state, context, halves in _states(hooks) if shares else ():
            self._carry_state(state, *self._last.get((id(module), context), last), rows, copies, halves)
        for context in {None, *(context for hook in hooks for _, _, context in _held(hook))}:
            self._last[id(module), context] = rows, copies
        self._under_way = copies * rows.num_nodes
        self._possible += self._under_way * sum(type(hook).__name__ in SKIPPING for hook in hooks)

    def _carry_state(self, state: Any, old: Rows | None, old_copies: int, rows: Rows, copies: int, halves: bool) -> None:
        name = type(state).__name__
        values = {attribute: vars(state)[attribute] for attribute in STATES[name] if vars(state)[attribute] is not None}
        if halves and copies != 2:
            raise ValueError(
                f"FasterCache takes half of the denoiser's rows for unconditional ones, so the pipeline must call it with 2 guidance "
                f"copies of each picture, got {copies}; pass FasterCacheConfig(is_guidance_distilled=True), or {_DISABLE}"
            )
        if old_copies != copies and any(len(value) for value in values.values() if hasattr(value, "__len__")):
            raise ValueError(
                f"guidance copies must stay {old_copies}, whose rows {name} holds, got a denoiser call with {copies}; {_DISABLE}"
            )
        if old is None or old is rows:
            return
        parting = Parting.between(old, rows, 1 if halves else copies, name)
        for attribute, value in values.items():
            setattr(state, attribute, STATES[name][attribute](parting, value))

    def _look(self, module: torch.nn.Module, hooks: list, shares: bool) -> None:
        self._compiled = self._compiled or any(map(_is_compiled, module.modules()))
        for hook in hooks:
            name = type(hook).__name__
            if shares and not _is_known(hook):
                raise ValueError(
                    f"the denoiser has a hook {name} that remembers something from call to call, and sage does not know what of it goes "
                    f"along when a group parts (it knows {', '.join(STATES)}); {_DISABLE}"
                )
            if name in SKIPPING:
                self._names[SKIPPING[name]] = None
            if name in COUNTED and not self._compiled and not isinstance(hook.fn_ref, _Counting):  # in a graph it would not count
                hook.fn_ref = _Counting(hook.fn_ref, self._computes if name in SKIPPING else self._goes_on)
                self._counted.append(hook)

    def _computes(self, args: tuple, kwargs: dict) -> None:
        """A block or layer is really computed."""
        self._computed += self._under_way

    def _goes_on(self, args: tuple, kwargs: dict) -> None:
        """The denoiser goes on with these arguments, of fewer rows perhaps than it was called with."""
        self._under_way = next(len(value) for value in (*args, *kwargs.values()) if torch.is_tensor(value) and value.ndim > 1)

    def _reset(self) -> None:
        for hook in itertools.chain.from_iterable(self._hooks.values()):
            if hook._is_stateful and _is_known(hook):
                hook.reset_state(None)

    def hold(self, module: torch.nn.Module) -> bool:
        """Whether the denoiser has a cache."""
        return bool(self._hooks[id(module)])

    @staticmethod
    def launch(launcher: Launcher, call: Callable[[dict], Any], given: dict, rows: int) -> Any:
        """What a denoiser with a cache gives for `rows` rows: in one piece, because several would write into one state.

        Raises:
            ValueError: more rows than `launcher.max_rows`. torch.OutOfMemoryError: says why fewer rows are not tried.
        """
        if launcher.max_rows is not None and launcher.max_rows < rows:
            raise ValueError(
                f"max_rows must be at least {rows}, the rows of this call, while the denoiser has a cache, got {launcher.max_rows}: it "
                f"would mix up the rows of several pieces; raise max_rows to the guidance copies times the pictures, or {_DISABLED}"
            )
        try:
            output = call(given)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{error}\n{rows} rows do not fit, and the denoiser has a cache, which would mix up the rows of several pieces; "
                f"ask for fewer pictures per call, or {_DISABLED}"
            ) from error
        launcher.launches += 1
        return output

    def stats(self) -> dict[str, Any] | None:
        """None without a cache; else its `name`, and `computed`: the fraction that was run of the blocks (or layers) that it may
        skip, counted in rows; None where the denoiser is compiled, and nothing is counted.

        Those blocks run (1 − saving) · computed of the rows of independent, uncached sampling.
        """
        if not self._names:
            return None
        return {"name": " + ".join(self._names), "computed": None if self._compiled else self._computed / self._possible}


class _Counting:
    """In place of a hook's `fn_ref`: says when the hook calls what it stands in front of."""

    def __init__(self, fn_ref: Any, on_call: Callable[[tuple, dict], None]):
        self.fn_ref, self._on_call = fn_ref, on_call

    def original_forward(self, *args, **kwargs):
        self._on_call(args, kwargs)
        return self.fn_ref.original_forward(*args, **kwargs)


def _shifts_rows() -> bool:
    """Whether this version of diffusers shifts FasterCache's spectra along all dimensions, not only height and width."""
    from diffusers.hooks.faster_cache import _split_low_high_freq

    one_of_two = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    return not _split_low_high_freq(one_of_two)[0][0].any()


def cache_hooks(pipe) -> list[str]:
    """Names of the hook classes of caches in the pipeline's denoisers; with any, the rows of a call must stay in one piece."""
    return [type(hook).__name__ for hook in _hooks_in(list(denoisers_of(pipe).values()))]


def _hooks_in(modules: list[torch.nn.Module]) -> list:
    """The hooks of caches in denoisers: all that are stateful, and those that skip by another's state."""
    inside = (vars(part).get("_diffusers_hook") for module in modules for part in module.modules())
    hooks = {id(hook): hook for registry in inside if registry is not None for hook in registry.hooks.values()}
    return [hook for hook in hooks.values() if hook._is_stateful or type(hook).__name__ in SKIPPING]


def _held(hook: Any) -> Iterator[tuple[type, Any, str | None]]:
    """(class, state, context) of the states that a hook would use now; the state is None before its first use."""
    for held in vars(hook).values():
        if hasattr(held, "_state_cache"):  # a StateManager: one state per context
            context = getattr(held, "_context", None) or getattr(held, "_current_context", None)  # the latter in older versions
            name = getattr(context, "name", context)
            yield held._state_cls, held._state_cache.get(name), name
    if hasattr(hook, "state"):
        yield type(hook.state), hook.state, None


def _states(hooks: list) -> list[tuple[Any, str | None, bool]]:
    """(state, context, whether it holds the rows of the conditional copy only), each state once: hooks have some in common."""
    found = {}
    for hook in hooks:
        halves = getattr(hook, "is_guidance_distilled", True) is False  # FasterCache
        found.update({id(state): (state, context, halves) for _, state, context in _held(hook) if state is not None})
    return list(found.values())


def _is_known(hook: Any) -> bool:
    held = [cls.__name__ in STATES for cls, _, _ in _held(hook)]
    return bool(held) and all(held)


def _is_compiled(module: torch.nn.Module) -> bool:
    call = module._compiled_call_impl
    return "_orig_mod" in module._modules or (call.compiled if isinstance(call, Interception) else call) is not None
