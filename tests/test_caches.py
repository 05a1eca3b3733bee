"""The caches of diffusers under sharing, against trunk and members run one after another with the cache's state copied."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry, MagCacheConfig, ModelHook, SeaCacheConfig, apply_pyramid_attention_broadcast
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.sea_cache import SeaCacheSharedState
from diffusers.models.cache_utils import CacheMixin
from families import FAMILIES
from families.case import GROUPS, PICTURES, draw
from measures import worst

import sage
from sage import Leaf, Node, SharingPlan
from sage.caches import Caches, Parting
from sage.rows import PlanRows, Rows

pytestmark = pytest.mark.usefixtures("one_thread")

LEAVES = [Leaf(f"picture {number}") for number in PICTURES]
CALLS = 4
COMPUTES = [True, False, False, True]  # what a cache is made to decide at the calls: groups part where it skips
FLAT = SharingPlan.flat(LEAVES, GROUPS, 2 / CALLS, representatives=[group[0] for group in GROUPS])
PAIR = Node((0, 2), 0, 2 / CALLS, (Node.single(0), Node.single(2)))
TREE = SharingPlan.tree(
    LEAVES,
    [Node((0, 2, 4), 0, 1 / CALLS, (PAIR, Node.single(4))), Node((1, 3), 1, 2 / CALLS, (Node.single(1), Node.single(3)))],
)
INDEPENDENT = SharingPlan.independent(LEAVES)
PLANS = {"flat": FLAT, "tree": TREE}


def always(timestep):
    return dict(spatial_attention_timestep_skip_range=(-1, 1000), current_timestep_callback=lambda: timestep)


PAB = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=3, **always(500))
MAG = MagCacheConfig(threshold=10.0, max_skip_steps=2, num_inference_steps=CALLS, mag_ratios=torch.full([CALLS], 0.9))
# of the denoiser calls of both prompts, which have one state: the first two run, then one of four
MAG_OF_BOTH = dataclasses.replace(MAG, max_skip_steps=3, num_inference_steps=2 * CALLS)
TAYLOR = dict(disable_cache_before_step=2, cache_interval=5, taylor_factors_dtype=torch.float32)
FASTER = dict(
    spatial_attention_block_skip_range=2,
    unconditional_batch_skip_range=3,
    unconditional_batch_timestep_skip_range=(-1, 1000),
    attention_weight_callback=lambda module: 0.3,
    tensor_format="BFCHW",
    **always(500),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A cache on a family.

    Attributes:
        contexts: what the pipeline calls its denoiser calls of one step, in their order; (): nothing.
        computed: which of the calls run the attention layers (or all blocks), per guidance copy in [0, 1].
        always: the share of the blocks that is never skipped.
    """

    family: str
    config: object
    contexts: tuple[str, ...]
    computed: tuple[float, ...] = (1, 0, 0, 1)
    always: float = 0.0


CFG, BATCHED = ("cond", "uncond"), ("cond_uncond",)
CASES = {
    "FirstBlockCache": Case("Flux", FirstBlockCacheConfig(), ("cond",), always=0.5),
    "FirstBlockCache, two contexts": Case("Flux true CFG", FirstBlockCacheConfig(), CFG, always=0.5),
    "FirstBlockCache, two copies": Case("LTX-Video", FirstBlockCacheConfig(), BATCHED, always=0.5),
    "FirstBlockCache, two transformers": Case("Wan 2.2", FirstBlockCacheConfig(), CFG, (1, 1, 0, 0), always=0.5),
    "FirstBlockCache, Qwen-Image": Case("Qwen-Image", FirstBlockCacheConfig(), CFG, always=0.5),
    "FirstBlockCache, CogView4": Case("CogView4", FirstBlockCacheConfig(), CFG, always=0.5),
    "FirstBlockCache, HunyuanVideo": Case("HunyuanVideo", FirstBlockCacheConfig(), CFG, always=0.5),
    "FirstBlockCache, Mochi": Case("Mochi", FirstBlockCacheConfig(), BATCHED, always=0.5),
    "MagCache": Case("Flux true CFG", MAG, CFG),
    "MagCache, no context": Case("Flux true CFG", MAG_OF_BOTH, (), (1, 0, 0.5, 0)),
    "SeaCache": Case("Wan", SeaCacheConfig(), CFG),
    "PyramidAttentionBroadcast": Case("CogVideoX with DDIM", PAB, BATCHED),
    "PyramidAttentionBroadcast, two calls": Case("Wan", PAB, CFG, (0.5, 0.5, 0, 0.5)),
    "TaylorSeerCache": Case("Flux true CFG", TaylorSeerCacheConfig(**TAYLOR), CFG, (1, 1, 0, 1)),
    "TaylorSeerCache, lite": Case("LTX-Video", TaylorSeerCacheConfig(use_lite_mode=True, **TAYLOR), BATCHED, (1, 1, 0, 1)),
    "FasterCache": Case("CogVideoX with DDIM", FasterCacheConfig(**FASTER), BATCHED, (1, 0, 0.5, 1)),
    "FasterCache, distilled": Case("Flux", FasterCacheConfig(is_guidance_distilled=True, **FASTER), ("cond",), (1, 0, 1, 0)),
}


