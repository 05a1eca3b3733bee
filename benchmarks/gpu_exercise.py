"""Every op on every backend of a device, over odd sizes, its outputs poisoned, against the reference computed on the CPU, bit by bit.

    python benchmarks/gpu_exercise.py                                  all sizes on the GPU
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/gpu_exercise.py --quick
    ncu --kernel-name regex:branch_step python benchmarks/gpu_exercise.py --profile large --backends cuda

Small enough to run under a sanitizer; there the caching allocator must be off, so that every buffer ends where its tensor does.
"""

import argparse
import itertools
import sys

import torch

import sage_kernels
from sage_kernels import allocation, backends
from sage_kernels.testing import DTYPES, poisoned, random_case, same_bits, table_row

EVERYTHING = {"want_corrected": True, "model_input": "double"}
NOISES = ("seed", "tensor", "indexed", None)
PROFILED = {"large": (8, 16 * 21 * 60 * 104), "small": (1, 4 * 64 * 64)}  # rows and elements: video, Stable Diffusion


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def branch_step(seed, rows, elements, dtypes, device, backend):
    noise = NOISES[seed % len(NOISES)]
    options = {"guided": seed % 3 > 0, "noise": noise, "history_parent": seed % 2 == 0, "device": device}
    positional, keyword = random_case(seeded(seed), 3, rows, (elements,), dtypes, **options)
    return sage_kernels.branch_step(*positional, **keyword, **EVERYTHING, backend=backend)


def gradients(seed, rows, elements, dtypes, device, backend):
    """Of everything `branch_step` is differentiable in, from random gradients of all its outputs."""
    positional, keyword = random_case(seeded(seed), 3, rows, (elements,), dtypes, history_parent=seed % 2 == 0, device=device)
    leaves = [*positional[:2], keyword["uncond_output"], keyword["last_sample"], *keyword["history"]]
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = sage_kernels.branch_step(*positional, **keyword, **EVERYTHING, backend=backend)
    draw = seeded(seed + 1)
    arriving = [torch.randn(out.shape, generator=draw).to(out.dtype).to(device) for out in outputs]
    return torch.autograd.grad(outputs, leaves, arriving)


def normals(seed, rows, elements, dtypes, device, backend):
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=seeded(seed)).to(device)
    return (sage_kernels.normals(seeds, torch.arange(rows, dtype=torch.int32, device=device), elements, tag=seed, backend=backend),)


def group_mean(seed, rows, elements, dtypes, device, backend):
    """Groups of one, two, three, ... members of `rows` rows, with a mask."""
    draw, groups = seeded(seed), 4
    indptr = torch.tensor([n * (n + 1) // 2 for n in range(groups + 1)], dtype=torch.int32, device=device)
    members = torch.randint(rows, (groups * (groups + 1) // 2,), generator=draw, dtype=torch.int32).to(device)
    values = torch.randn(rows, elements, generator=draw).to(dtypes[0]).to(device)
    mask = torch.randint(2, (rows, 5), generator=draw).to(device)
    return sage_kernels.group_mean(values, indptr, members, mask=mask, backend=backend)


OPS = (branch_step, gradients, normals, group_mean)


def poison():
    """Fill what the ops allocate, so that an element nobody writes cannot pass for a result."""
    empty = allocation.empty
    allocation.empty = lambda *args: poisoned(empty(*args))


def exercise(device, names, quick):
    """Compare every op, size and dtype; returns (cases, descriptions of those that differ)."""
    sizes = itertools.product((1, 33), (1, 7, 4099)) if quick else itertools.product((1, 3, 33), (1, 7, 64, 4099, 16385))
    cases, wrong = 0, []
    for seed, ((rows, elements), dtypes, op) in enumerate(itertools.product(sizes, DTYPES, OPS)):
        expected = op(seed, rows, elements, dtypes, "cpu", "reference")
        for backend in names:
            results = op(seed, rows, elements, dtypes, device, backend)
            same = [same_bits(None if got is None else got.cpu(), wanted) for got, wanted in zip(results, expected)]
            cases += 1
            if not all(same):
                model, state = (str(dtype)[6:] for dtype in dtypes)
                wrong.append(f"{op.__name__} on {backend}, {rows} rows of {elements}, {model}/{state}: outputs {same}")
    return cases, wrong


def profile(device, backend, size):
    """A few calls of a plain multistep update on real sizes, for a profiler to look at."""
    (rows, elements), draw = PROFILED[size], torch.Generator(device).manual_seed(0)
    randn = lambda dtype: torch.randn(rows, elements, generator=draw, device=device).to(dtype)  # noqa: E731
    x, m1, cond, uncond = randn(torch.float32), randn(torch.float32), randn(torch.bfloat16), randn(torch.bfloat16)
    table = table_row(p=1.1, q=-0.5, a=0.8, b0=0.3, b1=-0.1).to(device)
    parent = torch.arange(rows, dtype=torch.int32, device=device)
    guidance = torch.full((rows,), 7.5, device=device)
    for _ in range(8):
        sage_kernels.branch_step(
            x, cond, table, torch.zeros_like(parent), parent, uncond_output=uncond, guidance=guidance, history=(m1,),
            model_input="double", backend=backend,
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--backends", nargs="+", default=None, metavar="NAME", help="default: cuda triton on a GPU, cpu on a CPU")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, for the sanitizers")
    parser.add_argument("--profile", choices=PROFILED, default=None, help="run a few calls of this size instead, checking nothing")
    args = parser.parse_args()
    names = args.backends or (["cpu"] if args.device == "cpu" else ["cuda", "triton"])
    refusals = [f"backend {name} cannot run: {reason}" for name, reason in backends.available().items() if name in names and reason]
    if refusals:
        sys.exit("\n".join(refusals))
    if args.profile:
        for name in names:
            profile(args.device, name, args.profile)
        return 0
    poison()
    cases, wrong = exercise(args.device, names, args.quick)
    print(f"{cases} cases of {len(OPS)} ops on {', '.join(names)}: {len(wrong)} differ from the reference", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
