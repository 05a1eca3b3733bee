"""What bench_ops.py measures: a solver in the middle of a run, on real latent sizes, and everyone who can do its next step.

A case is (solver, size, dtype, rows, fan-out): `rows` latents come in, every one has `fan_out` children, and what has to be made is
the next state, the value that the solver keeps, and the next model input, doubled for guidance. It holds several copies of its
buffers, so that a caller who goes round them finds no input in a cache that is smaller than all of them.
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import diffusers
import torch

import sage_kernels
from sage.solvers import SOLVERS, noise_dtype, table_for
from sage_kernels import COLUMNS, reference
from sage_kernels.testing import same_bits

SIZES = {"SD": (4, 64, 64), "SDXL": (4, 128, 128), "Flux": (4096, 64), "video": (16, 21, 60, 104)}
# name: (model dtype, state dtype)
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16/fp32": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
ROWS, FAN_OUTS = (1, 8, 32, 256), (1, 4)
SOLVERS_BY_DEFAULT = ("ddim", "dpm++2m", "dpm++2m-sde", "unipc", "flow-euler")
SOLVERS_KNOWN = (*SOLVERS_BY_DEFAULT, "euler", "euler-a", "lcm", "heun", "ddpm", "dpm++3m")
LIMIT_BYTES = {"cpu": 128 * 2**20, "cuda": 3 * 2**30}  # compulsory traffic of a call
GUIDANCE = 7.5
# Largest error against float64, relative to the largest value: a few roundings of the dtype which diffusers computes in.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-5}
CHECKED_AT_ONCE = 2**24  # elements: the reference needs many temporaries of each
BYTES_FORMULA = (
    "read: rows_in * D * (S * (1 + how many of m1, m2, m3 and L the step reads) + 2 M); "
    "written: rows_out * D * (S * (1 + whether m0 is kept + whether xc is) + 2 M); "
    "D elements of a row, S and M bytes of a state and of a model element; children read their parent once"
)


class Key(NamedTuple):
    """Names a case."""

    solver: str
    size: str
    dtype: str
    rows: int
    fan_out: int

    def label(self):
        return f"{self.solver} {self.size} {self.dtype} {self.rows}→{self.rows * self.fan_out}"


class WrongResult(AssertionError):
    """A contender computes something else; it is not timed."""


@dataclass
class Buffers:
    """One copy of what a step reads: the state of our op, and diffusers' scheduler at the same point."""

    x: torch.Tensor  # [R_in, *shape]
    outputs: list  # per call [2 * R_in, *shape]: unconditional half, conditional half
    scheduler: object
    history: tuple = ()
    last: torch.Tensor | None = None
    plain: tuple = ()  # source and target of a copy that moves as many bytes


def make_scheduler(solver):
    """diffusers' scheduler, set for eight steps."""
    name, overrides = SOLVERS[solver]
    scheduler = getattr(diffusers, name)(**overrides)
    scheduler.set_timesteps(8)
    scheduler.is_scale_input_called = True  # else the Euler family warns at every step; a pipeline scales before the first
    return scheduler


def timed_calls(solver):
    """(coefficient table, the calls which are timed): one in the middle of a run; of Heun, the two stages of a step."""
    return table_for(make_scheduler(solver)), range(4, 6 if solver == "heun" else 5)


