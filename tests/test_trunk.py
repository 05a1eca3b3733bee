"""sage.Trunk: what joins a kept trunk is what it would have been as a member of the group; files; refusals."""

import dataclasses

import native_cases
import pytest
import torch
from hand_branch import GUIDANCE, LEAVES, SEEDS, SHAPE, STEPS, Row, Setting
from measures import worst
from native_cases import CASES, Rows
from safetensors import safe_open
from safetensors.torch import save_file
from test_graphs import tapes  # noqa: F401, a fixture
from tiny import PROMPTS, stable_diffusion

import sage
from sage import Leaf, Node, SharingPlan, Trunk

pytestmark = pytest.mark.usefixtures("one_thread")
GROUP, LATER = [0, 2, 4], [1, 3]
PLAN = SharingPlan.flat(LEAVES, [GROUP], 0.5, representatives=[2], encoder="none")  # parts after 3 of 6 calls
NEWCOMERS = SharingPlan.independent([LEAVES[i] for i in LATER])
SOLVERS = ("ddim", "dpm++2m", "dpm++3m", "unipc", "euler-a", "dpm++2m-sde", "heun")


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


def kept(setting, plan=PLAN, **options):
    """(pictures, trunks by root) of a run."""
    trunks = {}
    return setting.sample(plan, on_part=trunks.__setitem__, **options), trunks


def elementwise(model_input, timestep, conditions):
    """A denoiser that computes every row by itself, so that equal inputs give equal bits in any batch."""
    phase = (timestep / 300).cos() + conditions.float().mean(1)
    x = model_input.float()
    return (torch.tanh(x * 0.7 + phase.view(-1, 1, 1, 1)) + 0.1 * x.roll(1, -1)).to(model_input.dtype)


# ---- joining


@pytest.mark.parametrize("solver", SOLVERS)
def test_newcomers_get_what_they_would_have_got_as_members(pipe, solver, tmp_path):
    """By hand: the saved group's trunk, copied at the branch for prompts that were not among its members."""
    setting = Setting(pipe, solver)
    trunks = kept(setting)[1]
    trunks[0].save(tmp_path / "trunk.safetensors")
    setting.rows.clear()
    got = setting.sample(NEWCOMERS, Trunk.load(tmp_path / "trunk.safetensors"), LATER)
    calls = len(setting.table)
    parted = trunks[0].call
    assert parted == calls // 2 + (solver == "heun") and setting.rows == [2 * len(LATER)] * (calls - parted)
    trunk = Row(setting, setting.x_init[2:3]).run(parted, GROUP, noise_of=2)
    expected = torch.stack([trunk.copy().finish(leaf) for leaf in LATER])
    assert worst(got, expected) <= 2e-6
    alone = torch.stack([Row(setting, setting.x_init[leaf : leaf + 1]).finish(leaf) for leaf in LATER])
    assert min(worst(a, b) for a, b in zip(got, alone)) > 1e-2


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_member_that_joins_later_has_the_bits_it_had(pipe, solver, dtypes):
    """Also in half precision, where the latents are rounded and the model input is not made from the rounded ones."""
    state, model = dtypes
    setting = Setting(pipe, solver)
    conditions = torch.randn(len(LEAVES), 5, generator=torch.Generator().manual_seed(1))
    trunks = {}

    def run(plan, x_init, leaves, **options):
        given = dict(negative_conditions=-conditions[leaves], guidance_scale=GUIDANCE)
        given |= dict(seeds=torch.tensor(SEEDS)[leaves]) if setting.table.stochastic else {}
        denoise = lambda x, t, c: elementwise(x.to(model), t, c)  # noqa: E731
        return sage.sample(denoise, plan, setting.table, x_init, conditions[leaves], **given, **options)

    whole = run(PLAN, setting.x_init.to(state), list(range(len(LEAVES))), on_part=trunks.__setitem__)
    joined = run(SharingPlan.independent([LEAVES[4], LEAVES[0]]), trunks[0], [4, 0])
    assert joined.dtype == state and torch.equal(joined, whole[[4, 0]])
    assert not torch.equal(joined, run(SharingPlan.independent([LEAVES[4], LEAVES[0]]), setting.x_init[[4, 0]].to(state), [4, 0]))


