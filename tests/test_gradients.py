"""Gradients: the specification's against autograd in float64, every backend's against the specification by bits."""

import pytest
import torch

import sage_kernels
from sage_kernels import autograd, reference
from sage_kernels.testing import DTYPE_NAMES, DTYPES, moved, random_case, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
EVERYTHING = {"want_corrected": True, "model_input": "double"}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def case_of(seed, rows_in=3, rows_out=6, shape=(7,), dtypes=DTYPES[0], **options):
    return random_case(seeded(seed), rows_in, rows_out, shape, dtypes, **{"noise": "tensor", "history_parent": True} | options)


def differentiable(positional, keyword):
    """{name: tensor} of everything that has a gradient, in the order of the backward's results."""
    named = {"sample": positional[0], "model_output": positional[1]}
    if "uncond_output" in keyword:
        named["uncond_output"] = keyword["uncond_output"]
    return named | {"last_sample": keyword["last_sample"]} | {f"m{i + 1}": m for i, m in enumerate(keyword["history"])}


def arguments_with(positional, keyword, named):
    replaced = {name: named[name] for name in ("uncond_output", "last_sample") if name in named}
    history = tuple(named[f"m{i + 1}"] for i in range(len(keyword["history"])))
    return (named["sample"], named["model_output"], *positional[2:]), keyword | replaced | {"history": history}