def build(case):
    """The family, and its pipeline with the cache on."""
    family = next(family for family in FAMILIES if family.name == case.family)
    pipe = family.build()
    for model in models(pipe):
        model.enable_cache(copy.deepcopy(case.config))
    if getattr(case.config, "is_guidance_distilled", False):  # it must not skip at its first call
        first = pipe.transformer._diffusers_hook.get_hook("faster_cache_denoiser")
        for hook in hooks_of(pipe):
            hook.current_timestep_callback = lambda: 500 if first.state.iteration else 2000
    return family, pipe


def models(pipe):
    return [model for model in (pipe.transformer, getattr(pipe, "transformer_2", None)) if model is not None]


def hooks_of(pipe):
    modules = [module for model in models(pipe) for module in model.modules() if hasattr(module, "_diffusers_hook")]
    return [hook for module in modules for hook in module._diffusers_hook.hooks.values()]


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """Every cache; those that decide by what is in the batch are made to decide by the number of the call."""
    if not CASES[request.param].contexts:
        monkeypatch.setattr(CacheMixin, "cache_context", lambda *args, **kwargs: contextlib.nullcontext())

    def first_block(hook, residual):
        state = hook.state_manager.get_state()
        state.calls = getattr(state, "calls", -1) + 1
        own_decision(hook, residual)  # fails where the state's rows are not the call's
        return COMPUTES[state.calls]

    def gate(shared, state, metadata, indicator, config):
        before = state.previous_indicator
        assert before is None or [row.shape for row in before] == [row.shape for row in indicator]
        own_gate(shared, state, metadata, indicator, config)
        return COMPUTES[metadata.step_index]

    own_decision, own_gate = FBCHeadBlockHook._should_compute_remaining_blocks, SeaCacheSharedState.resolve_gate
    monkeypatch.setattr(FBCHeadBlockHook, "_should_compute_remaining_blocks", first_block)
    monkeypatch.setattr(SeaCacheSharedState, "resolve_gate", gate)
    return CASES[request.param]


class InContext:
    """A denoiser that is called in the pipeline's cache contexts, one after another."""

    def __init__(self, model, contexts):
        self.model, self.contexts, self.step, self.calls = model, contexts, 0, 0

    def __call__(self, *args, **kwargs):
        context = self.contexts[self.calls % len(self.contexts)] if self.contexts else ""
        self.calls += 1
        with self.model.cache_context(context, step_index=self.step, sigma=0.5, num_inference_steps=CALLS):
            return self.model(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.model, name)


class View:
    """A pipeline whose denoisers are called in contexts."""

    def __init__(self, pipe, contexts):
        self.pipe = pipe
        self.transformer = InContext(pipe.transformer, contexts)
        if getattr(pipe, "transformer_2", None) is not None:
            self.transformer_2 = InContext(pipe.transformer_2, contexts)

    def __getattr__(self, name):
        return getattr(self.pipe, name)


def holders(pipe):
    """(dict, key) of whatever holds the states of the caches."""
    found = {}
    for hook in hooks_of(pipe):
        found.update({id(held): (vars(held), "_state_cache") for held in vars(hook).values() if isinstance(held, StateManager)})
        if hasattr(hook, "state"):
            found[id(hook)] = vars(hook), "state"
    return list(found.values())


