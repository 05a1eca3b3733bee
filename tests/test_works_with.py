"""Sharing beside what else people do to a pipeline: compile, offload, quantise, LoRA, copies, threads, interruption, no memory."""

import copy
import pickle
import threading
import time

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from families import FAMILIES
from families.case import PICTURES
from families.case import draw as draw_family
from measures import worst
from sd_calls import GROUPS, LEAVES, SEEDS, draw, flat
from tiny import PROMPTS, stable_diffusion
from torch._dynamo.testing import CompileCounter

import sage
from sage import Leaf, Node, SharingPlan
from sage.denoiser import Arguments, bucket
from sage.families import RULES
from sage.rows import map_rows
from sage.run import Run


@pytest.fixture
def pipe():
    torch.set_num_threads(1)
    torch._dynamo.reset()
    return stable_diffusion()


def tree():
    pair = Node((0, 2), 0, 0.67, (Node.single(0), Node.single(2)))
    return SharingPlan.tree(LEAVES, [Node((0, 2, 4), 4, 0.34, (pair, Node.single(4)))])


def shared(pipe, plan=None, **options):
    with sage.enable(pipe, plan or flat(), **options) as sharing:
        return draw(pipe), sharing


# ---- torch.compile


def compiled(pipe, in_place: bool, **options) -> CompileCounter:
    """Compile the U-Net, counting its graphs."""
    counter = CompileCounter()
    if in_place:
        pipe.unet.compile(backend=counter, **options)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=counter, **options)
    return counter


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "Module.compile"])
def test_a_flat_plan_compiles_two_graphs_and_no_more(pipe, in_place):
    """One for the trunk's rows, one for the branches'; nothing for a second call, for enabling again or another share."""
    expected, _ = shared(pipe)
    counter = compiled(pipe, in_place, fullgraph=True)
    got, _ = shared(pipe)
    assert worst(got, expected) <= 1e-5 and counter.frame_count == 2
    shared(pipe)
    shared(pipe, flat(0.34))
    assert counter.frame_count == 2


def test_trees_and_pieces_compile_no_graph_per_row_count(pipe):
    """With automatic dynamic shapes (torch's default) the second graph serves every later row count."""
    expected, _ = shared(pipe, tree())
    counter = compiled(pipe, False, fullgraph=True)
    assert worst(shared(pipe, tree())[0], expected) <= 1e-5
    assert worst(shared(pipe, tree(), max_rows=6)[0], expected) <= 1e-5
    assert counter.frame_count == 2


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "Module.compile"])
def test_a_static_graph_is_asked_for_a_stated_set_of_row_counts(pipe, in_place):
    """dynamic=False: every row count is a graph, so trunks are padded to the buckets 1, 2, 3, 4, 6, 8, 12, …"""
    plans = [flat(groups=groups) for groups in ([[0, 2, 4], [1, 3]], [[0, 2]], [[0, 1, 2, 3, 4]], [[0, 1]])]
    expected = [shared(pipe, plan)[0] for plan in plans]
    counter = compiled(pipe, in_place, fullgraph=True, dynamic=False)
    for plan, latents in zip(plans, expected):
        assert worst(shared(pipe, plan)[0], latents) <= 1e-5
    assert counter.frame_count == 4  # pictures at once: 2, 4, 1 (padded from 2, 4, 1) and all 5
    assert [bucket(size) for size in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25)] == [1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32]


def test_padding_shows_in_no_result(pipe):
    plan = SharingPlan.flat([*LEAVES, Leaf("x"), Leaf("y")], [[0, 1], [2, 3]], 0.5, representatives=[0, 2])  # 5 rows run as 6
    seeds = [*SEEDS, 7, 8]

    def call():
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with sage.enable(pipe, plan) as sharing:
            return pipe([*PROMPTS, "x", "y"], generator=generators, num_inference_steps=4, output_type="latent").images, sharing

    expected, _ = call()
    compiled(pipe, False, dynamic=False)
    rows = []
    pipe.unet._orig_mod.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    got, sharing = call()
    assert worst(got, expected) <= 1e-5 and sharing.stats["rows"] == [5, 5, 7, 7]
    assert rows == [12, 12, 14, 14]  # six pictures for five, then all seven


