"""One call of `branch_step` against what diffusers does between two denoiser calls.

    python benchmarks/bench_ops.py --out benchmarks/results/ops.json

diffusers: guidance on the two halves of a model output, `scheduler.step`, `torch.cat` of the result with itself, and
`scale_model_input`. Ours: one `branch_step` that returns the same (the doubled, scaled model input) and keeps what the solver
needs. Both on the same tensors and threads, in turn; both allocate their results; stochastic solvers draw their own noise
(diffusers with torch.randn, ours inside the kernel). State and model output have the same dtype, as in a diffusers pipeline.

Before anything is timed, ours must equal the plain-torch reference bit by bit, and both must agree with float64.
"""

import argparse
import time
from dataclasses import dataclass, field

import diffusers
import torch
from harness import copy_bandwidth, environment, in_turn, ratio, spread, write_json
from readme_tables import markdown_table

import sage_kernels
import sage_kernels.testing
from sage.solvers import NotInTable, SOLVERS, noise_dtype, table_for
from sage_kernels import reference
from sage_kernels.testing import same_bits

SIZES = {
    "SD 4x64x64": (4, 64, 64),
    "SDXL 4x128x128": (4, 128, 128),
    "Flux 4096x64": (4096, 64),
    "video 16x21x60x104": (16, 21, 60, 104),
}
CHOSEN = ("ddim", "euler", "euler-a", "dpm++2m", "dpm++2m-sde", "unipc", "lcm", "heun", "flow-euler")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest error against float64, relative to the largest value: a few roundings of the dtype which diffusers computes in.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2**-5}
GUIDANCE = 7.5


