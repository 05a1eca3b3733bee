"""One call of `branch_step` against everyone who can do the same between two denoiser calls.

    python benchmarks/bench_ops.py --out benchmarks/results/cpu_ops.json          on a CPU, with both thread counts
    python benchmarks/bench_ops.py --device cuda --out ops.json --plot ops.png    on a GPU: cuda and triton backends
    python benchmarks/bench_ops.py --quick                                        a minute's look; every check still runs

Contenders, in turn within one process, on the same tensors:

  cpu / cuda / triton   one `branch_step`: guidance, solver update, copy at a branch, doubled model input
  diffusers             guidance, `scheduler.step`, index_select at a branch, `torch.cat`, `scale_model_input`
  torch.compile         the same mathematics in one compiled function (ops_compiled.py)
  copy                  a plain copy that moves as many bytes as ours must

All allocate their results; stochastic solvers draw their own noise. Before anything is timed ours must equal the plain-torch
reference bit by bit, and everyone must agree with float64: a case in which someone does not is refused, and the exit status is 1.

On a CPU a time is wall time, with caches as the contender's own last call left them. On a GPU it is device time by CUDA events,
inputs and outputs cold in L2 (buffers are rotated), with the calls queued ahead so that the host does not count; `call` is wall
time per call when the host does count, and `host` marks contenders for which it is clearly longer. Times are medians; p20-p80 is
the spread of the samples, each a mean over several calls where one is too short to time.
"""

import argparse
import gc
import itertools
import json
import sys
import time
from pathlib import Path

import ops_cases
import ops_report
import torch
from harness import HOST_BOUND, device_sampler, environment, host_sampler, in_turn, ratio, short, spread, write_json
from ops_cases import Case, Key, LIMIT_BYTES, WrongResult
from ops_compiled import CompiledUpdate

import sage_kernels
from sage_kernels import backends
from sage_kernels.testing import table_row

HEADLINE = "dpm++2m"  # measured first
QUICK = {
    "solvers": [HEADLINE, "dpm++2m-sde"],
    "sizes": ["SD"],
    "rows": [1],
    "fan_outs": [1, 4],
    "dtypes": ["fp32"],
    "seconds": 0.1,
}
LARGE = (("video", 1), ("Flux", 8))  # sizes and rows at which thread counts are compared


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in ops_cases.SIZES.items())
    several, counts = {"nargs": "+", "metavar": "NAME"}, {"nargs": "+", "type": int, "metavar": "N"}
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--solvers", **several, default=ops_cases.SOLVERS_BY_DEFAULT, choices=ops_cases.SOLVERS_KNOWN,
                        help=f"any of {', '.join(ops_cases.SOLVERS_KNOWN)} (default: the first {len(ops_cases.SOLVERS_BY_DEFAULT)})")
    parser.add_argument("--sizes", **several, default=list(ops_cases.SIZES), choices=ops_cases.SIZES, help=f"any of {shapes}")
    parser.add_argument("--rows", **counts, default=ops_cases.ROWS, help="latents that come in (default: 1 8 32 256)")
    parser.add_argument("--fan-outs", **counts, default=ops_cases.FAN_OUTS, help="children of each (default: 1 4)")
    parser.add_argument("--dtypes", **several, default=list(ops_cases.DTYPES), choices=ops_cases.DTYPES,
                        help=f"model/state: any of {', '.join(ops_cases.DTYPES)}")
    parser.add_argument("--limit-mb", type=float, default=None,
                        help="leave out cases whose call must move more than this (default: 128 on a CPU, 3072 on a GPU)")
    parser.add_argument("--threads", **counts, default=None,
                        help="CPU threads; further counts are compared with the first on large latents (default: 1 2 on a CPU)")
    parser.add_argument("--seconds", type=float, default=None,
                        help="time for the rounds of each case (default: 1 on a CPU, 0.1 on a GPU)")
    parser.add_argument("--budget", type=float, default=None, help="start no further case after this many seconds")
    parser.add_argument("--resume", action="store_true",
                        help="measure only what --out does not hold yet of this device and these sources, and add to it")
    parser.add_argument("--quick", action="store_true", help="one size, two solvers, few rows, a tenth of a second each")
    parser.add_argument("--out", default=None, help="JSON to write: environment, settings, tables, raw samples")
    parser.add_argument("--plot", default=None, help="PNG or SVG to draw: share of copy bandwidth against bytes moved")
    args = parser.parse_args()  # fmt: skip
    on_gpu = torch.device(args.device).type == "cuda"
    if args.quick:
        vars(args).update(QUICK)
    args.threads = args.threads or ([torch.get_num_threads()] if on_gpu else [1] if args.quick else [1, 2])
    args.seconds = args.seconds or (0.1 if on_gpu else 1.0)
    args.limit_mb = args.limit_mb or LIMIT_BYTES[torch.device(args.device).type] / 2**20
    return args


