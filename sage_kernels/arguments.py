"""Argument checks with messages that say what was wanted, what came and what to do.

The native `branch_step` checks the same things, tersely: there only `check_flags` and `check_gradient` run on every call, and the
others to explain a refusal. Everything runs for Triton, for the reference, where a gradient is needed and under torch.compile;
`check_normals` and `check_groups` run on every call of their ops.
"""

import functools
import warnings

import torch
from torch.autograd import forward_ad

from sage_kernels.allocation import MODEL_INPUT
from sage_kernels.coefficients import COLUMNS

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float16)
# The native op's inputs, in its order; ROW_INPUTS are those of shape [rows, *shape].
INPUTS = (
    "sample", "model_output", "table", "step", "parent", "uncond_output", "guidance", "history[0]", "history[1]", "history[2]",
    "history_parent[0]", "history_parent[1]", "history_parent[2]", "last_sample", "noise", "noise_index", "seed", "call",
)  # fmt: skip
NO_GRADIENT = {"table", "guidance", "noise"}
ROW_INPUTS = {"sample", "model_output", "uncond_output", "history[0]", "history[1]", "history[2]", "last_sample", "noise"}
# Table columns that read an input which may be missing.
READERS = {
    "noise or seed": ("c",),
    "last_sample": ("u1",),
    "history[0]": ("u3", "b1"),
    "history[1]": ("u4", "b2"),
    "history[2]": ("u5",),
}


def _names(dtypes):
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def _describe(value):
    """'int64 (4,) on cpu' for a tensor, else its type."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{_names([value.dtype])} {tuple(value.shape)} on {value.device}"


def _refuse(error, op, name, wanted, got, remedy):
    raise error(f"{op}: {name} must be {wanted}, got {got}; {remedy}")


def _tensor(name, value, dtypes, sizes, device, op="branch_step"):
    """`sizes`: (label, size) for each dimension, size None for any."""
    labels = ", ".join(label for label, _ in sizes)
    wanted = f"{_names(dtypes)} [{labels}] on {device}"
    if not isinstance(value, torch.Tensor):
        _refuse(TypeError, op, name, wanted, _describe(value), "pass a tensor")
    if value.dtype not in dtypes:
        _refuse(TypeError, op, name, wanted, _describe(value), f"use {name}.to({dtypes[0]})")
    if value.device != device:
        _refuse(TypeError, op, name, wanted, _describe(value), f"use {name}.to({str(device)!r})")
    if value.dim() != len(sizes) or any(size not in (None, n) for (_, size), n in zip(sizes, value.shape)):
        known = ", ".join(f"{label} = {size}" for label, size in sizes if size is not None and label != str(size))
        _refuse(ValueError, op, name, wanted, _describe(value), f"here {known}" if known else "see the documented shapes")


def _vector(name, value, dtype, rows, device):
    _tensor(name, value, (dtype,), (("R_out", rows),), device)
    if not value.is_contiguous():
        _refuse(ValueError, "branch_step", name, "contiguous", f"stride {value.stride()}", f"use {name}.contiguous()")


def _readable(device):
    """True where looking at values does not wait for a device and values exist."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _index(name, value, rows, bound, device, what):
    _vector(name, value, torch.int32, rows, device)
    if _readable(device):
        outside = (value < 0) | (value >= bound)
        if outside.any():
            row = int(outside.nonzero()[0])
            wanted = f"in [0, {bound}), the rows of {what}"
            _refuse(ValueError, "branch_step", name, wanted, f"{int(value[row])} at row {row}", "check the plan's indices")