@dataclass
class Case:
    """One solver at one size: diffusers' scheduler in the middle of a run, and the same state for our op."""

    solver: str
    shape: tuple
    dtype: torch.dtype
    calls: int = 1  # denoiser calls timed together: the two stages of a Heun step
    history: tuple = ()
    last: torch.Tensor | None = None
    outputs: list = field(default_factory=list)  # [2, *shape] each: unconditional, conditional

    def __post_init__(self):
        name, overrides = SOLVERS[self.solver]
        self.scheduler = getattr(diffusers, name)(**overrides)
        self.scheduler.set_timesteps(8)
        self.table = table_for(self.scheduler)
        self.timesteps = self.scheduler.timesteps
        self.at, self.calls = 4, 2 if self.solver == "heun" else 1
        self.guidance = torch.full((1,), GUIDANCE)
        self.row = torch.zeros(1, dtype=torch.int32)
        self.seed = torch.arange(1) if self.table.stochastic else None
        self.steps = [torch.full((1,), i, dtype=torch.int32) for i in range(len(self.table))]
        self.coefficients = self.table.tensor("cpu")
        self._run_up()

    def _run_up(self):
        """Run both up to the timed call, ours from diffusers' sample each time, so that only one call's error counts."""
        draw = torch.Generator().manual_seed(0)
        x = (torch.randn(1, *self.shape, generator=draw) * float(getattr(self.scheduler, "init_noise_sigma", 1.0))).to(self.dtype)
        self.outputs = [torch.randn(2, *self.shape, generator=draw).to(self.dtype) for _ in range(self.at + self.calls)]
        self.x, self.generator = x, torch.Generator().manual_seed(1)
        for i in range(self.at):
            step = self.branch_step(i, x, self.history, self.last)
            x = self._diffusers_step(i, x)
            self.history, self.last = self._kept(step, self.history)
        self.x = x

    def _kept(self, step, history):
        return (step.denoised, *history)[: self.table.history], step.corrected

    def _options(self):
        takes_no_generator = self.solver in ("unipc", "heun")
        return {"return_dict": False} | ({} if takes_no_generator else {"generator": self.generator})

    def _diffusers_step(self, i, x):
        uncond, cond = self.outputs[i].chunk(2)
        guided = uncond + GUIDANCE * (cond - uncond)
        return self.scheduler.step(guided, self.timesteps[i], x, **self._options())[0]

    def diffusers(self):
        """The timed call as a pipeline makes it. Returns (x', doubled model input) of the last one."""
        scheduler, x = self.scheduler, self.x
        scheduler._step_index = self.at
        for i in range(self.at, self.at + self.calls):
            x = self._diffusers_step(i, x)
            doubled = torch.cat([x] * 2)
            if hasattr(scheduler, "scale_model_input"):
                doubled = scheduler.scale_model_input(doubled, self.timesteps[i + 1])
        return x, doubled

    def branch_step(self, i, x, history, last, **options):
        uncond, cond = self.outputs[i].chunk(2)
        noise = {} if "noise" in options else {"seed": self.seed}
        return sage_kernels.branch_step(
            x, cond, self.coefficients, self.steps[i], self.row, uncond_output=uncond, guidance=self.guidance,
            history=history, last_sample=last, want_corrected=self.table.corrector, model_input="double", **noise, **options,
        )  # fmt: skip

    def ours(self, **options):
        """The same with our op. Returns what the last one returns."""
        x, history, last = self.x, self.history, self.last
        for i in range(self.at, self.at + self.calls):
            step = self.branch_step(i, x, history, last, **options)
            x, (history, last) = step.sample, self._kept(step, history)
        return step

    def check(self, dtype_name):
        """Raise unless ours equals the reference by bits, and both agree with float64 from the same noise."""
        own, expected = self.ours(), self.ours(backend="reference")
        if not all(same_bits(a, b) for a, b in zip(own, expected)):
            raise AssertionError(f"{self.solver} {self.shape} {dtype_name}: branch_step differs from the reference")
        noise, state = {}, self.generator.get_state()
        if self.table.stochastic:
            drawn_in = noise_dtype(self.scheduler, self.dtype, self.dtype)
            noise = {"noise": torch.randn(1, *self.shape, generator=self.generator, dtype=drawn_in).float()}
        self.generator.set_state(state)
        theirs, own, exact = self.diffusers()[1], self.ours(**noise).model_input, self._exact(noise)
        for name, value in (("diffusers", theirs), ("branch_step", own)):
            error = float((value.double() - exact).abs().max() / exact.abs().max())
            if not error < TOLERANCE[dtype_name]:
                raise AssertionError(f"{self.solver} {self.shape} {dtype_name}: {name} is {error:.1e} away from float64")

    def _exact(self, noise):
        x, history, last = (self.x.double(), tuple(m.double() for m in self.history), self.last)
        for i in range(self.at, self.at + self.calls):
            uncond, cond = self.outputs[i].chunk(2)
            x, m0, last, model_input = reference.branch_step(
                x, cond, self.coefficients, self.steps[i], self.row, uncond_output=uncond, guidance=self.guidance,
                history=history, last_sample=last, dtype=torch.float64, **noise,
            )  # fmt: skip
            history = (m0, *history)[: self.table.history]
        return torch.cat([model_input] * 2)

    def bytes(self):
        """Compulsory traffic of one call of ours: x, the two outputs and what the row reads in; x', m0, xc and two inputs out."""
        row = dict(zip(sage_kernels.COLUMNS, self.table.rows[self.at]))
        reads = [row["u1"], row["u3"] or row["b1"], row["u4"] or row["b2"], row["u5"]]
        tensors = 1 + 2 + sum(map(bool, reads)) + 2 + self.table.corrector + 2
        return tensors * self.x.numel() * self.x.element_size()


def measure(solver, size, dtype_name, seconds):
    case = Case(solver, SIZES[size], DTYPES[dtype_name])
    case.check(dtype_name)
    times = in_turn({"diffusers": case.diffusers, "ours": case.ours}, seconds=seconds)
    per_call = {name: [t * 1e6 / case.calls for t in values] for name, values in times.items()}
    theirs, ours = spread(per_call["diffusers"]), spread(per_call["ours"])
    return {
        "solver": solver,
        "size": size,
        "dtype": dtype_name,
        "elements": case.x.numel(),
        "diffusers_us": theirs,
        "ours_us": ours,
        "ratio": ratio(times, "ours", "diffusers"),
        "bytes": case.bytes(),
        "gigabytes_per_second": case.bytes() / ours["median"] / 1e3,
        "raw_us": {name: [round(t, 2) for t in values] for name, values in per_call.items()},
    }