def our_backends(device):
    """Backends to measure on a device; says why one is missing, and gives up when all are."""
    wanted = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[torch.device(device).type]
    refusals = {name: backends.available()[name] for name in wanted}
    for name, reason in refusals.items():
        if reason is not None:
            print(f"backend {name} is not measured: {reason}")
    found = [name for name, reason in refusals.items() if reason is None]
    return found or sys.exit("bench_ops: none of our backends runs on this device; see `sage info`")


def keys(args):
    """Every case within the byte limit, and the labels of those beyond it; the headline's first, then those of few rows."""
    every = [Key(*names) for names in itertools.product(args.solvers, args.sizes, args.dtypes, args.rows, args.fan_outs)]
    every.sort(key=lambda key: (key.solver != HEADLINE, key.rows, key.fan_out))
    tables = {solver: ops_cases.timed_calls(solver) for solver in args.solvers}
    beyond = [key for key in every if ops_cases.traffic(key, *tables[key.solver]) > args.limit_mb * 2**20]
    return [key for key in every if key not in set(beyond)], [key.label() for key in beyond]


def contenders(case, ours):
    """{name: function of buffers}, each checked."""
    for backend in ours:
        case.check_ours(backend)
    case.check_diffusers()
    compiled = CompiledUpdate(case)
    compiled.check()
    named = {backend: lambda at, backend=backend: case.ours(at, backend) for backend in ours}
    return named | {"diffusers": case.diffusers, "torch.compile": compiled, "copy": case.plain_copy}


def rotating(functions, buffers):
    """{name: function without arguments}: each call takes the next buffers, whoever calls, and its results live until their turn."""
    turn = [0]

    def rotate(function):
        kept = [None] * len(buffers)

        def run():
            i = turn[0] = (turn[0] + 1) % len(buffers)
            kept[i] = function(buffers[i])

        return run

    return {name: rotate(function) for name, function in functions.items()}


def measure(key, device, ours, seconds):
    """Check and time a case; returns its line of the JSON."""
    case = Case(key, device)
    functions = contenders(case, ours)
    on_gpu = case.device.type == "cuda"
    case.spread_over(torch.cuda.get_device_properties(case.device).L2_cache_size if on_gpu else 0)
    calls, nbytes = len(case.calls), case.bytes()
    runs = rotating(functions, case.buffers)
    clock = device_sampler if on_gpu else host_sampler
    samples = in_turn({name: clock(run, case.device) for name, run in runs.items()}, seconds=seconds)
    times = {name: spread([1e6 * t / calls for t in values]) for name, values in samples.items()}
    line = key._asdict() | {
        "rows_out": key.rows * key.fan_out,
        "elements": torch.Size(case.shape).numel(),
        "bytes": nbytes,
        "buffers": len(case.buffers),
        "us": times,
        "ratio": {name: {rival: ratio(samples, name, rival) for rival in samples if rival not in ours} for name in ours},
        "gigabytes_per_second": {name: short(nbytes / t["median"] / 1e3) for name, t in times.items()},
        "of_copy": {name: short(times["copy"]["median"] / t["median"]) for name, t in times.items()},
        "raw_us": {name: [short(1e6 * t / calls) for t in values] for name, values in samples.items()},
    }
    if on_gpu:
        walls = in_turn({name: host_sampler(run, case.device) for name, run in runs.items()}, seconds=seconds / 2, most=9)
        line["call_us"] = {name: spread([1e6 * t / calls for t in values]) for name, values in walls.items()}
        line["host_bound"] = [name for name, t in line["call_us"].items() if t["median"] > HOST_BOUND * times[name]["median"]]
    return line


