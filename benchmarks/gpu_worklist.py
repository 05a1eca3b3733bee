"""Everything that needs a GPU, in order: build, tests, sanitizers, benchmarks. For a machine that has a GPU and this repository.

    make gpu                                  all steps
    make gpu STEPS="build tests"              some of them; each call adds to the same JSON
    make gpu DRY=1                            list the steps and their time limits
    make gpu DEVICE=cpu QUICK=1               without a GPU: the parts in Python, small
    make gpu PYTHON=/opt/venv/bin/python RESULTS=/tmp/out

Nothing is installed and nothing is downloaded: PYTHON must have torch, triton, pytest, hypothesis, scipy, setuptools, ninja and
matplotlib, and for the benchmarks diffusers (which may come through PYTHONPATH). Building needs nvcc and a C++ compiler.

Every step is a process of its own under a time limit below nine minutes; one that fails does not stop the others. RESULTS (default:
benchmarks/results) gets DEVICE-NAME.json with the state, seconds, end of the output and results of every step, a plot and the
profiler's report; whole outputs go to its folder logs/. The exit status is 1 if a step failed.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import harness

ROOT = Path(__file__).resolve().parent.parent
OP_TESTS = ("branch_step*", "noise", "group_mean", "gradients", "backends")
GRAPH_TESTS = "tests/test_graphs.py"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats")
TAIL_LINES, TAIL_CHARACTERS = 40, 6000
NOTHING_COLLECTED = 5  # pytest's exit status when no test was selected
BACKENDS = """
from sage_kernels import backends
print(backends.build_info())
refusals = {name: backends.available()[name] for name in ("cpu", "cuda", "triton")}
print(*(f"{name:8} {reason or 'ready'}" for name, reason in refusals.items()), sep="\\n")
raise SystemExit(int(any(refusals.values())))
"""


@dataclass(frozen=True)
class Step:
    """A step of the list: its commands run one after the other, all within the limit [s]."""

    name: str
    limit: int
    about: str
    commands: object  # function of Run: a list of Command
    needs_gpu: bool = True
    tool: str | None = None  # a program it needs, besides Python
    modules: tuple = ()  # Python modules it needs
    result: bool = False  # its commands write a JSON to Run.json(name), which goes into ours
    report: bool = False  # its whole output is worth keeping beside the JSON


@dataclass(frozen=True)
class Command:
    words: list
    environment: tuple = ()  # pairs
    fine: tuple = (0,)  # exit statuses


class Run:
    """One call of the list: options, places, and what the step's commands are made of."""

    def __init__(self, args):
        self.device, self.quick, self.name = args.device, args.quick, device_name(args.device)
        self.slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + "-quick" * args.quick
        self.results, self.logs = Path(args.results).resolve(), Path(args.results).resolve() / "logs"
        self.path = self.results / f"{self.slug}.json"

    def json(self, step):
        return self.logs / f"{self.slug}-{step}.json"

    def script(self, name, *options, environment=()):
        return Command([sys.executable, f"benchmarks/{name}", "--device", self.device, *map(str, options)], environment)

    def pytest(self, *options, fine=(0,)):
        return Command([sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *options], fine=fine)

    def benchmark(self, name, step, *options):
        return self.script(name, *options, *["--quick"] * self.quick, "--out", self.json(step))


def build(run):
    return [
        Command([sys.executable, "setup.py", "build_ext", "--inplace"], (("SAGE_BUILD", "cuda"),)),
        Command([sys.executable, "-c", BACKENDS]),
    ]


def tests(run):
    """The tests of the ops, then all others that are marked gpu and can be imported here."""
    if run.quick:
        return [run.pytest("tests/test_noise.py")]
    ops = sorted(str(path.relative_to(ROOT)) for name in OP_TESTS for path in (ROOT / "tests").glob(f"test_{name}.py"))
    commands = [run.pytest(*ops)]
    if run.device != "cpu":
        left_out = [f"--ignore={path}" for path in (*ops, GRAPH_TESTS, *not_importable(run))]
        commands.append(run.pytest("-m", "gpu", *left_out, fine=(0, NOTHING_COLLECTED)))
    return commands


def not_importable(run):
    """Test files that cannot be imported here, mostly because diffusers is missing; says which."""
    command = run.pytest("--collect-only").words
    listing = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200).stdout
    found = sorted(set(re.findall(r"^ERROR (tests/\w+\.py)", listing, re.MULTILINE)))
    if found:
        print(f"         left out, because they cannot be imported here: {', '.join(found)}")
    return found


