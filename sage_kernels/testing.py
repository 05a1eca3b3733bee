"""What tests and benchmarks share: dtypes, backends that run here, random cases, comparison by bits."""

import torch

from sage_kernels import backends
from sage_kernels.coefficients import COLUMNS

# (model dtype, state dtype)
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
)
DTYPE_NAMES = [f"{str(m)[6:]}-{str(s)[6:]}" for m, s in DTYPES]
ISAS = ("baseline", "avx2", "avx512")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def isa_refusal(name):
    """None if the C++ kernels run here with this instruction set, else the reason why not."""
    refusal = backends.available()["cpu"]
    if refusal is not None:
        return refusal
    before = backends.cpu_isa()
    try:
        backends.cpu_isa(name)
    except RuntimeError as error:
        return f"{name}: {error}"
    finally:
        backends.cpu_isa(before)
    return None


def same_bits(a, b):
    """True if both tensors (or None) hold the same bits; NaN equals NaN whatever its payload, -0 does not equal +0."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan = torch.isnan(a)
    if not torch.equal(nan, torch.isnan(b)):
        return False
    a, b = (t.contiguous().masked_fill(nan, 0).view(_INTEGERS[t.dtype.itemsize]) for t in (a, b))
    return torch.equal(a, b)


def poisoned(tensor):
    """The tensor filled with what no kernel writes by chance: NaN, or 77 and True where there is no NaN."""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


def moved(value, device):
    """Tensors, and tuples, lists and dicts of them, on a device; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def table_row(**coefficients):
    """[1, 16] float32 table of one row; unnamed coefficients: u0 = s = 1, clip = inf, the others 0."""
    values = {"u0": 1.0, "s": 1.0, "clip": float("inf")} | coefficients
    return torch.tensor([[values.get(name, 0.0) for name in COLUMNS]], dtype=torch.float32)


def random_case(
    generator,
    rows_in,
    rows_out,
    shape,
    dtypes=DTYPES[0],
    *,
    guided=True,
    noise="seed",
    history_parent=False,
    corrector=True,
    device="cpu",
):
    """Arguments of `branch_step` as (positional, keyword), with a table whose rows use and leave out every term at random.

    Args:
        generator (torch.Generator): CPU generator; equal state gives equal cases.
        noise: "seed", "tensor", "indexed" or None.
        history_parent: give every history tensor rows and an index of its own.
    """
    model, state = dtypes
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    index = lambda bound: torch.randint(max(bound, 1), (rows_out,), generator=generator, dtype=torch.int32)  # noqa: E731

    table = draw(5, len(COLUMNS)) * (torch.rand(5, len(COLUMNS), generator=generator) > 0.3)
    column = {name: i for i, name in enumerate(COLUMNS)}
    table[:, column["clip"]] = torch.tensor([float("inf"), 0.8, float("inf"), 2.0, float("inf")])
    table[1, [column[f"u{i}"] for i in range(6)]] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    if not corrector:
        table[:, [column[f"u{i}"] for i in range(1, 6)]] = 0.0
    if noise is None:
        table[:, column["c"]] = 0.0

    history_rows = [rows_in + 1 + i if history_parent else rows_in for i in range(3)]
    keyword = {
        "history": tuple(draw(n, *shape).to(state) for n in history_rows),
        "last_sample": draw(rows_in, *shape).to(state),
    }
    if history_parent:
        keyword["history_parent"] = tuple(index(n) for n in history_rows)
    if guided:
        keyword |= {"uncond_output": draw(rows_in, *shape).to(model), "guidance": draw(rows_out) * 5}
    if noise == "seed":
        keyword["seed"] = torch.randint(-(2**62), 2**62, (rows_out,), generator=generator)
        keyword["call"] = torch.randint(1000, (rows_out,), generator=generator, dtype=torch.int32)
    elif noise == "tensor":
        keyword["noise"] = draw(rows_out, *shape)
    elif noise == "indexed":
        keyword |= {"noise": draw(3, *shape), "noise_index": index(3)}
    positional = (draw(rows_in, *shape).to(state), draw(rows_in, *shape).to(model), table, index(5), index(rows_in))
    return moved(positional, device), moved(keyword, device)