def check_flags(history, history_parent, parent, out, want_denoised, want_corrected, model_input):
    """What the native op cannot see: `model_input` is known, preallocated outputs are there exactly when asked for and as often,
    and the history has at most three tensors with an index each."""
    if len(history) > 3:
        _refuse(ValueError, "branch_step", "history", "at most m1, m2, m3", f"{len(history)} tensors", "pass the newest three")
    if history_parent is not None and len(history_parent) != len(history):
        count = f"{len(history_parent)} for {len(history)} history tensors"
        wanted = "None or one index tensor per history tensor"
        _refuse(ValueError, "branch_step", "history_parent", wanted, count, "pass one for each")
    for name, values in (("history", history), ("history_parent", history_parent or ())):
        if any(value is None for value in values):
            _refuse(TypeError, "branch_step", name, "tensors, newest first", "None among them", "leave out what is missing at the end")
    if model_input not in MODEL_INPUT:
        known = ", ".join(map(repr, MODEL_INPUT))
        raise ValueError(f"branch_step: model_input must be one of {known}; got {model_input!r}")
    if out is None:
        return
    if not hasattr(out, "model_input"):
        _refuse(TypeError, "branch_step", "out", "a BranchStepOut", type(out).__name__, "use sage_kernels.BranchStepOut(...)")
    asked = (("denoised", "want_denoised", want_denoised), ("corrected", "want_corrected", want_corrected))
    for name, flag, value in (*asked, ("model_input", "model_input", model_input)):
        present = getattr(out, name) is not None
        if present != bool(value):
            raise ValueError(f"branch_step: out.{name} is {'a tensor' if present else 'None'} but {flag}={value!r}; make them agree")
    wanted = MODEL_INPUT.index(model_input) * parent.shape[0] if isinstance(parent, torch.Tensor) and parent.dim() else None
    if model_input is not None and wanted is not None and out.model_input.shape[:1] != (wanted,):
        given = tuple(out.model_input.shape)
        _refuse(ValueError, "branch_step", "out.model_input", f"{wanted} rows for {model_input!r}", f"shape {given}", "make them agree")


def check_tangents(op, named):
    """Refuse rather than return a result whose forward-mode derivative is silently missing."""
    if forward_ad._current_level < 0:
        return
    for name, value in named:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{op}: there is no forward-mode derivative and {name} has a tangent; use reverse mode")


def check_gradient(inputs, out):
    """True if the result must be differentiable. Refuse rather than return one whose gradient is silently missing."""
    check_tangents("branch_step", zip(INPUTS, inputs))
    if not torch.is_grad_enabled():
        return False
    for name, value in zip(getattr(out, "_fields", ()), out or ()):
        if getattr(value, "requires_grad", False):
            raise ValueError(f"branch_step: out.{name} must not require a gradient, got one that does; detach it, or use no_grad()")
    needing = [name for name, value in zip(INPUTS, inputs) if getattr(value, "requires_grad", False)]
    for name in needing:
        if name in NO_GRADIENT:
            raise NotImplementedError(
                f"branch_step: there is no gradient for {name} and it requires one; call it under torch.no_grad(), or detach {name}"
            )
    if needing and out is not None:
        raise ValueError(
            f"branch_step: out must be None where a gradient is needed ({needing[0]} requires one), got tensors; "
            f"leave it out, or call it under torch.no_grad()"
        )
    return bool(needing)


def check_inputs(inputs, history, history_parent):
    """Check all inputs, given in the order of INPUTS."""
    got = dict(zip(INPUTS, inputs))
    _check_core(got)
    device, shape, rows = got["sample"].device, _shape(got["sample"]), len(got["parent"])
    _check_guidance(got, rows)
    _check_history(got, history, history_parent, rows)
    if got["last_sample"] is not None:
        sizes = (("R_in", len(got["sample"])), *shape)
        _tensor("last_sample", got["last_sample"], (got["sample"].dtype,), sizes, device)
    _check_noise(got, shape, rows, device)
    if _readable(device):
        _check_needs(got)


def _shape(sample):
    return tuple((str(n), n) for n in sample.shape[1:])


def _check_core(got):
    sample, model_output, table, step, parent = (got[name] for name in INPUTS[:5])
    for name, value in (("sample", sample), ("model_output", model_output)):
        if not isinstance(value, torch.Tensor):
            _refuse(TypeError, "branch_step", name, "a tensor [R_in, *shape]", _describe(value), "pass a tensor")
    if sample.dim() == 0:
        _refuse(ValueError, "branch_step", "sample", "[R_in, *shape]", _describe(sample), "add a row dimension: sample[None]")
    device, sizes = sample.device, (("R_in", len(sample)), *_shape(sample))
    _tensor("model_output", model_output, MODEL_DTYPES, sizes, device)
    states = tuple(dict.fromkeys((torch.float32, model_output.dtype)))
    if sample.dtype not in states:
        wanted = f"{_names(states)} (float32 or model_output's dtype)"
        _refuse(TypeError, "branch_step", "sample", wanted, _describe(sample), "use sample.float()")
    _tensor("table", table, (torch.float32,), (("rows", None), ("16", len(COLUMNS))), device)
    if not table.is_contiguous():
        _refuse(ValueError, "branch_step", "table", "contiguous", f"strides {table.stride()}", "use table.contiguous()")
    _index("parent", parent, None, len(sample), device, "sample")
    _index("step", step, len(parent), len(table), device, "table")