def test_compiling_inside_a_call_leaves_the_pipeline_alive(pipe):
    expected = draw(pipe)

    def compile_now(pipe, step, timestep, tensors):
        if step == 1:
            pipe.unet.compile(backend="eager")
        return tensors

    with sage.enable(pipe, flat()):
        with pytest.raises(RuntimeError, match="called no denoiser"):  # the compiled call is in front of ours: nothing is reduced
            draw(pipe, callback_on_step_end=compile_now)
    assert "_sage_run" not in pipe.scheduler.__dict__ and worst(draw(pipe), expected) <= 1e-5
    assert worst(shared(pipe)[0], shared(stable_diffusion())[0]) <= 1e-5


# ---- offload, VAE, attention processors, dtypes


@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_offloading(pipe, way):
    """The hooks of accelerate and diffusers run inside the interception, on the rows that are computed.

    On the CPU the weights move nowhere (sequential offload moves them to and from the meta device); that they are at the right
    place at the right time on a GPU is not tested here.
    """
    accelerate = pytest.importorskip("accelerate")
    expected, _ = shared(pipe)
    cpu = torch.device("cpu")
    if way == "group":
        pipe.unet.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    elif way == "sequential":
        accelerate.cpu_offload(pipe.unet, cpu)  # what enable_sequential_cpu_offload does to every component
    else:
        pipe.enable_model_cpu_offload(device="cpu")
    got, sharing = shared(pipe)
    assert worst(got, expected) <= 1e-5 and sharing.stats["rows"] == [2] * 3 + [5] * 3
    assert torch.equal(shared(pipe)[0], got)


def test_vae_slicing_and_tiling(pipe):
    expected, _ = shared(pipe)
    pipe.vae.enable_slicing(), pipe.vae.enable_tiling()
    with sage.enable(pipe, flat()):
        images = draw(pipe, output_type="pt")
    assert len(images) == 5 and torch.isfinite(images).all()
    assert torch.equal(shared(pipe)[0], expected)


def test_attention_processors(pipe):
    expected, _ = shared(pipe)
    pipe.unet.set_attn_processor(AttnProcessor())
    assert worst(shared(pipe)[0], expected) <= 1e-5
    pipe.enable_attention_slicing(1)
    assert worst(shared(pipe)[0], expected) <= 1e-5


def test_moving_the_pipeline_while_enabled(pipe):
    with sage.enable(pipe, flat()) as sharing:
        assert pipe.to("cpu") is pipe
        single = draw(pipe)
        pipe.to(torch.bfloat16)
        half = draw(pipe)
    assert sharing.stats["rows"] == [2] * 3 + [5] * 3
    assert half.dtype == torch.bfloat16 and worst(half.float(), single) < 0.2


def test_inference_mode(pipe):
    expected, _ = shared(pipe)
    with torch.inference_mode():
        assert torch.equal(shared(pipe)[0], expected)


# ---- quantised transformers, LoRA


def test_a_quantised_transformer():
    """torchao's int8 weights: its tensor subclasses sit in the linear layers, inside the interception."""
    quantization = pytest.importorskip("torchao.quantization")
    family = next(family for family in FAMILIES if family.name == "PixArt-sigma")
    pipe = family.build()
    plan = SharingPlan.flat([Leaf(str(number)) for number in PICTURES], GROUPS, 0.5, representatives=[group[0] for group in GROUPS])
    stock = draw_family(family, pipe)
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    quantised = draw_family(family, pipe)
    assert not torch.equal(quantised, stock), "the weights must be quantised"
    with sage.enable(pipe, SharingPlan.independent(plan.leaves)):
        assert worst(draw_family(family, pipe), quantised) <= 1e-5
    with sage.enable(pipe, plan) as sharing:
        assert torch.isfinite(draw_family(family, pipe)).all()
    assert sharing.stats["rows"] == [2, 2, 5, 5]


def test_lora_loaded_scaled_and_unloaded_while_enabled(pipe):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    plain, _ = shared(pipe)
    with sage.enable(pipe, flat()):
        torch.manual_seed(3)
        pipe.unet.add_adapter(config, "style")
        with_lora = draw(pipe)
        half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
        pipe.unload_lora_weights()
        without = draw(pipe)
    assert torch.equal(without, plain)
    assert len({round(latents.abs().sum().item(), 3) for latents in (plain, with_lora, half)}) == 3


# ---- several pipelines, copies


