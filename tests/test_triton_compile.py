"""What Triton makes of the kernels, without a GPU: registers, spills, width of loads and stores, and no fused arithmetic.

The launchers run as they are, on tensors without memory, and Triton believes in a device of the target; the launch is left out.
"""

import collections
import functools
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("Triton interprets here", allow_module_level=True)

from conftest import cuobjdump  # noqa: E402

from sage_kernels import triton_ops  # noqa: E402

pytestmark = pytest.mark.deep
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ROWS, ELEMENTS = 4, 4096
SEED = 16  # place of the seeds among the arguments of branch_step


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, name):
        self.name = name

    def get_current_target(self):
        return TARGETS[self.name]

    def get_current_device(self):
        return self.name

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """compiled(target, launcher, arguments) is the kernel that the launcher would have run."""
    kernels, run = [], triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **options: kernels.append(run(*args, **options | {"warmup": True})))

    def compile(target, launcher, arguments):
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(target))
        triton_ops._options.cache_clear()
        launcher(*arguments)
        return kernels[-1]

    yield compile
    triton_ops._options.cache_clear()


def rows(dtype, count=ROWS, elements=ELEMENTS):
    return torch.empty(count, elements, dtype=dtype, device="meta")


def index(count=ROWS, dtype=torch.int32):
    return torch.empty(count, dtype=dtype, device="meta")


def step_arguments(model, state, *, guided=True, history=1, noise=None, corrector=False, copies=2, count=ROWS, elements=ELEMENTS):
    row = functools.partial(rows, count=count, elements=elements)
    seeded = noise == "seed"
    return (
        row(state), row(model), index(9 * 16, F32).view(9, 16), index(count), index(count),
        row(model) if guided else None, index(count, F32) if guided else None,
        *[row(state) if i < history else None for i in range(3)], None, None, None, row(state) if corrector else None,
        row(F32) if noise == "tensor" else None, None, index(count, torch.int64) if seeded else None, index(count) if seeded else None,
        row(state), row(state), row(state) if corrector else None, rows(model, copies * count, elements),
    )  # fmt: skip


def backward_arguments(model, state, *, every=True, elements=ELEMENTS):
    row = functools.partial(rows, elements=elements)
    return (
        row(state), row(state), row(state) if every else None, row(model, count=2 * ROWS), index(9 * 16, F32).view(9, 16), index(), index(),
        row(state), row(model), row(model), index(ROWS, F32), index(ROWS + 1), index(),
        row(state), row(model), row(model), *[row(state) if every else None] * 4,
    )  # fmt: skip


def mean_arguments(dtype, mask=None, *, elements=ELEMENTS):
    masks = [None if mask is None else rows(mask, elements=elements) for _ in range(2)]
    return rows(dtype, elements=elements), index(ROWS + 1), index(), masks[0], rows(dtype, elements=elements), masks[1]


def normals_arguments(elements=ELEMENTS):
    return index(dtype=torch.int64), index(), 0, rows(F32, elements=elements)


STEP, BACKWARD, MEAN, NORMALS = triton_ops.branch_step, triton_ops.branch_step_backward, triton_ops.group_mean, triton_ops.normals
# name: launcher, arguments, 128-bit loads and stores per thread, most registers (CUDA), most vector registers (AMD)
VARIANTS = {
    "guided": (STEP, step_arguments(BF16, F32), 6, 6, 64, 56),
    "guided, seeded noise": (STEP, step_arguments(BF16, F32, noise="seed"), 6, 6, 72, 64),
    "bfloat16": (STEP, step_arguments(BF16, BF16), 4, 4, 64, 56),
    "bfloat16, seeded noise": (STEP, step_arguments(BF16, BF16, noise="seed"), 4, 4, 72, 64),
    "float32": (STEP, step_arguments(F32, F32), 8, 8, 64, 56),
    "float16, noise tensor": (STEP, step_arguments(F16, F16, noise="tensor", copies=1), 6, 3, 64, 56),
    "corrector": (STEP, step_arguments(BF16, F32, history=3, corrector=True), 12, 8, 80, 80),
    "everything": (STEP, step_arguments(BF16, BF16, history=3, corrector=True, noise="seed"), 7, 5, 80, 72),
    "normals": (NORMALS, normals_arguments(), 0, 2, 40, 40),
    "backward": (BACKWARD, backward_arguments(BF16, F32, every=False), 10, 4, 168, 96),
    "backward, every gradient": (BACKWARD, backward_arguments(BF16, F32), 12, 12, 168, 136),
    "backward, bfloat16": (BACKWARD, backward_arguments(BF16, BF16), 8, 7, 168, 128),
    "backward, float32": (BACKWARD, backward_arguments(F32, F32), 16, 14, 168, 136),
    "mean": (MEAN, mean_arguments(BF16), 1, 1, 64, 48),
    "mean and union": (MEAN, mean_arguments(F32, F16), 3, 3, 64, 72),
    "mean and union, wide": (MEAN, mean_arguments(F64, torch.int64), 8, 8, 80, 88),
}