@torch.no_grad()
def by_hand(family, pipe, case, plan):
    """The plan with stock diffusers: each node alone, one row at a time, on from its parent's latents, solver and cache."""
    kwargs, results, view = family.conditions(pipe, PICTURES), {}, View(pipe, case.contexts)
    rows = [family.row(pipe, kwargs, i) for i in range(len(PICTURES))]

    def walk(node, x, scheduler, call):
        condition, end = family.mean([rows[i] for i in node.members]), round(node.until * CALLS)
        for s in range(call, end):
            view.transformer.step = s
            t = scheduler.timesteps[s]
            x = scheduler.step(family.predict(view, x, t, condition, s), t, x, return_dict=False)[0]
        held = copy.deepcopy([owner[key] for owner, key in holders(pipe)])
        results.update({node.representative: x})
        for child in node.children:
            for (owner, key), value in zip(holders(pipe), copy.deepcopy(held)):
                owner[key] = value
            walk(child, x, copy.deepcopy(scheduler), end)

    for root in plan.roots:
        scheduler = copy.deepcopy(pipe.scheduler)
        (family.scheduler_setup or (lambda pipe, scheduler: scheduler.set_timesteps(CALLS)))(pipe, scheduler)
        generator = torch.Generator().manual_seed(100 + root.representative)
        start = family.start(pipe, family.conditions(pipe, [PICTURES[root.representative]]), generator)
        for model in models(pipe):
            model._reset_stateful_cache()
        walk(root, start, scheduler, 0)
    for model in models(pipe):
        model._reset_stateful_cache()
    return torch.cat([family.finish(pipe, results[i]) for i in range(len(PICTURES))])


def shared(family, pipe, plan, **options):
    with sage.enable(pipe, plan, **options) as sharing:
        return draw(family, pipe), sharing.stats


@pytest.mark.support("cache")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_members_go_on_from_what_their_group_cached(case, plan, record_property):
    record_property("family", case.family)
    record_property("shown", type(case.config).__name__.removesuffix("Config"))
    family, pipe = build(case)
    got, stats = shared(family, pipe, plan)
    assert worst(got, by_hand(family, pipe, case, plan)) <= 1e-5
    rows = stats["rows"]
    expected = sum(r * (case.always + (1 - case.always) * share) for r, share in zip(rows, case.computed)) / sum(rows)
    assert stats["cache"]["computed"] == pytest.approx(expected)
    for model in models(pipe):
        model.disable_cache()
    uncached, stats = shared(family, pipe, plan)
    assert worst(got, uncached) > 1e-3, "the cache must matter"
    assert stats["cache"] is None


def test_unshared_equals_stock(case):
    family, pipe = build(case)
    stock = draw(family, pipe)
    unshared = shared(family, pipe, INDEPENDENT)[0]
    assert torch.equal(unshared, stock) or ("Wan" in case.family and worst(unshared, stock) <= 1e-5)  # its solver rounds otherwise
    shared(family, pipe, FLAT)
    assert torch.equal(draw(family, pipe), stock), "nothing of a shared call stays behind"


def test_without_the_way_along_the_pictures_are_wrong(case, monkeypatch):
    """The control of the comparison by hand: states left alone, then given to the wrong members."""
    family, pipe = build(case)
    right = shared(family, pipe, FLAT)[0]
    between = Parting.between

    def other_parents(*args):
        return dataclasses.replace(between(*args), parent=1 - between(*args).parent)

    monkeypatch.setattr(Parting, "between", other_parents)
    assert worst(shared(family, pipe, FLAT)[0], right) > 1e-3
    monkeypatch.setattr(Caches, "_carry_state", lambda *args: None)
    try:
        assert worst(shared(family, pipe, FLAT)[0], right) > 1e-3
    except (RuntimeError, AssertionError):  # 2 rows of the cache do not fit 5 of the denoiser
        pass


# ---- one cache


@pytest.fixture
def flux():
    return build(CASES["FirstBlockCache"])


def test_the_caches_own_decision(flux):
    """Unforced: it decides by all rows of the batch; a low threshold computes everything, a high one only the first call."""
    family, pipe = flux
    for threshold, computed in [(0.0, 1.0), (1e9, 0.5 + 0.5 * 2 / 14)]:
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        assert shared(family, pipe, FLAT)[1]["cache"] == {"name": "FirstBlockCache", "computed": pytest.approx(computed)}


def test_compiled_denoisers_are_carried_along_but_not_counted(flux):
    family, pipe = flux
    expected = shared(family, pipe, FLAT)[0]
    for block in pipe.transformer.transformer_blocks:
        block._compiled_call_impl = block._call_impl  # as block.compile() leaves it
    got, stats = shared(family, pipe, FLAT)
    assert worst(got, expected) <= 1e-5
    assert stats["cache"] == {"name": "FirstBlockCache", "computed": None}