def test_two_pipelines_enabled_at_once(pipe):
    other = stable_diffusion()
    expected, expected_other = shared(pipe)[0], shared(other, tree())[0]
    with sage.enable(pipe, flat()), sage.enable(other, tree()):
        assert torch.equal(draw(pipe), expected)
        assert torch.equal(draw(other), expected_other)
        assert torch.equal(draw(pipe), expected)


def test_copies_after_disable_are_stock(pipe):
    expected = draw(pipe)
    sage.enable(pipe, flat()).disable()
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(draw(other), expected)


class Wrapper(torch.nn.Module):
    """A user's: passes everything on."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.dtype, self.device = inner, inner.config, inner.dtype, inner.device

    def forward(self, sample, *args, **kwargs):
        return self.inner(sample, *args, **kwargs)


def test_wrapped_denoisers(pipe):
    """Arguments that a wrapper does not name are passed on, and those with rows have their rules."""
    peft = pytest.importorskip("peft")
    expected, unet = shared(pipe)[0], pipe.unet
    pipe.unet = Wrapper(unet)
    assert worst(shared(pipe)[0], expected) <= 1e-5
    pipe.unet = peft.get_peft_model(unet, peft.LoraConfig(r=2, target_modules=["to_q"]))  # begins as no change
    assert worst(shared(pipe)[0], expected) <= 1e-5


def test_positional_arguments_that_forward_does_not_name():
    class Loose(torch.nn.Module):
        def forward(self, sample, *rest):
            return sample * 0.5

    arguments = Arguments(Loose(), (torch.zeros(4, 2), torch.ones(4, 3), torch.ones(4, 5)), {})
    assert list(arguments.given) == ["sample", "argument 1", "argument 2"]
    args, kwargs = arguments.passed(arguments.given)
    assert [x.shape[1] for x in args] == [2, 3, 5] and not kwargs
    with pytest.raises(ValueError, match="argument 'argument 1' has 4 rows, one per latent, and no rule"):
        map_rows(arguments.given, 4, RULES, lambda *given: given[1])


def test_a_scheduler_is_for_one_call_at_a_time(pipe):
    """Of two threads that come at the same moment, one is refused, and nothing stays swapped."""
    scheduler, cls, outcomes = pipe.scheduler, type(pipe.scheduler), []
    barrier = threading.Barrier(2)

    def enter():
        run = Run(flat(), pipe, None, RULES)
        barrier.wait()
        try:
            with run.installed():
                time.sleep(0.002)
            outcomes.append("ran")
        except RuntimeError as error:
            outcomes.append(str(error)[:60])

    for _ in range(50):
        threads = [threading.Thread(target=enter) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert type(scheduler) is cls and "_sage_run" not in scheduler.__dict__
    assert outcomes.count("ran") >= 50 and {outcome for outcome in outcomes if outcome != "ran"} <= {
        "StableDiffusionPipeline was called while a shared call on th"
    }


# ---- calls that stop


def test_interrupt_stops_and_leaves_the_pipeline_clean(pipe):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return tensors

    expected = draw(pipe)
    with sage.enable(pipe, flat()) as sharing:
        draw(pipe, callback_on_step_end=stop)
        assert sharing.stats["rows"] == [2, 2, 2]
        assert draw(pipe).shape == expected.shape and sharing.stats["rows"] == [2] * 3 + [5] * 3
    assert torch.equal(draw(pipe), expected)


class Memory:
    """A denoiser that runs out of memory when more than `most` rows come at once."""

    def __init__(self, pipe, most: int):
        self.most, self.seen, self.convolve = most, [], pipe.unet.conv_in.forward

    def __call__(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append(len(x))
        return self.convolve(x)


def test_out_of_memory_halves_the_rows_and_goes_on(pipe, monkeypatch, caplog):
    expected, _ = shared(pipe)
    memory = Memory(pipe, most=4)
    monkeypatch.setattr(pipe.unet.conv_in, "forward", memory)
    got, sharing = shared(pipe)
    assert worst(got, expected) <= 1e-5
    assert memory.seen == [4] * 3 + [4, 4, 2] * 3 and sharing.stats["max_rows"] == 4
    assert "out of memory with 10 rows at once: going on with max_rows=4" in caplog.text


def test_out_of_memory_with_one_picture_is_the_users(pipe, monkeypatch):
    monkeypatch.setattr(pipe.unet.conv_in, "forward", Memory(pipe, most=1))
    with pytest.raises(torch.OutOfMemoryError):
        shared(pipe)
    assert "_compiled_call_impl" not in pipe.unet.__dict__