def machine_code(kernel, tmp_path):
    """({resource: how much}, {instruction: how often it stands there})."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([cuobjdump(), "--dump-resource-usage", "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used, collections.Counter(re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", text))


def fused(counts):
    return sum(n for name, n in counts.items() if name.startswith("FFMA"))


def has_roots(launcher, arguments):
    """Whether noise is computed: its square root, correctly rounded, is made of fused operations; so is a float64 division."""
    return launcher is NORMALS or (launcher is STEP and arguments[SEED] is not None)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_code(compiled, tmp_path, target, variant):
    launcher, arguments, loads, stores, registers, _ = VARIANTS[variant]
    kernel = compiled(target, launcher, arguments)
    used, counts = machine_code(kernel, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0 and not any(name.startswith(("LDL", "STL")) for name in counts)
    assert used["REG"] <= registers
    assert counts["LDG.E.128"] >= loads
    assert {name: n for name, n in counts.items() if name.startswith("STG")} == {"STG.E.128": stores}
    assert not re.search(r"fma\.rn|\.ftz|\.approx", kernel.asm["ptx"])
    if launcher is not MEAN:
        roots = fused(machine_code(compiled(target, NORMALS, normals_arguments()), tmp_path)[1])
        assert fused(counts) == (roots if has_roots(launcher, arguments) else 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_amd_code(compiled, variant):
    launcher, arguments, loads, stores, _, registers = VARIANTS[variant]
    code = compiled("gfx942", launcher, arguments).asm["amdgcn"]
    counts = collections.Counter(re.findall(r"\b(?:global|buffer)_((?:load|store)_\w+)", code))
    assert int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]) <= registers
    assert int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1]) == int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1]) == 0
    assert counts["load_dwordx4"] >= loads
    assert {name: n for name, n in counts.items() if name.startswith("store")} == {"store_dwordx4": stores}
    assert re.search(r"amdhsa_float_denorm_mode_32 3\b", code) and re.search(r"amdhsa_float_round_mode_32 0\b", code)
    if launcher is not MEAN and not has_roots(launcher, arguments):
        # A lone product or sum of a float16 may be written as a fused operation with 0 or 1, which rounds alike.
        candidates = re.findall(r"v_(?:pk_)?(?:fma|mad|mac|fmac)_.*", code)
        assert not [line for line in candidates if not re.search(r", (0|neg\(0\))( |$)|, -?1\.0, ", line)]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_small_dtypes_are_rounded_by_the_hardware_or_to_nearest_even(compiled, target):
    for dtype, instruction in ((BF16, r"cvt\.rn\.bf16"), (F16, r"cvt\.rn\.f16")):
        code = compiled(target, STEP, step_arguments(dtype, dtype)).asm
        if target == "gfx942":
            assert re.search("0x7fff" if dtype == BF16 else "v_cvt_f16_f32", code["amdgcn"])
        else:
            assert re.search(instruction, code["ptx"])


@pytest.mark.parametrize("elements", [1, 7, 2**31 + 16])
def test_every_size_compiles(compiled, elements):
    """One element (which Triton takes for a constant), a size without vectors, and one beyond 32 bits."""
    for noise in ("seed", "tensor"):
        compiled("sm_90", STEP, step_arguments(BF16, F32, noise=noise, elements=elements))
    compiled("sm_90", BACKWARD, backward_arguments(BF16, F32, elements=elements))
    compiled("sm_90", MEAN, mean_arguments(F16, torch.bool, elements=elements))
    compiled("sm_90", NORMALS, normals_arguments(elements))


def test_a_denoising_loop_compiles_once(compiled):
    """Rows multiply at branches, batches differ and so do latents: none of it is a reason to compile."""
    sizes = [(count, elements) for count in (1, 2, 3, 16, 17) for elements in (4096, 16384, 1040)]
    kernels = [compiled("sm_90", STEP, step_arguments(BF16, F32, count=count, elements=elements)) for count, elements in sizes]
    assert all(kernel is kernels[0] for kernel in kernels)