def test_pieces_are_refused(flux):
    family, pipe = flux
    with pytest.raises(ValueError, match="max_rows must be at least 5, .* has a cache, got 4: .*raise max_rows .*disable_cache"):
        shared(family, pipe, FLAT, max_rows=4)
    assert torch.equal(shared(family, pipe, FLAT, max_rows=5)[0], shared(family, pipe, FLAT)[0])


def test_memory_is_not_sought_by_pieces(flux, monkeypatch):
    family, pipe = flux

    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory\n2 rows do not fit, and the denoiser has a cache"):
        shared(family, pipe, FLAT)


def test_a_call_that_broke_off_leaves_nothing(flux):
    family, pipe = flux
    stock, references = draw(family, pipe), [hook.fn_ref for hook in hooks_of(pipe)]

    def stop(pipe, step, t, kwargs):
        raise KeyboardInterrupt

    with sage.enable(pipe, FLAT), pytest.raises(KeyboardInterrupt):
        draw(family, pipe, callback_on_step_end=stop)
    assert all(not owner[key] for owner, key in holders(pipe))
    assert [hook.fn_ref for hook in hooks_of(pipe)] == references
    assert torch.equal(draw(family, pipe), stock)


class Remembering(ModelHook):
    _is_stateful = True

    def reset_state(self, module):
        return module


class OwnState(Remembering):
    def __init__(self):
        super().__init__()
        self.manager = StateManager(dict)


@pytest.mark.parametrize("hook", [Remembering, OwnState])
def test_unknown_caches_are_refused(flux, hook):
    family, pipe = flux
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.transformer_blocks[0]).register_hook(hook(), "own")
    stock = draw(family, pipe)
    with pytest.raises(ValueError, match=f"a hook {hook.__name__} that remembers .*disable the cache .*or share nothing"):
        shared(family, pipe, FLAT)
    assert torch.equal(shared(family, pipe, INDEPENDENT)[0], stock)


def test_faster_cache_needs_both_copies_in_one_call():
    family, pipe = build(Case("Flux", FasterCacheConfig(**FASTER), ("cond",)))
    with pytest.raises(ValueError, match="FasterCache takes half .* 2 guidance copies of each picture, got 1; pass FasterCacheConfig"):
        shared(family, pipe, FLAT)


def test_copies_must_stay():
    """Stable Diffusion 3's skipped layers: a call of all copies, then one of the conditional copy alone."""
    family = next(family for family in FAMILIES if family.name == "SD3 skip-layer guidance")
    pipe = family.build()
    apply_pyramid_attention_broadcast(pipe.transformer, PAB)
    with pytest.raises(ValueError, match="copies must stay 2, whose rows PyramidAttentionBroadcastState holds, got .* 1; disable"):
        shared(family, pipe, FLAT)


# ---- parts


def rows_of(*members):
    return Rows(members, [leaves[0] for leaves in members], sum(map(len, members)))


def test_parents_between_any_two_partitions():
    partitions = PlanRows(TREE.resolve(CALLS))
    assert Parting.between(partitions.at(0), partitions.at(1), 1).parent.tolist() == [0, 1, 0]
    assert Parting.between(partitions.at(0), partitions.at(3), 1).parent.tolist() == [0, 1, 0, 1, 0]
    assert Parting.between(partitions.at(1), partitions.at(3), 2).index.tolist() == [0, 1, 0, 1, 2, 3, 4, 3, 4, 5]


def test_what_a_state_holds():
    parting = Parting.between(rows_of((0, 2), (1,)), rows_of((0,), (1,), (2,)), 2)
    x = torch.arange(4.0)
    assert parting.rows({0: [x, None], 1: (x[:, None],)})[0][0].tolist() == [0, 1, 0, 2, 3, 2]
    assert parting.rows(torch.arange(8)).tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 4, 5], "two rows of each picture"
    assert parting.row_list(list("abcd")) == list("abacdc")
    assert parting.count(8) == 12
    assert parting.shapes((torch.Size([4, 7]),)) == (torch.Size([6, 7]),)
    assert "".join(parting.row_list(list("aAbBcCdD"))) == "aAbBaAcCdDcC"
    for rows, held in [(parting.rows, torch.arange(5)), (parting.row_list, list("abcde")), (parting.rows, x[:0])]:
        with pytest.raises(ValueError, match=f"has {len(held)} rows where the denoiser ran 4: .*disable the cache"):
            rows(held)