def table(rows):
    """Solver by size and dtype: how many times faster, for the README."""
    columns = [(size, dtype) for size in dict.fromkeys(r["size"] for r in rows) for dtype in dict.fromkeys(r["dtype"] for r in rows)]
    ratios = {(r["solver"], r["size"], r["dtype"]): r["ratio"]["median"] for r in rows}
    short = {"float32": "fp32", "bfloat16": "bf16"}
    return {
        "columns": ["times faster", *(f"{size.split()[0]} {short[dtype]}" for size, dtype in columns)],
        "rows": [[solver, *(ratios.get((solver, *c)) for c in columns)] for solver in dict.fromkeys(r["solver"] for r in rows)],
        "formats": [None, *[".1f"] * len(columns)],
    }


def detail(rows, bandwidth):
    """Everything measured, for the terminal."""
    columns = ["solver", "dtype", "size", "diffusers us", "ours us", "p20-p80", "ratio", "GB/s", "of copy"]
    cells = [
        [r["solver"], r["dtype"], r["size"], r["diffusers_us"]["median"], r["ours_us"]["median"],
         f"{r['ours_us']['p20']:.0f}-{r['ours_us']['p80']:.0f}", r["ratio"]["median"], r["gigabytes_per_second"],
         r["gigabytes_per_second"] / bandwidth[r["size"]][r["dtype"]]]
        for r in rows
    ]  # fmt: skip
    return markdown_table(columns, cells, [None, None, None, ".1f", ".1f", None, ".2f", ".1f", ".0%"])


def overhead(seconds):
    """Microseconds of one call on a single element: what is not arithmetic."""
    one = torch.ones(1, 1)
    step = torch.zeros(1, dtype=torch.int32)
    row = sage_kernels.testing.table_row(p=1.0, q=-0.5, a=0.5, b0=0.5)
    plain = lambda: sage_kernels.branch_step(one, one, row, step, step)  # noqa: E731
    out = plain()
    into = lambda: sage_kernels.branch_step(one, one, row, step, step, out=out)  # noqa: E731
    times = in_turn({"allocating": plain, "into out": into}, seconds=seconds, most=3000)
    return {name: spread([t * 1e6 for t in values]) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None, help="JSON to write")
    parser.add_argument("--solvers", nargs="+", default=CHOSEN, choices=sorted(SOLVERS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the rounds of each case")
    parser.add_argument("--quick", action="store_true", help="two sizes, a quarter of a second each")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.seconds = list(SIZES)[:2], 0.25
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    bandwidth = {
        size: {name: copy_bandwidth(8 * torch.Size(SIZES[size]).numel() * dtype.itemsize) / 1e9 for name, dtype in DTYPES.items()}
        for size in args.sizes
    }
    rows = []
    with torch.no_grad():
        for size in args.sizes:
            for solver in args.solvers:
                for dtype_name in DTYPES:
                    try:
                        rows.append(measure(solver, size, dtype_name, args.seconds))
                    except NotInTable as refusal:
                        print(f"{solver}: {refusal}")
        fixed = overhead(args.seconds / 4)
    print(detail(rows, bandwidth))
    print(markdown_table(**table(rows)))
    result = {
        "environment": environment(),
        "settings": {"threads": args.threads, "seconds": args.seconds, "guidance": GUIDANCE, "caches": "warm, for both"},
        "bytes": "(1 sample + 2 model outputs + history read + x' + m0 + xc if kept + 2 model inputs) * elements * itemsize",
        "copy_gigabytes_per_second": bandwidth,
        "overhead_us": fixed,
        "wall_seconds": time.perf_counter() - started,
        "rows": rows,
        "table": table(rows),
    }
    print({name: f"{v['median']:.1f} us" for name, v in fixed.items()}, f"{result['wall_seconds']:.0f} s")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