def sanitizer(tool):
    """The exercise script under a tool of compute-sanitizer, every tensor in memory of its own."""

    def commands(run):
        exact = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        script = run.script("gpu_exercise.py", "--quick", environment=exact)
        return [Command([program("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9", *script.words], exact)]

    return commands


def profile(run):
    """A report of one large and one small launch of each backend."""
    chosen = [word for section in SECTIONS for word in ("--section", section)]
    options = ["--kernel-name", "regex:branch_step", "--launch-skip", "4", "--launch-count", "1", "--clock-control", "none", *chosen]
    cases = [("--backends", backend, "--profile", size) for backend in ("cuda", "triton") for size in ("large", "small")]
    return [Command([program("ncu"), *options, *run.script("gpu_exercise.py", *case).words]) for case in cases]


def bench_ops(run):
    plot = run.results / f"{run.slug}-ops.png"
    return [run.benchmark("bench_ops.py", "ops", "--plot", plot, "--budget", 430, *["--resume"] * (not run.quick))]


def bench_grouping(run):
    options = ("--prompts", "sage/emoji/captions.txt", "--parts", "exact", "--sizes-exact", 1_000_000)
    return [run.benchmark("bench_grouping.py", "grouping", *options)]


def pipeline_step(name, model, size, about, compiled="blocks"):
    """bench_pipeline.py on one model at one size, with random weights."""
    options = ("--models", model, "--sizes", size, "--seconds", 360, "--compile", compiled)
    return Step(name, 535, f"bench_pipeline.py: {about}, random weights", lambda run: [run.benchmark("bench_pipeline.py", name, *options)],
                needs_gpu=False, modules=("diffusers",), result=True)  # fmt: skip


STEPS = (
    Step("build", 500, "compile the CUDA kernels in place; all backends must load", build, tool="nvcc"),
    Step("exercise", 240, "every op on every backend, odd sizes, against the reference by bits",
         lambda run: [run.script("gpu_exercise.py", *["--quick"] * run.quick)], needs_gpu=False),
    Step("tests", 530, "the ops' tests, and all tests marked gpu", tests, needs_gpu=False, modules=("pytest", "hypothesis", "scipy")),
    Step("memcheck", 480, "compute-sanitizer: accesses outside of buffers", sanitizer("memcheck"), tool="compute-sanitizer"),
    Step("racecheck", 480, "compute-sanitizer: races in shared memory", sanitizer("racecheck"), tool="compute-sanitizer"),
    Step("initcheck", 480, "compute-sanitizer: reads of memory that nobody wrote", sanitizer("initcheck"), tool="compute-sanitizer"),
    Step("graphs", 400, "capture and replay of CUDA graphs", lambda run: [run.pytest(GRAPH_TESTS)], modules=("pytest", "diffusers")),
    Step("ops", 530, "bench_ops.py; what its budget leaves over is measured by the next call", bench_ops,
         needs_gpu=False, modules=("diffusers",), result=True),
    Step("sampling", 480, "bench_sampling.py", lambda run: [run.benchmark("bench_sampling.py", "sampling")],
         needs_gpu=False, modules=("diffusers",), result=True),
    pipeline_step("sd15", "sd15", "512", "Stable Diffusion 1.5, 512 pixels", "whole"),
    pipeline_step("sdxl_512", "sdxl", "512", "Stable Diffusion XL, 512 pixels"),
    pipeline_step("sdxl_1024", "sdxl", "1024", "Stable Diffusion XL, 1024 pixels"),
    pipeline_step("sd3_512", "sd3", "512", "Stable Diffusion 3 medium, 512 pixels"),
    pipeline_step("sd3_1024", "sd3", "1024", "Stable Diffusion 3 medium, 1024 pixels"),
    pipeline_step("flux_512", "flux", "512", "Flux.1-dev, 512 pixels"),
    pipeline_step("flux_1024", "flux", "1024", "Flux.1-dev, 1024 pixels"),
    pipeline_step("wan_33", "wan", "480p33", "Wan 1.3B, 33 frames of 480 lines"),
    pipeline_step("wan_81", "wan", "480p81", "Wan 1.3B, 81 frames of 480 lines"),
    Step("grouping", 500, "bench_grouping.py: a million prompts, all pairs", bench_grouping, modules=("transformers", "diffusers"), result=True),
    Step("profile", 400, "ncu on a large and a small branch_step", profile, tool="ncu", report=True),
)  # fmt: skip


def device_name(device):
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_worklist: torch finds no GPU here; DEVICE=cpu QUICK=1 runs the parts that need none")
    return torch.cuda.get_device_name(device)


def program(name):
    """Where a program is: on PATH, or in the CUDA toolkit's folder; None if it is nowhere."""
    return shutil.which(name) or shutil.which(name, path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))