def _check_guidance(got, rows):
    uncond, guidance, model_output = got["uncond_output"], got["guidance"], got["model_output"]
    if (uncond is None) != (guidance is None):
        given, wanted = ("guidance", "uncond_output") if uncond is None else ("uncond_output", "guidance")
        raise ValueError(f"branch_step: {given} was given without {wanted}; pass both, or neither for an unguided step")
    if guidance is not None:
        sizes = (("R_in", len(model_output)), *_shape(model_output))
        _tensor("uncond_output", uncond, (model_output.dtype,), sizes, model_output.device)
        _vector("guidance", guidance, torch.float32, rows, model_output.device)


def _check_history(got, history, history_parent, rows):
    sample = got["sample"]
    for i, tensor in enumerate(history):
        _tensor(f"history[{i}]", tensor, (sample.dtype,), ((f"R_{i + 1}", None), *_shape(sample)), sample.device)
        name = "parent" if history_parent is None else f"history_parent[{i}]"
        _index(name, got[name], rows, len(tensor), sample.device, f"history[{i}]")


def _check_noise(got, shape, rows, device):
    noise, noise_index, seed, call = (got[name] for name in ("noise", "noise_index", "seed", "call"))
    if noise is not None and seed is not None:
        raise ValueError("branch_step: noise and seed were both given; pass the noise tensor, or seeds for Philox noise")
    for name, value, other, wanted in (("noise_index", noise_index, noise, "noise"), ("call", call, seed, "seed")):
        if value is not None and other is None:
            raise ValueError(f"branch_step: {name} was given without {wanted}; pass {wanted} too, or leave {name} out")
    if noise is not None:
        first = ("R_out", rows) if noise_index is None else ("R_noise", None)
        _tensor("noise", noise, (torch.float32,), (first, *shape), device)
    if noise_index is not None:
        _index("noise_index", noise_index, rows, len(noise), device, "noise")
    if seed is not None:
        _vector("seed", seed, torch.int64, rows, device)
    if call is not None:
        _vector("call", call, torch.int32, rows, device)


def _check_needs(got):
    """Every input that a used table row reads is there."""
    used = dict(zip(COLUMNS, (got["table"][got["step"].long()] != 0).any(0).tolist()))
    for name, columns in READERS.items():
        present = any(got[part] is not None for part in name.split(" or "))
        reading = [column for column in columns if used[column]]
        if reading and not present:
            raise ValueError(f"branch_step: a used table row has {reading[0]} != 0 and reads {name}, which is missing; pass it")


def check_outputs(out, inputs, model_input):
    """Preallocated outputs: dtype, shape, dense, and apart from every input and each other."""
    if out is None:
        return
    sample, model_output, rows = inputs[0], inputs[1], len(inputs[4])
    copies = 2 if model_input == "double" else 1
    shape, outputs = _shape(sample), []
    for name, value in zip(out._fields, out):
        if value is None and name != "sample":
            continue
        dtype, first = sample.dtype, ("R_out", rows)
        if name == "model_input":
            dtype, first = model_output.dtype, ("2 * R_out" if copies == 2 else "R_out", copies * rows)
        _tensor(f"out.{name}", value, (dtype,), (first, *shape), sample.device)
        if not value.is_contiguous():
            _refuse(ValueError, "branch_step", f"out.{name}", "contiguous", f"strides {value.stride()}", "use torch.empty")
        outputs.append((f"out.{name}", value))
    if not torch.compiler.is_compiling():
        _check_apart(outputs, [(name, value) for name, value in zip(INPUTS, inputs) if value is not None])


def _span(tensor):
    """First and one past the last byte; rows with a stride leave gaps inside."""
    first = tensor.data_ptr()
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return first, first + (reach + 1) * tensor.itemsize


def _check_apart(outputs, inputs):
    taken = [(name, *_span(value)) for name, value in inputs if value.numel()]
    for name, value in outputs:
        if value.numel() == 0:
            continue
        first, last = _span(value)
        for other, begin, end in taken:
            if first < end and begin < last:
                raise ValueError(f"branch_step: {name} overlaps {other}; give each output memory of its own (swap two buffers)")
        taken.append((name, first, last))