class Case:
    """Every contender is a method, or `CompiledUpdate` of ops_compiled.py: called with one `Buffers`."""

    def __init__(self, key, device):
        self.key, self.device = key, torch.device(device)
        self.shape, (self.model, self.state) = SIZES[key.size], DTYPES[key.dtype]
        scheduler = make_scheduler(key.solver)
        self.table, self.calls = timed_calls(key.solver)
        self.timesteps = scheduler.timesteps  # on the CPU, which spares diffusers a wait for the device
        self.coefficients, self.at = self.table.tensor(self.device), self.calls[0]
        self._vectors(key.rows, key.rows * key.fan_out)
        self.buffers = [self._run_up(scheduler)]

    def _vectors(self, rows, rows_out):
        """Per-row arguments, for a call that keeps the rows and for one that branches."""
        ints = {"dtype": torch.int32, "device": self.device}
        parent = torch.arange(rows_out, **ints) // self.key.fan_out
        self.children = parent.long() if self.key.fan_out > 1 else None
        self.rows = {}
        for i in range(len(self.table)):
            index = parent if i == self.calls[-1] else torch.arange(rows, **ints)
            seed = index.long() if self.table.stochastic else None  # children of one parent part by their conditions alone
            guidance = torch.full((len(index),), GUIDANCE, device=self.device)
            self.rows[i] = {"step": torch.full_like(index, i), "parent": index, "guidance": guidance, "seed": seed}

    def _run_up(self, scheduler):
        """Bring both to the timed call, ours from diffusers' sample each time, so that only one call's error counts."""
        draw = torch.Generator(self.device).manual_seed(0)
        randn = lambda *size: torch.randn(*size, generator=draw, device=self.device)  # noqa: E731
        self.generator = torch.Generator(self.device).manual_seed(1)
        x = (randn(self.key.rows, *self.shape) * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(self.state)
        outputs = [randn(2 * self.key.rows, *self.shape).to(self.model) for _ in range(self.calls[-1] + 1)]
        quiet = self.coefficients.index_fill(1, torch.tensor(COLUMNS.index("c"), device=self.device), 0.0)  # what is kept has no noise
        at = Buffers(x, outputs[self.at :], scheduler)
        for i in range(self.at):
            uncond, cond = outputs[i].chunk(2)
            rows = self.rows[i] | {"seed": None}
            kept = reference.branch_step(
                at.x, cond, quiet, rows["step"], rows["parent"], uncond_output=uncond, guidance=rows["guidance"],
                history=at.history, last_sample=at.last,
            )  # fmt: skip
            at.x = self._diffusers_step(scheduler, i, at.x, outputs[i])
            at.history, at.last = self._kept(kept[1], kept[2], at.history)
        half = torch.Size([-(-self.bytes() * len(self.calls) // 8)])
        at.plain = randn(*half), torch.empty(half, device=self.device)
        return at

    def spread_over(self, cache_bytes):
        """Make as many copies of the buffers as it takes to overflow a cache three times, up to 400."""
        wanted = min(max(-(-3 * cache_bytes // self.bytes()), 2), 400) if cache_bytes else 1
        self.buffers += [copy.deepcopy(self.buffers[0]) for _ in range(wanted - len(self.buffers))]

    def _kept(self, denoised, corrected, history):
        return (denoised, *history)[: self.table.history], corrected if self.table.corrector else None

    # Contenders

    def ours(self, at, backend="auto"):
        """One `branch_step` per call. Returns what the last one returns."""
        x, history, last = at.x, at.history, at.last
        for i, output in zip(self.calls, at.outputs):
            step = self.branch_step(i, x, output, history, last, backend=backend)
            x, (history, last) = step.sample, self._kept(step.denoised, step.corrected, history)
        return step

    def branch_step(self, i, x, output, history, last, **options):
        uncond, cond = output.chunk(2)
        rows = self.rows[i]
        return sage_kernels.branch_step(
            x, cond, self.coefficients, rows["step"], rows["parent"], uncond_output=uncond, guidance=rows["guidance"],
            history=history, last_sample=last, seed=rows["seed"], want_denoised=self.table.history > 0, want_corrected=self.table.corrector,
            model_input="double", **options,
        )  # fmt: skip

    def diffusers(self, at):
        """What a pipeline does, and at a branch the copies which the next call needs. Returns (x', model input, ...)."""
        scheduler, x = at.scheduler, at.x
        scheduler._step_index = self.at
        for i, output in zip(self.calls, at.outputs):
            x = self._diffusers_step(scheduler, i, x, output)
            branches = self.children is not None and i == self.calls[-1]
            kept = self._diffusers_kept(scheduler) if branches else ()
            x, *kept = (t.index_select(0, self.children) if branches else t for t in (x, *kept))
            doubled = torch.cat([x] * 2)
            if hasattr(scheduler, "scale_model_input"):
                doubled = scheduler.scale_model_input(doubled, self.timesteps[i + 1])
        return x, doubled.to(self.model), *kept

    def _diffusers_step(self, scheduler, i, x, output):
        uncond, cond = output.chunk(2)
        guided = (uncond + GUIDANCE * (cond - uncond)).to(self.state)
        options = {} if self.key.solver in ("unipc", "heun") else {"generator": self.generator}
        return scheduler.step(guided, self.timesteps[i], x, return_dict=False, **options)[0]

    def _diffusers_kept(self, scheduler):
        """What the scheduler will read at the next call, of as many rows as the sample."""
        history = scheduler.model_outputs[-self.table.history :] if self.table.history and hasattr(scheduler, "model_outputs") else []
        return *history, *([scheduler.last_sample] if self.key.solver == "unipc" else [])

    def plain_copy(self, at):
        """Moves as many bytes as the timed calls must, half of them in each direction."""
        return at.plain[1].copy_(at.plain[0])

    # Checks

    def check_ours(self, backend):
        """Raise WrongResult unless every output equals the reference by bits and is close to float64."""
        at = self.buffers[0]
        x, history, last = at.x, at.history, at.last
        for i, output in zip(self.calls, at.outputs):
            step = self.branch_step(i, x, output, history, last, backend=backend)
            for part, wanted in self._reference(i, x, output, history, last):
                if not all(same_bits(a, b) for a, b in zip(self._part(step, part), wanted) if a is not None):
                    raise WrongResult(f"{self.key.label()}: backend {backend} differs from the reference")
            exact = self._reference(i, x, output, history, last, dtype=torch.float64)
            self._close(backend, exact, (step.sample, None, None, step.model_input))
            x, (history, last) = step.sample, self._kept(step.denoised, step.corrected, history)

    def check_diffusers(self):
        """Raise WrongResult unless diffusers agrees with float64 under its own noise."""
        at = copy.deepcopy(self.buffers[0])
        noise, state = None, self.generator.get_state()
        if self.table.stochastic:
            drawn_in = noise_dtype(at.scheduler, self.state, self.state)
            noise = torch.randn(at.x.shape, generator=self.generator, dtype=drawn_in, device=self.device).float()
            self.generator.set_state(state)
        sample, model_input, *_ = self.diffusers(at)
        self._close("diffusers", self.exact(noise), (sample, None, None, model_input))

    def exact(self, noise=None):
        """(slice of output rows, float64 results) of the last call, part by part; noise [R_in, *shape], none: zero."""
        at = self.buffers[0]
        x, history, last = at.x, at.history, at.last
        for i, output in zip(self.calls[:-1], at.outputs):
            step = self.branch_step(i, x, output, history, last)
            x, (history, last) = step.sample, self._kept(step.denoised, step.corrected, history)
        i = self.calls[-1]
        noise = torch.zeros_like(x, dtype=torch.float32) if noise is None else noise
        return self._reference(i, x, at.outputs[-1], history, last, dtype=torch.float64, noise=noise)

    def _reference(self, i, x, output, history, last, dtype=torch.float32, noise=None):
        """Yields (slice of output rows, reference results): rows do not depend on each other."""
        uncond, cond = output.chunk(2)
        rows = self.rows[i]
        at_once = max(1, CHECKED_AT_ONCE // x[0].numel())
        for start in range(0, len(rows["parent"]), at_once):
            part = slice(start, start + at_once)
            own = {name: None if value is None else value[part] for name, value in rows.items()}
            drawn = {"seed": own["seed"]} if noise is None else {"noise": noise, "noise_index": own["parent"]}
            yield part, reference.branch_step(
                x, cond, self.coefficients, own["step"], own["parent"], uncond_output=uncond, guidance=own["guidance"],
                history=history, last_sample=last, dtype=dtype, **drawn,
            )  # fmt: skip

    def _part(self, results, part):
        """The rows `part` of (x', m0, xc, doubled model input): both halves of the last must be equal."""
        model_input = results[3]
        first, second = (half[part] for half in model_input.chunk(2))
        if not same_bits(first, second):
            raise WrongResult(f"{self.key.label()}: the halves of the model input differ")
        return (*(None if value is None else value[part] for value in results[:3]), first)

    def _close(self, name, exact, results):
        for part, wanted in exact:
            for value, right in zip(self._part(results, part), wanted):
                if value is None:
                    continue
                error, tolerance = float((value.double() - right).abs().max() / right.abs().max()), TOLERANCE[self.model]
                if not error < tolerance:
                    raise WrongResult(f"{self.key.label()}: {name} is {error:.1e} away from float64, more than {tolerance:.1e}")

    # Cost

    def bytes(self):
        return traffic(self.key, self.table, self.calls)


def traffic(key, table, calls):
    """Compulsory bytes of one call of ours, the mean over `calls`: BYTES_FORMULA."""
    elements = torch.Size(SIZES[key.size]).numel()
    model, state = (dtype.itemsize for dtype in DTYPES[key.dtype])
    total = 0
    for i in calls:
        row = dict(zip(COLUMNS, table.rows[i]))
        reads = [row["u1"], row["u3"] or row["b1"], row["u4"] or row["b2"], row["u5"]]
        rows_out = key.rows * (key.fan_out if i == calls[-1] else 1)
        total += key.rows * (state * (1 + sum(map(bool, reads))) + 2 * model)
        total += rows_out * (state * (1 + (table.history > 0) + table.corrector) + 2 * model)
    return total * elements // len(calls)
