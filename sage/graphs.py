"""CUDA graphs for the native loop: one graph per row count, captured once and replayed at every call.

A small denoiser is hundreds of launches that the host can hardly send as fast as the GPU runs them. A graph is one. Between
two replays there is one more, `branch_step`, which writes into the input of the next replay, so that the host only enqueues:
it waits for nothing, allocates nothing and copies nothing.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sage_kernels import BranchStepOut, CoefficientTable

_CLOCK_CALLS = 1024  # timesteps a clock holds at least: runs of different lengths then share their graphs


class CapturedDenoiser:
    """A denoiser whose calls inside `sage.sample` are captured as CUDA graphs and kept from run to run.

        captured = sage.CapturedDenoiser(denoise)          # a server keeps this
        x = sage.sample(captured, plan, table, x_init, conditions)

    A graph is captured for every number of rows, together with the shapes, dtypes and device of the inputs, and serves every
    later run that has it, whatever its plan, prompts, solver or number of steps.

    Args:
        denoise: as for `sage.sample`. **Must compute its output on the GPU from its inputs alone**: what it does in Python
            happens at the capture only (a counter, a branch on a value, another adapter switched on later have no effect on a
            replay), its weights must stay where they are (changing them in place is fine), and it must not wait for the GPU
            (`.item()`, `.cpu()`, `torch.tensor(...)`, which copies from the host).

    Attributes:
        denoise: the denoiser itself, for a loop without graphs.
        refusal: None, or why it cannot be captured; then a RuntimeWarning has said so and every run goes on without graphs.

    Notes:
        A shape that is new costs six denoiser calls before the run starts: warm-up, capture, and a comparison of a replay with
        the denoiser on other inputs, which finds most of what must not be captured. During a capture no other thread
        should use the GPU: for one call torch reports any synchronisation in the process as an error. One run at a time: the
        graphs share their memory. They are freed with this object.
    """

    def __init__(self, denoise: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]):
        self.denoise = denoise
        self.refusal: str | None = None
        self._graphs: dict[tuple, _Graph] = {}
        self._device = self._recorder = self._clock = None
        self._in_use = threading.Lock()

    @property
    def num_graphs(self) -> int:
        """How many graphs have been captured and are kept."""
        return len(self._graphs)

    def check(self, device: torch.device) -> None:
        """Refuse what graphs cannot do: latents on `device` that is not CUDA or not theirs, a gradient."""
        if device.type not in RECORDERS:
            raise ValueError(
                f"graphs need x_init and the denoiser on a CUDA device, got x_init on {device}; move both, or sample without "
                "graphs (graphs=False, and the denoiser itself rather than a CapturedDenoiser)"
            )
        if self._device not in (None, device):
            raise ValueError(f"denoise has graphs on {self._device}, got x_init on {device}; use a CapturedDenoiser per device")
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "graphs record no gradient and gradients are enabled; call sage.sample under torch.no_grad() or "
                "torch.inference_mode(), or with graphs=False"
            )

    @contextlib.contextmanager
    def run(self, eager, x: torch.Tensor, model_input: torch.Tensor, rows: list[int], table: CoefficientTable) -> Iterator:
        """The denoiser calls of one run of `sage.sample`: replays, or `eager` after a refusal.

        Args:
            eager: the same calls without graphs; its `timesteps` [S] and `condition_rows(s)` are this run's.
            x: [R_0, ...] the first state.
            model_input: [k·R_0, ...] the first model input.
            rows: [S] R_{s+1}, the rows that the state has after each call.
            table: says what the solver keeps from call to call.
        """
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("CapturedDenoiser: another run is using its memory; give each thread and each nested run its own")
        try:
            replays = None
            if self.refusal is None:
                try:
                    replays = self._replays(eager, x, model_input, rows, table)
                except _Refused as refused:
                    self._refuse(str(refused))
            yield replays or eager
        finally:
            self._in_use.release()

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        self._graphs.clear()
        self._recorder = self._clock = None
        warnings.warn(
            f"sage.sample: the denoiser cannot be captured as a CUDA graph: {reason}. The loop runs without graphs, with the same "
            "result",
            RuntimeWarning,
            stacklevel=5,  # sage.sample's caller: contextlib and sage.sample lie between
        )

    def _replays(self, eager, x, model_input, rows, table) -> _Replays:
        if self._recorder is None:
            self._device, self._recorder = x.device, RECORDERS[x.device.type](x.device)
        self._recorder.follow()
        self._set_clock(eager.timesteps)
        copies, graph, graphs, dtype = len(model_input) // len(x), None, [], model_input.dtype
        for s, count in enumerate((len(x), *rows[:-1])):
            shape = (copies * count, *x.shape[1:])
            if graph is None or (graph.model_input.shape, graph.model_input.dtype) != (shape, dtype):
                some = torch.arange(shape[0], device=x.device) % len(model_input)
                example = model_input.index_select(0, some).to(dtype)  # plausible latents to warm up with
                graph = self._graph(example, eager.condition_rows(s), len(eager.timesteps))
                graph.load(eager.condition_rows(s))
            graphs.append(graph)
            dtype = graph.output.dtype  # a model input has the dtype of the output before it
        self._clock.seek(0)
        return _Replays(graphs, _outputs(x, rows, [g.model_input for g in graphs[1:]], table))

    def _set_clock(self, timesteps: torch.Tensor) -> None:
        if self._clock is None or len(timesteps) > len(self._clock.timesteps):
            self._graphs.clear()  # they read the clock of their capture
            self._clock = _Clock(max(len(timesteps), _CLOCK_CALLS), timesteps.device)
        self._clock.timesteps[: len(timesteps)].copy_(timesteps)

    def _graph(self, model_input: torch.Tensor, condition_rows: Any, calls: int) -> _Graph:
        kind = model_input.device.type
        inputs = {"model_input": model_input, **{f"condition {name}": t for name, t in _named(condition_rows).items()}}
        shapes = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in sorted(inputs.items()))
        key = (shapes, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind))
        if key not in self._graphs:
            with _no_autocast_cache():
                self._graphs[key] = self._capture(model_input, condition_rows, calls)
        return self._graphs[key]

    def _capture(self, model_input: torch.Tensor, condition_rows: Any, calls: int) -> _Graph:
        graph = _Graph(model_input, condition_rows)

        def call() -> torch.Tensor:
            return _own(self.denoise(graph.model_input, self._clock.next(), graph.condition_rows), graph)

        self._clock.seek(0)
        self._recorder.warm_up(call)  # an error here is the denoiser's own and reaches the caller, as it would without graphs
        try:
            graph.replay, graph.output = self._recorder.capture(call)
            self._compare(graph, calls - 1)
        except _Refused:
            raise
        except Exception as error:  # whatever a denoiser may do that a capture does not allow
            first_line = str(error).strip().partition("\n")[0]
            raise _Refused(f"{type(error).__name__}: {first_line}") from None
        return graph

    def _compare(self, graph: _Graph, call: int) -> None:
        """Refuse a graph that is not the denoiser on inputs other than those of its capture."""
        graph.model_input.mul_(0.5)
        graph.load({name: value.flip(0) for name, value in graph.conditions.items()})
        fresh = _Graph(graph.model_input, graph.condition_rows)
        self._clock.seek(call)
        graph.replay()
        wanted = self.denoise(fresh.model_input, self._clock.timesteps[call].clone(), fresh.condition_rows)
        # Half of the digits that the model computes with; a float32 model may compute in TF32, which has 10 bits.
        tolerance = max(torch.finfo(wanted.dtype).eps, 2.0**-10) ** 0.5
        got, wanted = graph.output.float(), wanted.float()
        scale = torch.nan_to_num(wanted, posinf=0.0, neginf=0.0).abs().max().item()
        if not torch.allclose(got, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            worst = (got - wanted).abs().max().item()
            raise _Refused(f"a replay differs from the denoiser by {worst:.3g}, so its output depends on more than its inputs")


class _Refused(Exception):
    """The denoiser cannot be captured; the message says why."""


class _Clock:
    """The timestep of the next call, on the device: a graph reads it and moves on, and the host sends nothing."""

    def __init__(self, calls: int, device: torch.device):
        with torch.inference_mode(False):
            self.timesteps = torch.zeros(calls, dtype=torch.float32, device=device)
            self._cursor = torch.zeros(1, dtype=torch.int64, device=device)

    def seek(self, call: int) -> None:
        self._cursor.fill_(call)

    def next(self) -> torch.Tensor:
        timestep = self.timesteps.index_select(0, self._cursor).view(())
        self._cursor.add_(1)
        return timestep


class _Graph:
    """One captured denoiser call on memory that never moves: `replay()` computes `output` from the inputs and the clock."""

    replay: Callable[[], None]
    output: torch.Tensor  # [k·R, ...], contiguous; the next replay of any graph overwrites it

    def __init__(self, model_input: torch.Tensor, condition_rows: Any):
        with torch.inference_mode(False):  # an inference tensor could not be written in a later run outside that mode
            self.model_input = model_input.detach().clone(memory_format=torch.contiguous_format)
            self.conditions = {name: value.detach().clone() for name, value in _named(condition_rows).items()}
        self.condition_rows = self.conditions if isinstance(condition_rows, Mapping) else self.conditions[""]

    def load(self, condition_rows: Any) -> None:
        for name, value in _named(condition_rows).items():
            self.conditions[name].copy_(value)


class _Replays:
    """The denoiser calls of one run, as replays."""

    def __init__(self, graphs: list[_Graph], outputs: list[BranchStepOut]):
        self._graphs, self._outputs = graphs, outputs

    def __call__(self, s: int, model_input: torch.Tensor) -> torch.Tensor:
        graph = self._graphs[s]
        if model_input is not graph.model_input:  # the first; the others are written in place
            graph.model_input.copy_(model_input)
        graph.replay()
        return graph.output

    def out(self, s: int) -> BranchStepOut:
        return self._outputs[s]


def _outputs(x, rows: list[int], model_inputs: list[torch.Tensor], table: CoefficientTable) -> list[BranchStepOut]:
    """For every call the memory that `branch_step` writes: the next call's model input, and buffers used in turn.

    What is written at call s must not be an input of it. The state and the corrected sample are read by one more call, so two
    buffers alternate; a stored `denoised` is read by `history` more. Buffers of other row counts are others.
    """
    memory: dict[tuple, torch.Tensor] = {}

    def buffer(name: str, s: int, turns: int) -> torch.Tensor:
        key = (name, rows[s], s % turns)
        if key not in memory:
            memory[key] = x.new_empty((rows[s], *x.shape[1:]))
        return memory[key]

    return [
        BranchStepOut(
            buffer("sample", s, 2),
            buffer("denoised", s, table.history + 1) if table.history else None,
            buffer("corrected", s, 2) if table.corrector else None,
            following,
        )
        for s, following in enumerate((*model_inputs, None))
    ]


def _own(output: torch.Tensor, graph: _Graph) -> torch.Tensor:
    """`output`, dense and in memory that is no input's: `branch_step` reads it while it writes the next model input."""
    if not torch.is_tensor(output):
        raise TypeError(f"denoise must return a tensor, got {type(output).__name__}; return the tensor in it (.sample)")
    inputs = (graph.model_input, *graph.conditions.values())
    shared = output.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in inputs}
    return output.clone(memory_format=torch.contiguous_format) if shared else output.contiguous()