def _rows_are_dense(value):
    expected = 1
    for size, stride in zip(reversed(value.shape[1:]), reversed(value.stride()[1:])):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@functools.cache
def _warn_copied(name):
    warnings.warn(
        f"branch_step: {name} has rows that are not dense (channels_last?) and is copied on every call; "
        f"pass {name}.contiguous() to choose where that happens",
        RuntimeWarning,
        stacklevel=4,
    )


def dense_rows(inputs):
    """The same inputs; those whose rows are not dense are copied, with a warning. The same tuple if there are none."""
    copied = {
        i: value.contiguous()
        for i, (name, value) in enumerate(zip(INPUTS, inputs))
        if name in ROW_INPUTS and value is not None and value.numel() and not _rows_are_dense(value)
    }
    if not copied:
        return inputs
    for i in copied:
        _warn_copied(INPUTS[i])
    return tuple(copied.get(i, value) for i, value in enumerate(inputs))


def check_normals(seed, call, n, tag):
    """Check the arguments of `normals`."""
    device = getattr(seed, "device", torch.device("cpu"))
    _tensor("seed", seed, (torch.int64,), (("R", None),), device, op="normals")
    _tensor("call", call, (torch.int32,), (("R", len(seed)),), device, op="normals")
    for name, value in (("seed", seed), ("call", call)):
        if not value.is_contiguous():
            _refuse(ValueError, "normals", name, "contiguous", f"stride {value.stride()}", f"use {name}.contiguous()")
    for name, value, bound, remedy in (("n", n, None, "it counts the elements of a row"), ("tag", tag, 2**32, "it is one 32-bit word")):
        if not isinstance(value, (int, torch.SymInt)):
            _refuse(TypeError, "normals", name, "an int", type(value).__name__, remedy)
        if value < 0 or (bound is not None and value >= bound):
            _refuse(ValueError, "normals", name, "at least 0" if bound is None else f"in [0, {bound})", value, remedy)


def check_groups(rows, indptr, members, mask):
    """Check the arguments of `group_mean`."""
    op = "group_mean"
    check_tangents(op, (("rows", rows), ("mask", mask)))
    if torch.is_grad_enabled() and getattr(mask, "requires_grad", False):
        raise NotImplementedError("group_mean: there is no gradient for mask and it requires one; detach it, or use no_grad()")
    for name, value, dtypes in (("rows", rows, (torch.float64, *MODEL_DTYPES)), ("mask", mask, MASK_DTYPES)):
        if name == "mask" and value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            _refuse(TypeError, op, name, f"a tensor of {_names(dtypes)}, a row per member", _describe(value), "pass a tensor")
        sizes = (("B", None if name == "rows" else len(rows)), *_shape(value))
        _tensor(name, value, dtypes, sizes, rows.device, op)
    _tensor("indptr", indptr, (torch.int32,), (("R + 1", None),), rows.device, op)
    _tensor("members", members, (torch.int32,), (("n", None),), rows.device, op)
    for name, value in (("indptr", indptr), ("members", members)):
        if not value.is_contiguous():
            _refuse(ValueError, op, name, "contiguous", f"stride {value.stride()}", f"use {name}.contiguous()")
    if len(indptr) == 0:
        _refuse(ValueError, op, "indptr", "at least one value", _describe(indptr), "no groups are [0]")
    if _readable(rows.device) and not hasattr(rows, "fake_mode"):  # a FakeTensor has no values
        _check_group_values(indptr, members, len(rows))


def _check_group_values(indptr, members, rows):
    if indptr[0] != 0 or indptr[-1] != len(members) or (indptr[1:] <= indptr[:-1]).any():
        wanted = f"ascending from 0 to len(members) = {len(members)}, no group empty"
        got = f"{indptr.tolist() if len(indptr) < 9 else indptr[:8].tolist() + ['...']}"
        _refuse(ValueError, "group_mean", "indptr", wanted, got, "check the groups")
    outside = ((members < 0) | (members >= rows)).nonzero()
    if len(outside):
        at = int(outside[0])
        wanted = f"in [0, {rows}), the rows of rows"
        _refuse(ValueError, "group_mean", "members", wanted, f"{int(members[at])} at {at}", "check the groups")


def dense_groups(rows, mask):
    """`rows` and `mask` with every row dense."""
    return tuple(t if t is None or t.numel() == 0 or _rows_are_dense(t) else t.contiguous() for t in (rows, mask))