def measure_threads(args, ours):
    """Every contender with one thread count and another, in turn, on large latents. Returns lines of the JSON."""
    lines, first = [], args.threads[0]
    for size, rows in LARGE:
        for dtype in args.dtypes:
            key = Key(HEADLINE, size, dtype, rows, 1)
            case = Case(key, "cpu")
            runs = rotating(contenders(case, ours), case.buffers)
            samplers = {(name, count): _threaded(run, count) for name, run in runs.items() for count in args.threads}
            samples = in_turn(samplers, seconds=2 * args.seconds)
            for name in runs:
                times = {count: spread([1e6 * t for t in samples[name, count]]) for count in args.threads}
                gain = {count: ratio(samples, (name, count), (name, first)) for count in args.threads[1:]}
                lines.append({"size": size, "rows": rows, "dtype": dtype, "contender": name, "us": times, "times_faster": gain})
            torch.compiler.reset()
    torch.set_num_threads(first)
    return lines


def _threaded(run, count):
    """A sampler of `run` at a thread count, which is set outside the timed part; torch.compile makes a version for each."""
    torch.set_num_threads(count)
    timed = host_sampler(run)

    def sample():
        torch.set_num_threads(count)
        return timed()

    return sample


def overhead(device, seconds):
    """Microseconds of one call on a single element, as the host sees it: what is not arithmetic."""
    one, step = torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    row = table_row(p=1.0, q=-0.5, a=0.5, b0=0.5).to(device)
    plain = lambda: sage_kernels.branch_step(one, one, row, step, step)  # noqa: E731
    out = plain()
    into = lambda: sage_kernels.branch_step(one, one, row, step, step, out=out)  # noqa: E731
    samples = in_turn({"allocating": host_sampler(plain, device), "into out": host_sampler(into, device)}, seconds=seconds)
    return {name: spread([t * 1e6 for t in values]) for name, values in samples.items()}


def run(args, done):
    """Measure what is not in `done` (lines of an earlier run). Returns the result, and whether every result was right."""
    started, ours = time.perf_counter(), our_backends(args.device)
    chosen, beyond = keys(args)
    known = {tuple(line[name] for name in Key._fields) for line in done}
    todo = [key for key in chosen if key not in known]
    lines, refused, left = list(done), [], []
    for i, key in enumerate(todo):
        if args.budget and time.perf_counter() - started > args.budget:
            left = [key.label() for key in todo[i:]]
            break
        print(f"[{i + 1}/{len(todo)}] {key.label()}", flush=True)
        try:
            lines.append(measure(key, args.device, ours, args.seconds))
        except WrongResult as wrong:
            refused.append(str(wrong))
            print(f"REFUSED: {wrong}")
        except torch.OutOfMemoryError:
            beyond.append(key.label())
            print("left out: too little memory")
        torch.compiler.reset()
        gc.collect()
    threads = measure_threads(args, ours) if len(args.threads) > 1 and not left else []
    result = {
        "environment": environment(args.device),
        "settings": {name: value for name, value in vars(args).items() if name not in ("out", "plot")}
        | {"guidance": ops_cases.GUIDANCE, "caches": "own" if args.device == "cpu" else "L2 cold"},
        "bytes": ops_cases.BYTES_FORMULA,
        "backends": ours,
        "overhead_us": overhead(args.device, args.seconds),
        "refused": refused,
        "beyond_the_limit": beyond,
        "left_for_later": left,
        "wall_seconds": short(time.perf_counter() - started),
        "lines": lines,
        "threads": threads,
    }
    return result | ops_report.tables(result)


def held(args):
    """The lines of --out that --resume may keep: those of this machine, these packages and these sources."""
    if not (args.resume and args.out and Path(args.out).exists()):
        return []
    before, now = json.loads(Path(args.out).read_text(encoding="utf-8")), environment(args.device)
    same = all(before["environment"].get(name) == now[name] for name in ("device", "driver", "processor", "threads", "packages", "sources"))
    return before["lines"] if same else []


def main():
    args = parse()
    torch.set_num_threads(args.threads[0])
    with torch.no_grad():
        result = run(args, held(args))
    if args.out:
        write_json(args.out, result)
    if args.plot:
        ops_report.plot(result, args.plot)
    print(ops_report.text(result))
    return int(bool(result["refused"]))


if __name__ == "__main__":
    sys.exit(main())