def environment(extra=()):
    """For a step's processes: this checkout is importable, whatever else is on the path stays."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **dict(extra)}


def refusal(step, run):
    """None if a step can run here, else why not."""
    if step.needs_gpu and run.device == "cpu":
        return "needs a GPU"
    if step.tool and program(step.tool) is None:
        return f"needs {step.tool}"
    find = "import sys, importlib.util as u; sys.exit(' '.join(n for n in sys.argv[1:] if u.find_spec(n) is None) or 0)"
    probe = subprocess.run([sys.executable, "-c", find, *step.modules], env=environment(), capture_output=True, text=True)
    return f"needs Python's {probe.stderr.strip()}" if probe.returncode else None


def perform(step, run):
    """Run a step. Returns its entry of the JSON."""
    why_not = refusal(step, run)
    if why_not:
        return {"status": "skipped", "reason": why_not}
    log, started = run.logs / f"{run.slug}-{step.name}.log", time.monotonic()
    try:
        commands = step.commands(run)
    except subprocess.TimeoutExpired as slow:  # asking pytest which files it can import
        return {"status": "out of time", "reason": str(slow), "tail": []}
    status = "passed"
    with open(log, "w", encoding="utf-8") as output:
        for command in commands:
            left = step.limit - (time.monotonic() - started)
            code = execute(command, output, max(left, 1))
            if code not in command.fine:
                status = "out of time" if code is None else f"failed with status {code}"
                break
    entry = {"status": status, "seconds": round(time.monotonic() - started, 1), "limit": step.limit}
    entry |= {"time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "commit": harness.commit(), "sources": harness.sources()}
    entry["commands"] = [" ".join(map(str, command.words))[:300] for command in commands]
    entry["tail"] = tail(log)
    if step.report:
        shutil.copy(log, run.results / f"{run.slug}-{step.name}.txt")
    if step.result and run.json(step.name).exists():
        entry["result"] = json.loads(run.json(step.name).read_text(encoding="utf-8"))
    return entry


def execute(command, output, limit):
    """Exit status of a command, or None if it ran out of time; then it is ended, with every process it started."""
    output.write(f"$ {' '.join(map(str, command.words))}\n")
    output.flush()
    process = subprocess.Popen(
        list(map(str, command.words)), cwd=ROOT, env=environment(command.environment), stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def tail(log):
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.splitlines()[-TAIL_LINES:])[-TAIL_CHARACTERS:].split("\n")


def restore(step, run, before):
    """Give a benchmark its earlier result back where only our JSON still has it, so that it can go on from there."""
    earlier = before["steps"].get(step.name, {}).get("result")
    if earlier and not run.json(step.name).exists():
        harness.write_json(run.json(step.name), earlier)


def tables(steps):
    """Every table of the steps' results by name, for readme_tables.py: "ops", "ops-compile", "sampling", ..."""
    found = {}
    for name, entry in steps.items():
        result = entry.get("result", {})
        found |= {name: result["table"]} if "table" in result else {}
        found |= {f"{name}-{key}": table for key, table in result.get("tables", {}).items()}
    return found


def summary(steps, path):
    lines = [f"{name:10} {e['status']:24} {e.get('seconds', 0):6.0f} s   {e.get('reason', '')}".rstrip() for name, e in steps.items()]
    return "\n".join(["", *lines, "", f"written to {path}"])


def listing():
    lines = [f"{step.name:10} {step.limit:4} s  {'' if step.needs_gpu else '(also without a GPU) '}{step.about}" for step in STEPS]
    return "\n".join([*lines, "", f"limits together: {sum(step.limit for step in STEPS) / 60:.0f} minutes; a step ends when it is done"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="NAME", help=f"any of {', '.join(names)} (default: all)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="small benchmarks and few tests")
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"), help="folder for the JSON (default: benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and their limits, and run nothing")
    args = parser.parse_args()
    if args.dry_run:
        print(listing())
        return 0
    sys.path.insert(0, str(ROOT))
    run = Run(args)
    run.logs.mkdir(parents=True, exist_ok=True)
    held = json.loads(run.path.read_text(encoding="utf-8")) if run.path.exists() else {"steps": {}}
    failed = False
    for step in (step for step in STEPS if step.name in args.steps):
        print(f"{step.name:10} at most {step.limit} s: {step.about}", flush=True)
        restore(step, run, held)
        entry = held["steps"][step.name] = perform(step, run)
        print(f"{'':10} {entry['status']} {entry.get('reason', '')}".rstrip(), flush=True)
        if entry["status"] not in ("passed", "skipped"):
            failed = True
            print(*entry["tail"], sep="\n", flush=True)
        keep(run, held)
    print(summary({name: entry for name, entry in held["steps"].items() if name in args.steps}, run.path))
    return int(failed)


def keep(run, held):
    """Write the JSON, after every step, so that a call that is cut off has lost only the step it was in."""
    try:
        held["environment"] = harness.environment(run.device) | {"command": "make gpu"}
    except Exception as error:  # a package that does not even import is what the build step is there to find
        held.setdefault("environment", {"error": f"{type(error).__name__}: {error}"})
    held["tables"] = tables(held["steps"])
    order = [step.name for step in STEPS]
    held["steps"] = dict(sorted(held["steps"].items(), key=lambda item: order.index(item[0])))
    harness.write_json(run.path, held)


if __name__ == "__main__":
    sys.exit(main())