def test_newcomers_may_share_among_themselves(pipe):
    """The plan counts in the calls that remain, and its nodes may be kept again."""
    setting = Setting(pipe, "dpm++3m", steps=8)
    trunk = kept(setting)[1][0]
    setting.rows.clear()
    pair = SharingPlan.flat([LEAVES[i] for i in LATER], [[0, 1]], 0.5, representatives=[1])
    counted = []
    got, later = kept(setting, pair, x_init=trunk, leaves=LATER, on_call=counted.append)
    assert trunk.call == 4 and counted == [1, 1, 2, 2] and setting.rows == [2, 2, 4, 4]
    by_hand = Row(setting, setting.x_init[2:3]).run(4, GROUP).run(2, LATER)
    assert worst(got, torch.stack([by_hand.copy().finish(leaf) for leaf in LATER])) <= 2e-6
    assert later[0].call == 6 and len(later[0].history) == 2 and later[0].record["prompt"] == PROMPTS[3]
    again = setting.sample(SharingPlan.independent([LEAVES[0]]), later[0], [0])
    assert worst(again[0], by_hand.copy().finish(0)) <= 2e-6


def test_a_tree_and_several_groups(pipe):
    """Every root is handed over once, where it first parts; what runs alone or never parts is not."""
    pair = Node((0, 2), 0, 0.8, (Node.single(0), Node.single(2)))
    other = Node((1, 3), 3, 0.34, (Node.single(1), Node.single(3)))
    tree = SharingPlan.tree(LEAVES, [Node((0, 2, 4), 4, 0.5, (pair, Node.single(4))), other])
    trunks = kept(Setting(pipe, "unipc"), tree)[1]
    assert {root: trunk.call for root, trunk in trunks.items()} == {0: 3, 1: 2}
    assert kept(Setting(pipe, "unipc"), SharingPlan.flat(LEAVES, [GROUP], 1.0))[1] == {}
    assert kept(Setting(pipe, "unipc"), SharingPlan.flat(LEAVES, [GROUP], 0.0))[1] == {}


def test_noise_of_the_caller_is_asked_for_by_the_call_of_the_table(pipe):
    setting, asked = Setting(pipe, "euler-a"), []

    def noise(rows):
        def draw(call):
            asked.append(call)
            return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(call))

        return draw

    trunk = kept(setting, seeds=None, noise=noise(5))[1][0]
    assert asked == list(range(STEPS))
    asked.clear()
    setting.sample(NEWCOMERS, trunk, LATER, seeds=None, noise=noise(2))
    assert asked == [3, 4, 5]


@pytest.mark.parametrize("solver", ["ddim", "dpm++3m", "unipc"])
def test_replayed_graphs_keep_and_join_as_the_eager_loop_does(pipe, tapes, solver):  # noqa: F811
    setting = Setting(pipe, solver)
    trunk = kept(setting)[1][0]
    replayed = kept(setting, graphs=True)[1][0]
    for name in ("sample", "model_input"):
        assert worst(getattr(replayed, name), getattr(trunk, name)) <= 1e-6
    eager = setting.sample(NEWCOMERS, trunk, LATER)
    assert worst(setting.sample(NEWCOMERS, replayed, LATER, graphs=True), eager) <= 1e-6
    assert len(tapes) == 2


# ---- files


@pytest.fixture
def trunk(pipe):
    return kept(Setting(pipe, "unipc"))[1][0]


def tensors(trunk):
    return trunk.sample, trunk.model_input, trunk.last_sample, *trunk.history


def test_a_file_gives_back_every_bit(trunk, tmp_path):
    path = tmp_path / "a trunk.safetensors"
    trunk.save(path)
    again = Trunk.load(path)
    assert again.table == trunk.table and again.call == trunk.call == 3 and again.record == trunk.record
    assert again.record == {"prompts": [PROMPTS[i] for i in GROUP], "prompt": PROMPTS[2], "seed": SEEDS[2], "encoder": "none"}
    assert len(again.history) == len(trunk.history) == 2
    for there, here in zip(tensors(again), tensors(trunk)):
        assert torch.equal(there, here) and there.dtype == here.dtype
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "sage-diffusion trunk"


