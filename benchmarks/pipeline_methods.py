"""Ways to draw the pictures of one plan, each as one call that can be timed: stock loop, hook, native loop, and what speeds them up.

All pictures are grouped, in groups of one size. Sharing methods draw all pictures in one call and give the denoiser at most as many
rows at once as the stock loop's calls do, so that a row costs both the same if sharing costs nothing.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import synchronize

import sage
from sage.native import draw as draw_natively
from sage.plan import Leaf, Node, SharingPlan

TREE = (0.2, 0.4)  # until when the halves of a group share a row, and until when each of them does
STEADY = 1.05  # the most seconds per denoiser row, the stock loop's being 1, at which seconds follow the rows


@dataclass(frozen=True)
class Method:
    """One way to draw the pictures.

    Attributes:
        engine: "stock" (the pipeline's own call), "hook" (the same inside `sage.enable`) or "native" (`sage.native.draw`).
        share: fraction of the calls that a group is one row; None: a tree, in which it parts in two steps.
        group: pictures in a group.
        compiled: with `torch.compile` of the denoiser.
        cached: with diffusers' First Block Cache, in calls of as few pictures as fill the denoiser: it takes no pieces.
        graphs: the native loop replays CUDA graphs.
    """

    name: str
    engine: str
    share: float | None = 0.0
    group: int = 1
    compiled: bool = False
    cached: bool = False
    graphs: bool = False

    @property
    def kind(self) -> str:
        """What `--only` chooses it by."""
        kinds = {"graphs": self.graphs, "compiled": self.compiled, "cached": self.beside_cached, "tree": self.share is None}
        plain = {"stock": "stock", "native": "native", "hook": "shared"}[self.engine]
        return next((kind for kind, is_so in kinds.items() if is_so), plain)

    @property
    def baseline(self) -> str:
        """The method whose seconds and rows its own are compared with."""
        return "stock, compiled" if self.compiled else "stock, beside the cached" if self.beside_cached else "stock"

    @property
    def beside_cached(self) -> bool:
        """Timed apart from the others: turning a cache on and off gives a compiled denoiser new graphs."""
        return self.cached or self.name == "stock, beside the cached"

    def plan(self, leaves: list[Leaf]) -> SharingPlan:
        groups = [tuple(range(first, min(first + self.group, len(leaves)))) for first in range(0, len(leaves), self.group)]
        if self.share is not None:
            return SharingPlan.flat(leaves, groups, self.share)
        return SharingPlan.tree(leaves, [_tree(group) for group in groups])


def _tree(group: tuple[int, ...]) -> Node:
    """All as one row, then each half, then every picture alone."""
    middle = len(group) // 2
    halves = [_flat(half, TREE[1]) for half in (group[:middle], group[middle:])]
    return Node(group, group[0], TREE[0], tuple(halves))


def _flat(group: tuple[int, ...], until: float) -> Node:
    return Node(group, group[0], until, tuple(map(Node.single, group))) if len(group) > 1 else Node.single(group[0])


def methods(shares: list[float], groups: list[int], only: list[str] | None = None) -> list[Method]:
    """All methods, the more telling ones first, since time may run out.

    Args:
        only: kinds beside "stock" that are wanted; None: all.
    """
    small, large, middle = min(groups), max(groups), shares[len(shares) // 2]
    found = [
        Method("stock", "stock"),
        Method(f"{small}s, share {middle:g}", "hook", middle, small),
        Method(f"{small}s, share {middle:g}, native", "native", middle, small),
        *[Method(f"{group}s, share {share:g}", "hook", share, group) for share in shares for group in groups],
        Method(f"{large}s, tree", "hook", None, large),
        Method("enabled, share 0", "hook"),
        Method("stock, compiled", "stock", compiled=True),
        Method(f"{small}s, share {middle:g}, compiled", "hook", middle, small, compiled=True),
        Method(f"{small}s, share {middle:g}, native, compiled", "native", middle, small, compiled=True),
        Method(f"{large}s, tree, native", "native", None, large),
        Method(f"{small}s, share {middle:g}, native, graphs", "native", middle, small, graphs=True),
        Method("stock, beside the cached", "stock"),
        Method("share 0, cached", "hook", 0.0, small, cached=True),
        Method(f"{small}s, share {middle:g}, cached", "hook", middle, small, cached=True),
    ]
    return list(dict.fromkeys(method for method in found if only is None or method.kind in ("stock", *only)))


class Job:
    """A pipeline, the conditions of its pictures, and the settings that all methods have in common.

    Args:
        conditions: argument of the pipeline's call → [P, ...].
        options: the call's other arguments.
        order: what `pipe.encode_prompt` returns, by argument of the call.
        copies, together: guidance copies of a picture, and how many of them are in one denoiser call.
    """

    def __init__(self, pipe, conditions: dict, options: dict, order: tuple[str, ...], copies: int, together: int, device: torch.device):
        self.pipe, self.conditions, self.options, self.order = pipe, conditions, options, order
        self.copies, self.together, self.device = copies, together, device
        self.denoiser = getattr(pipe, "unet", None) or pipe.transformer
        self.batch = 1  # pictures that fill the denoiser
        self.cache = None  # the config that cached methods turn on
        self._compiled: dict[torch.nn.Module, Any] = {}  # part → its compiled call

    @property
    def max_rows(self) -> int:
        return self.batch * self.together

    def compile(self, whole: bool, **options) -> None:
        """Prepare the compiled methods: the denoiser, or only its repeated blocks, are compiled when the first of them runs."""
        blocks = getattr(self.denoiser, "_repeated_blocks", None) or ()
        parts = [part for part in self.denoiser.modules() if type(part).__name__ in blocks] if not whole else []
        for part in parts or [self.denoiser]:
            part.compile(**options)
            self._compiled[part], part._compiled_call_impl = part._compiled_call_impl, None

    @contextlib.contextmanager
    def set_up(self, method: Method) -> Iterator[None]:
        """What a method turns on beside its engine, for a `with` block."""
        for part, call in self._compiled.items() if method.compiled else ():
            part._compiled_call_impl = call
        if method.cached:
            self.denoiser.enable_cache(self.cache)
        try:
            yield
        finally:
            for part in self._compiled:
                part._compiled_call_impl = None
            if method.cached:
                self.denoiser.disable_cache()

    def run(self, method: Method, pictures: int, steps: int) -> dict[str, Any]:
        """Draw the pictures. Returns what it took: "seconds", "nfe", "denoiser_rows", "launches", "cache", "finite".

        Raises:
            AssertionError: the rows are not those of the plan.
        """
        each = self.batch if method.engine == "stock" else max(self.batch, method.group) if method.cached else pictures
        calls = [range(first, min(first + each, pictures)) for first in range(0, pictures, each)]
        with self.set_up(method), torch.no_grad():
            synchronize(self.device)
            start = time.perf_counter()
            done = [self._call(method, call, steps) for call in calls]
            synchronize(self.device)
            seconds = time.perf_counter() - start
        counted = {key: sum(stats[key] for _, stats in done) for key in ("nfe", "denoiser_rows", "launches")}
        finite = all(bool(torch.isfinite(latents).all()) for latents, _ in done)
        return {"seconds": seconds, **counted, "cache": done[0][1].get("cache"), "finite": finite}

    def _call(self, method: Method, pictures: range, steps: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Latents and statistics of one call."""
        leaves = [Leaf(f"picture {i}") for i in pictures]
        generators = [torch.Generator(self.device).manual_seed(i) for i in pictures]
        conditions = {name: value[pictures.start : pictures.stop] for name, value in self.conditions.items()}
        options = {**self.options, "num_inference_steps": steps, "output_type": "latent"}
        plan = method.plan(leaves)
        if method.engine == "stock":
            latents = self.pipe(**conditions, **options, generator=generators)[0]
            calls = self.pipe._num_timesteps
            rows = len(leaves) * calls
            return latents, {"nfe": rows, "denoiser_rows": rows * self.copies, "launches": calls * self.copies // self.together}
        if method.engine == "native":
            latents, stats = self._natively(plan, conditions, options, generators, method.graphs)
        else:
            with sage.enable(self.pipe, plan, max_rows=None if method.cached else self.max_rows) as sharing:
                latents = self.pipe(**conditions, **options, generator=generators)[0]
            stats = sharing.stats
        promised = plan.cost(stats["num_calls"]).nfe
        assert stats["boundaries"] or stats["nfe"] == promised, f"{method.name}: {stats['nfe']} rows, the plan says {promised}"
        return latents, stats

    def _natively(self, plan, conditions: dict, options: dict, generators: list, graphs: bool):
        """`sage.native.draw` with the conditions in place of encoded texts: it encodes prompts itself."""
        tokens = conditions["prompt_embeds"]
        known = conditions | {"text_ids": torch.zeros(tokens.shape[1], 3).to(tokens)}
        self.pipe.encode_prompt = lambda *args, **kwargs: tuple(known[name] for name in self.order)
        prompts = [leaf.prompt for leaf in plan.leaves]
        negatives = prompts if "negative_prompt_embeds" in known else None
        try:
            pictures, stats, _ = draw_natively(
                self.pipe, plan, prompts, negatives, generators, max_rows=self.max_rows, graphs=graphs, **options
            )
        finally:
            del self.pipe.encode_prompt
        return pictures, stats
