"""branch_step's arguments: what is refused, by what message, and what autograd is told."""

import re

import pytest
import torch

import sage_kernels
from sage_kernels.testing import DTYPES, isa_refusal, random_case, same_bits, table_row

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def good_arguments():
    positional, keyword = random_case(seeded(10), 3, 4, (6,), DTYPES[1], noise="tensor", history_parent=True)
    names = ("sample", "model_output", "table", "step", "parent")
    return dict(zip(names, positional)) | keyword


def changed(name, change):
    def apply(arguments):
        arguments[name] = change(arguments[name])

    return apply


def out_of(arguments, **changes):
    out = sage_kernels.branch_step(**arguments)
    return {"out": out._replace(**{k: change(getattr(out, k)) for k, change in changes.items()})}


def same_outputs(arguments):
    out = sage_kernels.branch_step(**arguments)
    return {"out": out._replace(denoised=out.sample)}


BAD = {
    "sample dtype": (changed("sample", lambda t: t.half()), TypeError, r"sample must be float32 or bfloat16 .*got float16 \(3, 6\)"),
    "sample kind": (changed("sample", lambda t: [1.0]), TypeError, "sample must be a tensor .*got list; pass a tensor"),
    "sample scalar": (changed("sample", lambda t: t[0, 0]), ValueError, r"sample must be \[R_in, \*shape\].*sample\[None\]"),
    "output dtype": (changed("model_output", lambda t: t.double()), TypeError, "model_output must be float32 or bfloat16 or float16"),
    "output shape": (changed("model_output", lambda t: t[:, :5]), ValueError, r"model_output must be .*\[R_in, 6\].*got bfloat16 \(3, 5\)"),
    "output rows": (changed("model_output", lambda t: t[:2]), ValueError, r"got bfloat16 \(2, 6\).*R_in = 3"),
    "table width": (changed("table", lambda t: t[:, :15]), ValueError, r"table must be float32 \[rows, 16\]"),
    "table dtype": (changed("table", lambda t: t.double()), TypeError, r"table must be float32.*use table.to\(torch.float32\)"),
    "table layout": (changed("table", lambda t: t.t().contiguous().t()), ValueError, r"table must be contiguous.*table.contiguous\(\)"),
    "step dtype": (changed("step", lambda t: t.long()), TypeError, r"step must be int32 \[R_out\].*got int64 \(4,\).*torch.int32"),
    "step count": (changed("step", lambda t: t[:3]), ValueError, r"step must be .*got int32 \(3,\).*R_out = 4"),
    "step range": (changed("step", lambda t: t + 100), ValueError, r"step must be in \[0, 5\), the rows of table, got \d+ at row 0"),
    "parent dtype": (changed("parent", lambda t: t.float()), TypeError, r"parent must be int32 \[R_out\]"),
    "parent range": (changed("parent", lambda t: -t - 1), ValueError, r"parent must be in \[0, 3\), the rows of sample, got -\d at row 0"),
    "parent strided": (changed("parent", lambda t: t.repeat_interleave(2)[::2]), ValueError, "parent must be contiguous"),
    "guidance alone": (changed("uncond_output", lambda t: None), ValueError, "guidance was given without uncond_output"),
    "uncond alone": (changed("guidance", lambda t: None), ValueError, "uncond_output was given without guidance"),
    "uncond dtype": (changed("uncond_output", lambda t: t.float()), TypeError, "uncond_output must be bfloat16"),
    "guidance dtype": (changed("guidance", lambda t: t.double()), TypeError, r"guidance must be float32 \[R_out\]"),
    "guidance count": (changed("guidance", lambda t: t[:1]), ValueError, r"guidance must be .*got float32 \(1,\)"),
    "history count": (changed("history", lambda t: t + t[:1]), ValueError, "history must be at most m1, m2, m3, got 4 tensors"),
    "history dtype": (changed("history", lambda t: (t[0].bfloat16(), *t[1:])), TypeError, r"history\[0\] must be float32"),
    "history shape": (changed("history", lambda t: (*t[:2], t[2][:, :2])), ValueError, r"history\[2\] must be float32 \[R_3, 6\]"),
    "history parents": (changed("history_parent", lambda t: t[:2]), ValueError, "history_parent must be .*got 2 for 3"),
    "history range": (changed("history_parent", lambda t: (*t[:2], t[2] + 9)), ValueError, r"history_parent\[2\] must be in \[0, 6\)"),
    "history missing": (lambda a: a.update(history=(), history_parent=None), ValueError, r"reads history\[0\], which is missing"),
    "last sample": (changed("last_sample", lambda t: t[:1]), ValueError, r"last_sample must be .*got float32 \(1, 6\)"),
    "last missing": (changed("last_sample", lambda t: None), ValueError, "has u1 != 0 and reads last_sample, which is missing"),
    "noise missing": (changed("noise", lambda t: None), ValueError, "has c != 0 and reads noise or seed, which is missing"),
    "noise dtype": (changed("noise", lambda t: t.half()), TypeError, "noise must be float32"),
    "noise rows": (changed("noise", lambda t: t[:3]), ValueError, r"noise must be float32 \[R_out, 6\].*got float32 \(3, 6\)"),
    "noise twice": (lambda a: a.update(seed=torch.zeros(4, dtype=torch.int64)), ValueError, "noise and seed were both given"),
    "index alone": (lambda a: a.update(noise=None, noise_index=a["step"]), ValueError, "noise_index was given without noise"),
    "index range": (lambda a: a.update(noise_index=a["step"] + 4), ValueError, r"noise_index must be in \[0, 4\)"),
    "call alone": (lambda a: a.update(call=a["step"]), ValueError, "call was given without seed"),
    "seed dtype": (lambda a: a.update(noise=None, seed=a["step"]), TypeError, r"seed must be int64 \[R_out\]"),
    "model input": (lambda a: a.update(model_input="triple"), ValueError, "must be one of None, 'single', 'double'; got 'triple'"),
    "out flags": (lambda a: a.update(out_of(a), want_corrected=True), ValueError, "out.corrected is None but want_corrected=True"),
    "out missing": (lambda a: a.update(out_of(a, denoised=lambda t: None)), ValueError, "out.denoised is None but want_denoised=True"),
    "out kind": (lambda a: a.update(out=(None,) * 4), TypeError, "out must be a BranchStepOut, got tuple"),
    "out rows": (
        lambda a: a.update(out=sage_kernels.branch_step(**a, model_input="double"), model_input="single"),
        ValueError,
        r"out.model_input must be 4 rows for 'single', got shape \(8, 6\)",
    ),
    "out with a gradient": (
        lambda a: a.update(out_of(a, sample=torch.Tensor.requires_grad_)), ValueError, "out.sample must not require a gradient"
    ),
    "history of nothing": (changed("history", lambda t: (None, *t[1:])), TypeError, "history must be tensors, newest first, got None"),
    "out dtype": (lambda a: a.update(out_of(a, sample=torch.Tensor.double)), TypeError, "out.sample must be float32"),
    "out shape": (lambda a: a.update(out_of(a, denoised=lambda t: t[:3])), ValueError, r"out.denoised must be .*got float32 \(3, 6\)"),
    "out layout": (lambda a: a.update(out_of(a, sample=lambda t: t.t().contiguous().t())), ValueError, "out.sample must be contiguous"),
    "out shared": (lambda a: a.update(out_of(a, denoised=lambda t: a["noise"])), ValueError, "out.denoised overlaps noise"),
    "out twice": (lambda a: a.update(same_outputs(a)), ValueError, "out.denoised overlaps out.sample"),
    "gradient": (changed("noise", lambda t: t.requires_grad_()), NotImplementedError, "no gradient for noise and it requires one; call it"),
    "gradient into out": (
        lambda a: a.update(out_of(a), sample=a["sample"].requires_grad_()),
        ValueError,
        r"out must be None where a gradient is needed \(sample requires one\)",
    ),
    "backend": (lambda a: a.update(backend="gpu"), ValueError, "backend must be one of auto, reference, cpu, .*got 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_explained(name):
    change, error, message = BAD[name]
    for backend in ("auto", "reference"):
        arguments = good_arguments() | {"backend": backend}
        change(arguments)
        with pytest.raises(error, match=message):
            sage_kernels.branch_step(**arguments)


def over(value, rows, elements):
    """A copy of `value`, and a float32 output [rows, elements] which starts in the same memory."""
    size = value.numel() * value.element_size()
    memory = torch.zeros(max(size, 4 * rows * elements), dtype=torch.uint8)
    copy = memory[:size].view(value.dtype).view(value.shape).copy_(value)
    return copy, memory[: 4 * rows * elements].view(torch.float32).view(rows, elements)


OVERLAPPED = {
    name: (names, i)
    for names in ("sample", "model_output", "table", "step", "parent", "uncond_output", "guidance", "history", "history_parent",
                  "last_sample", "noise", "noise_index", "seed", "call")
    for i, name in enumerate([f"{names}[{k}]" for k in range(3)] if names.startswith("history") else [names])
}  # fmt: skip


@pytest.mark.parametrize("name", OVERLAPPED)
def test_an_output_over_any_input_is_refused(name):
    key, place = OVERLAPPED[name]
    arguments = good_arguments()
    if name == "noise_index":
        arguments["noise_index"] = torch.arange(4, dtype=torch.int32)
    if name in ("seed", "call"):
        arguments |= {"noise": None, "seed": torch.arange(4), "call": torch.arange(4, dtype=torch.int32)}
    value = arguments[key][place] if key.startswith("history") else arguments[key]
    copy, output = over(value, 4, 6)
    arguments[key] = tuple(copy if i == place else t for i, t in enumerate(arguments[key])) if key.startswith("history") else copy
    for backend in ("auto", "reference"):
        for field in ("sample", "denoised"):
            out = sage_kernels.BranchStepOut(torch.empty(4, 6), torch.empty(4, 6), None, None)._replace(**{field: output})
            with pytest.raises(ValueError, match=re.escape(f"out.{field} overlaps {name};")):
                sage_kernels.branch_step(**arguments, out=out, backend=backend)
    assert torch.equal(copy, value)


@pytest.mark.parametrize("name", ["table", "guidance", "noise"])
def test_no_gradient_goes_missing(name):
    arguments = good_arguments()
    arguments[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"no gradient for {name} and it requires one"):
        sage_kernels.branch_step(**arguments)
    with torch.no_grad():
        assert not sage_kernels.branch_step(**arguments).sample.requires_grad


def test_outputs_that_are_written_again_are_known_to_autograd():
    """What was saved for a backward pass must not change unseen."""
    positional, keyword = random_case(seeded(13), 3, 4, (9,))
    out = sage_kernels.branch_step(*positional, **keyword)
    weight = torch.randn(4, 9, requires_grad=True)
    loss = (weight * out.sample).sum()
    with torch.no_grad():
        sage_kernels.branch_step(*positional, **keyword, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inside = sage_kernels.branch_step(*positional, **keyword)
        sage_kernels.branch_step(*positional, **keyword, out=inside)


def test_forward_mode_is_refused():
    positional, keyword = random_case(seeded(14), 3, 4, (9,))
    x, rest = positional[0], positional[1:]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative and sample has a tangent"):
        torch.func.jvp(lambda x: sage_kernels.branch_step(x, *rest, **keyword).sample, (x,), (torch.ones_like(x),))
    groups = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="group_mean: there is no forward-mode derivative and rows has a tangent"):
        torch.func.jvp(lambda x: sage_kernels.group_mean(x, *groups).rows, (x,), (torch.ones_like(x),))


def test_a_gap_in_the_history_stays_a_gap():
    """The raw op may be given m2 without m1; its reference must not move it up."""
    arguments = native_arguments()
    arguments[2] = table_row(p=1.0, a=0.5, b2=0.5).expand(5, -1).contiguous()
    arguments[7] = arguments[10] = None
    results = []
    for name in ("branch_step", "branch_step_reference"):
        arguments[18:22] = [torch.full_like(t, float("nan")) for t in arguments[18:22]]
        getattr(torch.ops.sage_kernels, name)(*arguments)
        results.append(arguments[18])
    assert same_bits(*results) and not results[0].isnan().any()


def native_arguments():
    a = good_arguments()
    rows = [a["noise"].new_empty(4, 6) for _ in range(3)]
    model_input = torch.empty(8, 6, dtype=torch.bfloat16)
    return [
        *(a[k] for k in ("sample", "model_output", "table", "step", "parent", "uncond_output", "guidance")),
        *a["history"], *a["history_parent"], a["last_sample"], a["noise"], None, None, None, *rows, model_input,
    ]  # fmt: skip


@pytest.mark.skipif(isa_refusal("baseline") is not None, reason="no native kernels")
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 6, dtype=torch.float16), "sample must be float32 or model_output's dtype"),
        (1, torch.zeros(3, 6, dtype=torch.float64), "model_output must be float32, bfloat16 or float16"),
        (1, torch.zeros(3, 5, dtype=torch.bfloat16), r"model_output must be rows like Float \(3, 6\)"),
        (1, torch.zeros(2, 6, dtype=torch.bfloat16), "model_output must be 3 rows"),
        (2, torch.zeros(5, 15), "table must be contiguous float32"),
        (3, torch.full((4,), 5, dtype=torch.int32), r"step must be in \[0, 5\), got 5 at row 0"),
        (4, torch.full((4,), -1, dtype=torch.int32), r"parent must be in \[0, 3\), got -1 at row 0"),
        (6, None, "uncond_output and guidance belong together"),
        (9, None, r"reads history\[2\], which is missing"),
        (10, torch.full((4,), 9, dtype=torch.int32), r"history_parent\[0\] must be in \[0, 4\)"),
        (14, None, "reads noise or seed, which is missing"),
        (14, torch.zeros(12, 4).t()[:4, :6], "noise must be dense within each row"),
        (18, torch.zeros(4, 5), "out.sample must be rows like"),
        (21, torch.zeros(5, 6, dtype=torch.bfloat16), "out.model_input must be 4 rows"),
    ],
)  # fmt: skip
def test_the_native_op_refuses_on_its_own(place, value, message):
    arguments = native_arguments()
    torch.ops.sage_kernels.branch_step(*arguments)
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sage_kernels.branch_step(*arguments)


@pytest.mark.parametrize("op", ["branch_step", "branch_step_reference"])
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.sage_kernels, op).default, tuple(native_arguments()))