def gradients(positional, keyword, grads, **options):
    """{name: gradient} through the public op, for given gradients of (sample, denoised, corrected, model_input)."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in differentiable(positional, keyword).items()}
    positional, keyword = arguments_with(positional, keyword, leaves)
    outputs = sage_kernels.branch_step(*positional, **keyword, **EVERYTHING, **options)
    used = [(o, g) for o, g in zip(outputs, grads) if g is not None]
    found = torch.autograd.grad([o for o, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True)
    return dict(zip(leaves, found))


def random_grads(seed, positional, keyword):
    with torch.no_grad():
        outputs = sage_kernels.branch_step(*positional, **keyword, **EVERYTHING, backend="reference")
    return [torch.randn(o.shape, generator=seeded(seed)).to(o.dtype) for o in outputs]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_the_specification_is_the_derivative_of_the_specification(seed, guided):
    """reference.branch_step_backward in float64 against autograd through reference.branch_step in float64."""
    positional, keyword = case_of(seed, guided=guided)
    leaves = {name: t.double().requires_grad_() for name, t in differentiable(positional, keyword).items()}
    forward, options = arguments_with(positional, keyword, leaves)
    outputs = reference.branch_step(*forward, **options, dtype=torch.float64)
    grads = [torch.randn(o.shape, generator=seeded(99), dtype=torch.float64) for o in outputs]
    expected = torch.autograd.grad(outputs, list(leaves.values()), grads)

    x, y, table, step, parent = positional
    uncond, guidance = keyword.get("uncond_output"), keyword.get("guidance")
    through = {name: parent for name in leaves} | dict(zip(("m1", "m2", "m3"), keyword["history_parent"]))
    names = ("sample", "model_output", "uncond_output", "last_sample", "m1", "m2", "m3")
    for name, wanted in zip(leaves, expected):
        segments = autograd._segments(through[name], len(leaves[name]))
        results = reference.branch_step_backward(
            (grads[0], grads[1], grads[2], grads[3]), table, step, parent, x, y, uncond, guidance, *segments, dtype=torch.float64
        )
        assert torch.allclose(results[names.index(name)], wanted, rtol=1e-12, atol=1e-12), name
        assert wanted.abs().max() > 0, name


def test_segments_list_the_children_of_every_row_in_order():
    indptr, children = autograd._segments(int32(2, 0, 2, 2, 4), 6)
    assert indptr.tolist() == [0, 1, 1, 4, 4, 5, 5] and children.tolist() == [1, 0, 2, 3, 4]
    assert indptr.dtype == children.dtype == torch.int32
    indptr, children = autograd._segments(int32(), 2)
    assert indptr.tolist() == [0, 0, 0] and children.tolist() == []


@pytest.mark.parametrize("elements", [1, 7, 64, 4099])
@pytest.mark.parametrize("rows_out", [0, 1, 3, 33])
def test_backends_equal_the_specification(runner, rows_out, elements):
    for seed, dtypes in enumerate(DTYPES):
        positional, keyword = case_of(seed, 3, rows_out, (elements,), dtypes, guided=seed != 1, history_parent=seed % 2 == 0)
        grads = random_grads(seed, positional, keyword)
        for present in ((1, 1, 1, 1), (1, 0, 0, 0), (0, 0, 0, 1), (0, 1, 1, 0)):
            given = [g if there else None for g, there in zip(grads, present)]
            expected = gradients(positional, keyword, given, backend="reference")
            on_device = moved(positional, runner.device), moved(keyword, runner.device), moved(given, runner.device)
            result = gradients(*on_device, backend=runner.backend)
            for name, wanted in expected.items():
                assert same_bits(moved(result[name], "cpu"), wanted), (name, present)


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_NAMES)
def test_gradients_come_in_the_dtypes_of_their_inputs_and_the_forward_bits_do_not_change(dtypes):
    positional, keyword = case_of(3, dtypes=dtypes)
    with torch.no_grad():
        expected = sage_kernels.branch_step(*positional, **keyword, **EVERYTHING)
    leaf = positional[0].clone().requires_grad_()
    result = sage_kernels.branch_step(leaf, *positional[1:], **keyword, **EVERYTHING)
    assert all(same_bits(a.detach(), b) for a, b in zip(result, expected))
    for name, grad in gradients(positional, keyword, random_grads(1, positional, keyword)).items():
        assert grad.dtype == (dtypes[0] if name in ("model_output", "uncond_output") else dtypes[1]), name


@pytest.mark.parametrize("model_input", [None, "single", "double"])
def test_every_set_of_outputs_can_be_differentiated(model_input):
    positional, keyword = case_of(4)
    leaf = positional[1].clone().requires_grad_()
    out = sage_kernels.branch_step(positional[0], leaf, *positional[2:], **keyword, model_input=model_input)
    assert out.corrected is None and (out.model_input is None) == (model_input is None)
    total = out.sample.sum() + (0 if model_input is None else out.model_input.sum())
    (grad,) = torch.autograd.grad(total, leaf)
    ones = torch.ones_like(out.sample)
    copies = {None: None, "single": torch.cat([ones, 0 * ones]), "double": torch.cat([ones, ones])}[model_input]
    assert same_bits(grad, gradients(positional, keyword, [ones, None, None, copies])["model_output"])
    bare = sage_kernels.branch_step(positional[0], leaf, *positional[2:], **keyword, want_denoised=False)
    assert bare.denoised is None
    (grad,) = torch.autograd.grad(bare.sample.sum(), leaf)
    assert same_bits(grad, gradients(positional, keyword, [ones, None, None, None])["model_output"])


def test_a_parent_gets_the_sum_over_its_children_and_a_childless_row_zero():
    positional, keyword = case_of(5, guided=False)
    parent = int32(0, 2, 0, 0, 2, 0)
    positional = (*positional[:4], parent)
    keyword["history_parent"] = (parent,) * 3
    grads = random_grads(2, positional, keyword)
    together = gradients(positional, keyword, grads)
    for name, total in together.items():
        assert not total[1].any(), name
        alone = torch.zeros_like(total)
        for r in range(6):
            only = [torch.zeros_like(g).index_copy_(0, torch.tensor([r]), g[r : r + 1]) for g in grads[:3]]
            only.append(torch.zeros_like(grads[3]))
            only[3][[r, 6 + r]] = grads[3][[r, 6 + r]]
            alone = alone + gradients(positional, keyword, only)[name]
        assert torch.allclose(total, alone, rtol=1e-5, atol=1e-5), name


def test_the_backward_is_the_transpose_of_the_forward():
    """<J v, u> = <v, J^T u>, with J v as the difference of two forward runs (the op is linear where nothing is clamped)."""
    positional, keyword = case_of(6, noise=None)
    positional[2][:, 15] = float("inf")
    named = differentiable(positional, keyword)
    direction = {name: torch.randn(t.shape, generator=seeded(7)) for name, t in named.items()}
    run = lambda values: reference.branch_step(*values[0], **values[1], dtype=torch.float64)  # noqa: E731
    ahead = run(arguments_with(positional, keyword, {n: t.double() + direction[n].double() for n, t in named.items()}))
    here = run((positional, keyword))
    grads = random_grads(8, positional, keyword)
    doubled = [(a - b).float() for a, b in zip(ahead, here)]
    doubled[3] = torch.cat([doubled[3]] * 2)
    forward = sum((a.double() * u.double()).sum() for a, u in zip(doubled, grads))
    found = gradients(positional, keyword, grads)
    backward = sum((direction[name].double() * grad.double()).sum() for name, grad in found.items())
    assert abs(forward - backward) <= 1e-4 * abs(forward)


def test_no_gradient_flows_where_the_clamp_holds():
    zero = int32(0)
    y = torch.tensor([[-3.0, -1.0, -0.5, 1.0, 3.0, float("nan")]], requires_grad=True)
    out = sage_kernels.branch_step(torch.zeros(1, 6), y, sage_kernels.testing.table_row(q=1.0, b0=2.0, clip=1.0), zero, zero)
    out.sample.sum().backward()
    assert y.grad.tolist() == [[0.0, 2.0, 2.0, 2.0, 0.0, 2.0]]


def test_coefficients_of_zero_let_no_nan_back(device):
    """A gradient never meets an input that the row did not read."""
    zero = int32(0).to(device)
    nan = torch.full((1, 5), float("nan"), device=device)
    x = torch.ones(1, 5, device=device, requires_grad=True)
    row = sage_kernels.testing.table_row(p=1.0, a=0.5, b0=0.5, clip=9.0).to(device)
    out = sage_kernels.branch_step(x, nan, row, zero, zero, history=(nan, nan, nan), last_sample=nan)
    out.sample.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_gradients_reproduce(device):
    positional, keyword = case_of(9, 2, 33, (1000,), device=device)
    grads = moved(random_grads(1, moved(positional, "cpu"), moved(keyword, "cpu")), device)
    first, second = (gradients(positional, keyword, grads) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in first)


def test_gradients_of_group_mean_reproduce_where_groups_overlap(device):
    rows = torch.randn(5, 1000, generator=seeded(12)).to(device).requires_grad_()
    indptr, members = int32(0, 4, 9).to(device), int32(0, 1, 1, 2, 4, 1, 1, 2, 0).to(device)
    grad = torch.randn(2, 1000, generator=seeded(13)).to(device)
    first, second = (torch.autograd.grad(sage_kernels.group_mean(rows, indptr, members).rows, rows, grad)[0] for _ in range(2))
    assert same_bits(first, second) and not first[3].any()
    weights = torch.tensor([[1, 2, 1, 0, 0], [1, 2, 1, 0, 1]], device=device) / torch.tensor([[4.0], [5.0]], device=device)
    assert torch.allclose(first, weights.T @ grad, rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_refused():
    positional, keyword = case_of(10)
    x = positional[0].clone().requires_grad_()
    out = sage_kernels.branch_step(x, *positional[1:], **keyword)
    with pytest.raises(NotImplementedError, match="branch_step: there is no second derivative; use create_graph=False"):
        torch.autograd.grad(out.sample.pow(2).sum(), x, create_graph=True)
    mean = sage_kernels.group_mean(x, int32(0, 2), int32(0, 2)).rows
    with pytest.raises(NotImplementedError, match="group_mean: there is no second derivative"):
        torch.autograd.grad(mean.pow(2).sum(), x, create_graph=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_training_step_through_a_branch_learns(backend):
    """Two calls with a branch between them: the loss falls along the gradient as a first-order step says it should."""
    positional, keyword = case_of(11, 2, 4, (9,), noise=None)
    row, zeros = positional[2][:1].clone(), int32(0, 0, 0, 0)
    row[:, 15] = float("inf")

    def loss(y):
        first = sage_kernels.branch_step(
            positional[0], y, row, zeros[:2], int32(0, 1), history=(y * 0.5, y * 0.1, y * 0.2), last_sample=y * 0.3, backend=backend
        )
        second = sage_kernels.branch_step(
            first.sample, y.flip(0), row, zeros, int32(1, 0, 1, 1), history=(first.denoised, y, y), last_sample=y, backend=backend
        )
        return second.sample.double().pow(2).mean()

    y = positional[1].clone().requires_grad_()
    value = loss(y)
    (grad,) = torch.autograd.grad(value, y)
    step = 1e-3 / grad.norm()
    fallen = (value - loss(y.detach() - step * grad)).item()
    assert fallen == pytest.approx(1e-3 * grad.norm().item(), rel=0.05)


def functional_arguments(**options):
    positional, keyword = case_of(12, **options)
    named = {name: t.clone().requires_grad_() for name, t in differentiable(positional, keyword).items()}
    (x, y, *rest), keyword = arguments_with(positional, keyword, named)
    return (
        x, y, *rest, keyword.get("uncond_output"), keyword.get("guidance"), *keyword["history"], *keyword["history_parent"],
        keyword["last_sample"], keyword["noise"], None, None, None,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("guided", [True, False])
def test_opcheck_of_the_functional_form(backend, guided):
    arguments = (*functional_arguments(guided=guided), True, True, 2, backend)
    torch.library.opcheck(torch.ops.sage_kernels.branch_step_functional.default, arguments)


@pytest.mark.parametrize("op", ["branch_step_backward", "branch_step_backward_reference"])
def test_opcheck_of_the_backward(op):
    positional, keyword = case_of(13)
    grads = random_grads(1, positional, keyword)
    x, y, table, step, parent = positional
    segments = autograd._segments(parent, len(x))
    outputs = [torch.empty_like(t) for t in (x, y, y, x)] + [None] * 3
    arguments = (*grads, table, step, parent, x, y, keyword["uncond_output"], keyword["guidance"], *segments, *outputs)
    torch.library.opcheck(getattr(torch.ops.sage_kernels, op).default, arguments)


def test_compiles_into_one_graph_with_the_same_gradients():
    positional, keyword = case_of(14, shape=(70,))

    def loss(x, y):
        out = sage_kernels.branch_step(x, y, *positional[2:], **keyword, **EVERYTHING)
        return out.sample.sum() + out.denoised.mul(2).sum() + out.corrected.sum() + out.model_input.sum()

    def grads(run):
        leaves = [t.clone().requires_grad_() for t in positional[:2]]
        return torch.autograd.grad(run(*leaves), leaves)

    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    assert all(same_bits(a, b) for a, b in zip(grads(compiled), grads(loss)))