def test_damaged_and_foreign_files_are_refused(trunk, tmp_path):
    path = tmp_path / "trunk.safetensors"
    trunk.save(path)
    data = path.read_bytes()
    for damaged, message in (
        (data[:-5], "damaged, or no safetensors file"),
        (data[:-1] + bytes([data[-1] ^ 1]), "its tensors are not those that were saved"),
        (b"a pickle", "damaged, or no safetensors file"),
        (b"", "damaged, or no safetensors file"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            Trunk.load(path)
    save_file({"sample": trunk.sample}, path)
    with pytest.raises(ValueError, match="it holds no trunk: wanted"):
        Trunk.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Trunk.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "key, old, new, message",
    [
        ("version", "1", "2", "version must be 1, got 2"),
        ("trunk", '"call": 3', '"call": 9', "call must be one of the calls 1 to 5, got 9"),
        ("trunk", '"call": 3', '"cell": 3', "must have the keys call, solver"),
        ("trunk", '"call": 3', '"call": true', '"call" in its metadata must be a int, got True'),
        ("trunk", '"timesteps": [', '"timesteps": ["0", ', '"timesteps" in its metadata must hold numbers'),
        ("trunk", '"record": {', '"record": 5, {', "is not JSON"),
    ],
)
def test_metadata_is_read_strictly(trunk, tmp_path, key, old, new, message):
    path = tmp_path / "trunk.safetensors"
    trunk.save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    assert old in metadata[key]
    save_file(tensors, path, metadata=metadata | {key: metadata[key].replace(old, new)})
    with pytest.raises(ValueError, match=message):
        Trunk.load(path)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(sample=torch.zeros(2, *SHAPE)), ValueError, r"sample must be one row \(1, 4, 8, 8\), got \(2, 4, 8, 8\)"),
        (dict(model_input=torch.zeros(1, 3)), ValueError, r"model_input must be one row \(1, 4, 8, 8\), got \(1, 3\)"),
        (dict(last_sample=torch.zeros(1, *SHAPE).double()), TypeError, "last_sample must be a float32, bfloat16 or float16 tensor"),
        (dict(history=[torch.zeros(1, *SHAPE).half()]), TypeError, "history.0 must have the dtype of sample, torch.float32, got"),
        (dict(history=[torch.zeros(1, *SHAPE)] * 4), ValueError, "history must hold at most 3 tensors, got 4"),
        (dict(call=0), ValueError, "call must be one of the calls 1 to 5, got 0"),
        (dict(call=6), ValueError, "call must be one of the calls 1 to 5, got 6"),
        (dict(call=2.0), TypeError, "call must be an integer"),
    ],
)
def test_a_trunk_is_one_row_at_a_call_of_its_table(trunk, change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(trunk, **change)


def test_a_record_must_be_json(trunk, tmp_path):
    with pytest.raises(ValueError, match="record must hold what JSON can say"):
        dataclasses.replace(trunk, record={"when": object()}).save(tmp_path / "trunk.safetensors")


@pytest.mark.parametrize(
    "solver, options, message",
    [
        ("dpm++2m", {}, "the solver is 'unipc' there and 'dpm\\+\\+2m' here"),
        ("unipc", dict(steps=7), "there are 6 denoiser calls there and 7 here"),
        ("unipc", dict(timestep_spacing="leading"), "the timestep of call 0 is 999 there and [0-9]* here"),
        ("unipc", dict(solver_order=1), "the coefficients differ"),
        ("unipc", dict(prediction_type="epsilon"), "the coefficients differ"),
    ],
)
def test_a_trunk_of_another_table_is_refused(pipe, trunk, solver, options, message):
    setting = Setting(pipe, solver, **options)
    with pytest.raises(ValueError, match=f"the trunk was made with another coefficient table: {message}"):
        setting.sample(NEWCOMERS, trunk, LATER)
    assert setting.rows == []


def test_a_trunk_without_its_solvers_memory_is_refused(pipe, trunk):
    setting = Setting(pipe, "unipc")
    for change in (dict(history=()), dict(last_sample=None)):
        with pytest.raises(ValueError, match="the trunk must hold what unipc remembers at call 3: 2 of history and a last_sample"):
            setting.sample(NEWCOMERS, dataclasses.replace(trunk, **change), LATER)
    with pytest.raises(TypeError, match=r"x_init must be a tensor \[2, ...\] or a sage.Trunk, got str"):
        setting.sample(NEWCOMERS, "trunk.safetensors", LATER)
    assert setting.rows == []


# ---- pipelines


FAMILIES = {  # with a solver that draws, or remembers, where the family has one
    "Stable Diffusion": "euler-a",
    "Stable Diffusion XL": "dpm++2m",
    "Stable Diffusion 3": "unipc",
    "Flux": "",
    "PixArt-sigma": "unipc",
    "Wan": "",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_join_a_trunk_that_generate_kept(family, tmp_path):
    """A member asked for again, alone, on another day, gives its picture, and its first calls are not run."""
    case = next(case for case in CASES if case.name == family)
    pipe = native_cases.with_solver(case.build(), FAMILIES[family], case.solvers[FAMILIES[family]])
    plan = SharingPlan.flat([Leaf(prompt) for prompt in PROMPTS], [LATER, GROUP], 0.5, representatives=[3, 4])
    options = dict(progress=False, seed=5, output_type="latent", **case.kwargs)
    first = sage.generate(pipe, PROMPTS, plan=plan, keep_trunks=True, max_rows=case.copies, **options)
    assert first.stats["packs"] == 2 and set(first.trunks) == {0, 1}
    assert first.trunks[0].record["prompts"] == [PROMPTS[i] for i in GROUP] and first.trunks[0].record["pipeline"] == type(pipe).__name__
    first.trunks[0].save(tmp_path / "trunk")
    again = [PROMPTS[4], PROMPTS[2]]
    with Rows(pipe) as seen:
        joined = sage.generate(pipe, again, trunk=Trunk.load(tmp_path / "trunk"), **options)
    for image, leaf in zip(joined.images, (4, 2)):
        assert worst(image, first.images[leaf]) <= 1e-5
    calls = first.records[0]["num_calls"]
    assert sum(seen) == case.copies * joined.stats["nfe"] == case.copies * 2 * (calls - first.trunks[0].call)
    assert joined.stats["nfe_independent"] == 2 * calls
    shown = ("trunk_prompt", "trunk_seed", "branch_call", "num_calls", "seed")
    assert [[r[key] for key in shown] for r in joined.records] == [[first.records[i][key] for key in shown] for i in (4, 2)]
    stock = sage.generate(pipe, again, share=0.0, **options)
    assert min(worst(a, b) for a, b in zip(stock.images, joined.images)) > 1e-3


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(engine="hook", keep_trunks=True), ValueError, 'keep_trunks needs the native loop, got engine="hook"'),
        (dict(engine="hook", trunk=True), ValueError, 'trunk needs the native loop, got engine="hook"'),
        (dict(keep_trunks=True, cross_attention_kwargs={"scale": 1}), NotImplementedError, "leaves the argument cross_attention_kwargs"),
        (dict(trunk=True, cross_attention_kwargs={"scale": 1}), NotImplementedError, "leaves the argument cross_attention_kwargs"),
        (dict(trunk="a path"), TypeError, "trunk must be a sage.Trunk, got str"),
        (dict(trunk=True, num_inference_steps=5), ValueError, "there are 6 denoiser calls there and 5 here"),
        (dict(trunk=True, height=32, width=32), ValueError, r"the trunk must hold latents \[1, 4, 16, 16\] torch.float32, as the pipe"),
    ],
)
def test_generate_refuses_what_cannot_join(pipe, options, error, message):
    given = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, solver="unipc", progress=False, output_type="latent")
    if options.get("trunk") is True:
        made = sage.generate(pipe, PROMPTS, plan=SharingPlan.flat([Leaf(p) for p in PROMPTS], [GROUP], 0.5), keep_trunks=True, **given)
        options = options | dict(trunk=made.trunks[0])
    with Rows(pipe) as seen, pytest.raises(error, match=message):
        sage.generate(pipe, PROMPTS[:2], **given | options)
    assert seen == []