def _named(condition_rows: Any) -> dict[str, torch.Tensor]:
    return dict(condition_rows) if isinstance(condition_rows, Mapping) else {"": condition_rows}


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast frees the weights that it has cast when its context ends, and a graph would go on reading them."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


class CudaGraphs:
    """Captures functions on one device, in one memory pool; all that this package knows of torch's graph API."""

    def __init__(self, device: torch.device):
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._last = torch.cuda.current_stream(device)

    def follow(self) -> None:
        """Order what is enqueued from here on after everything the run before enqueued, on whichever stream."""
        here = torch.cuda.current_stream(self.device)
        if here != self._last:
            here.wait_stream(self._last)
        self._last = here

    def warm_up(self, call: Callable[[], torch.Tensor]) -> None:
        """Let libraries choose their algorithms and load their kernels, away from the stream that is in use."""
        with self._aside():
            call()
            call()

    def capture(self, call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """The replay of `call`, and the tensor that it writes."""
        self._rehearse(call)
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": an allocation of another thread does not break the capture. The outer context gives the
            # caller's stream back where the inner one fails while it ends.
            with torch.cuda.stream(self.stream), self._recording(graph, self.pool):
                output = call()
        except BaseException as error:
            self._mend()
            raise error.__context__ or error from None  # that the capture broke says less than what broke it
        return graph.replay, output

    def _rehearse(self, call: Callable[[], torch.Tensor]) -> None:
        """Raise where `call` waits for the device: in a capture that would break torch's state as well, see `_mend`."""
        before = torch.cuda.get_sync_debug_mode()
        with self._aside():
            with warnings.catch_warnings():  # torch says once that this mode does not see every synchronisation
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode(before)

    def _mend(self) -> None:
        """After a capture that broke, torch's allocator still records into the pool, and some versions' random generators
        believe that they are captured until a capture ends well."""
        with contextlib.suppress(Exception):  # the allocator has nothing to end where only the denoiser raised
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        with contextlib.suppress(Exception), torch.cuda.stream(self.stream):
            with self._recording(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()):
                torch.zeros(1, device=self.device)

    def _recording(self, graph, pool):
        return torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            here.wait_stream(self.stream)


# Device type → what captures there.
RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaGraphs}
