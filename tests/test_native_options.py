"""What a native call can be given, what it refuses, and that a refusal has drawn nothing."""

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from families import unets, videos
from families.unet_parts import relative
from measures import worst
from native_cases import (
    CASES,
    GUIDED,
    LEAVES,
    NEGATIVES,
    PIXART,
    PROMPTS,
    SMALL,
    apart,
    flat,
    flux,
    generators,
    hooked,
    native,
    pixart,
    sd3,
    stock,
    wan,
    with_solver,
    xl,
)

from sage import SharingPlan
from sage.native import NotNative, adapter_for, draw

pytestmark = pytest.mark.usefixtures("one_thread")
BUILDS = {case.name: (case.build, case.kwargs) for case in CASES}


@pytest.fixture(scope="module")
def built():
    """Pipelines by family, each built once."""
    pipes = {}
    return lambda name: pipes.setdefault(name, BUILDS[name][0]())


def check(pipe, kwargs, plan=None, negatives=NEGATIVES, output_type="latent", tolerance=1e-5):
    """The native loop equals the hook, and the generators end alike; returns the native pictures."""
    ours, theirs = generators(), generators()
    expected = hooked(pipe, plan or flat(), kwargs, negatives, theirs, output_type)[0]
    got = native(pipe, plan or flat(), kwargs, negatives, ours, output_type)[0]
    assert worst(np.asarray(got), np.asarray(expected)) <= tolerance
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs))
    return got


OPTIONS = [
    ("Stable Diffusion", {"height": 24, "width": 32}),
    ("Stable Diffusion", {"guidance_rescale": 0.7}),
    ("Stable Diffusion", {"eta": 0.6}),
    ("Stable Diffusion", {"ip_adapter_image": None, "callback_on_step_end_tensor_inputs": ["latents"], "return_dict": True}),
    ("Stable Diffusion XL", {"height": 24, "original_size": (64, 48), "crops_coords_top_left": (4, 2), "target_size": (40, 40)}),
    ("Stable Diffusion XL", {"guidance_rescale": 0.5, "clip_skip": 1}),
    ("Stable Diffusion XL", {"timesteps": [900, 600, 300, 50]}),
    ("Stable Diffusion XL", {"sigmas": [10.0, 4.0, 1.5, 0.4]}),
    ("Stable Diffusion 3", {"sigmas": [1.0, 0.7, 0.5, 0.2]}),
    ("Stable Diffusion 3", {"clip_skip": 0, "max_sequence_length": 40}),
    ("Flux", {"guidance_scale": 1.5}),
    ("Flux", {"sigmas": [1.0, 0.8, 0.4, 0.1], "max_sequence_length": 40}),
    ("Flux", {"true_cfg_scale": 2.0}),
    ("PixArt-alpha", {"width": 96, "max_sequence_length": 40}),
    ("PixArt-sigma", {"clean_caption": False, "timesteps": None}),
    ("Wan", {"num_frames": 8, "width": 96}),
    ("Wan 2.2", {"guidance_scale_2": None}),
]


@pytest.mark.parametrize("family, options", OPTIONS, ids=[f"{name}: {', '.join(options)}" for name, options in OPTIONS])
def test_options(built, family, options):
    """Each changes the pictures, unless it says what the default is."""
    pipe, kwargs = built(family), BUILDS[family][1]
    got = check(pipe, kwargs | options)
    assert worst(native(pipe, apart(), kwargs | options)[0], stock(pipe, kwargs | options)) <= 1e-5
    plain = native(pipe, flat(), kwargs)[0]
    neutral = all(value in (None, True, False, ["latents"]) for value in options.values()) and family != "Wan 2.2"
    assert neutral == (got.shape == plain.shape and torch.equal(got, plain))


def test_stochastic_flow_draws_from_torchs_generator(built):
    """Stable Diffusion 3 passes no generator to `step`."""
    pipe = built("Stable Diffusion 3")
    scheduler = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, stochastic_sampling=True)
    kwargs = BUILDS["Stable Diffusion 3"][1]
    drawn = []
    for engine in (hooked, native):
        torch.manual_seed(5)
        drawn.append((engine(pipe, flat(), kwargs)[0], torch.get_rng_state()))
    pipe.scheduler = scheduler
    assert worst(drawn[0][0], drawn[1][0]) <= 1e-5 and torch.equal(drawn[0][1], drawn[1][1])


def test_dynamic_shift_of_stable_diffusion_3():
    pipe = sd3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    by_size = check(pipe, GUIDED | SMALL)
    assert worst(check(pipe, GUIDED | SMALL | {"mu": 1.5}), by_size) > 1e-4


def test_a_unet_that_is_told_the_guidance_scale():
    """Latent consistency models: no second row."""
    lcm = unets.lcm_pipeline()
    pipe = StableDiffusionPipeline(**lcm.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    weak = check(pipe, GUIDED)
    assert worst(check(pipe, GUIDED | {"guidance_scale": 9.0}), weak) > 1e-3
    assert native(pipe, flat(), GUIDED)[1]["guidance_copies"] == 1


@pytest.mark.parametrize("name", ["PixArtAlphaPipeline", "PixArtSigmaPipeline"])
def test_resolution_bins(name):
    """The pictures are drawn in the nearest size of training, and have the size that was asked for."""
    pipe = pixart(name, 32)
    kwargs = PIXART | {"use_resolution_binning": True, "height": 200, "width": 280, "num_inference_steps": 2}
    assert check(pipe, kwargs).shape[-2:] == (26, 36)  # 208 × 288 pixels
    assert check(pipe, kwargs, output_type="np", tolerance=1e-4).shape == (5, 200, 280, 3)
    with pytest.raises(ValueError, match="use_resolution_binning needs a transformer of sample_size 32, 64, 128, 256, got 8"):
        native(pixart(name, 8), flat(), PIXART | {"use_resolution_binning": True})


def test_a_timestep_per_token():
    pipe = wan(expand_timesteps=True)
    check(pipe, GUIDED | SMALL | {"num_frames": 5})


def test_one_transformer_for_all_noise_levels():
    """Wan 2.2 with its low-noise transformer alone."""
    pipe = wan(transformer_2=videos.wan_transformer(seed=1), boundary_ratio=1.1)
    whole = check(pipe, GUIDED | SMALL | {"num_frames": 5})
    pipe.register_modules(transformer=None)
    assert torch.equal(native(pipe, flat(), GUIDED | SMALL | {"num_frames": 5})[0], whole)


@pytest.mark.parametrize("output_type", ["pil", "pt"])
def test_output_types(built, output_type):
    for family in ("Stable Diffusion", "Wan"):
        pipe, kwargs = built(family), BUILDS[family][1]
        got, expected = (engine(pipe, flat(), kwargs, output_type=output_type)[0] for engine in (native, hooked))
        assert type(got) is type(expected) and len(got) == len(PROMPTS)


def test_the_safety_checker_blackens(built):
    pipe = relative(StableDiffusionPipeline)

    def check_safety(image, device, dtype):
        assert dtype == torch.float32 and device == torch.device("cpu")
        return image, [number == 1 for number in range(len(image))]

    pipe.run_safety_checker = check_safety
    got = check(pipe, GUIDED, output_type="np", tolerance=1e-4)
    assert got[1].min() < 0 <= got[0].min(), "what is flagged is not normalised"


def test_a_half_precision_vae_decodes_in_float32():
    pipe = xl()
    pipe.vae.to(torch.float16)
    got = native(pipe, flat(), GUIDED, output_type="np")[0]
    assert pipe.vae.dtype == torch.float16
    assert worst(got, hooked(pipe, flat(), GUIDED, output_type="np")[0]) <= 1e-4
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5])
    shifted = native(pipe, flat(), GUIDED, output_type="np")[0]
    assert worst(shifted, got) > 1e-3 and worst(shifted, hooked(pipe, flat(), GUIDED, output_type="np")[0]) <= 1e-4


# ---- refusals

IMAGE = torch.zeros(1, 3, 16, 16)
REFUSED = [
    ("Stable Diffusion", {"ip_adapter_image": IMAGE}, "leaves the argument ip_adapter_image at its default, got Tensor"),
    ("Stable Diffusion", {"cross_attention_kwargs": {"scale": 0.5}}, "argument cross_attention_kwargs .* got {'scale': 0.5}"),
    ("Stable Diffusion", {"callback_on_step_end": print}, "argument callback_on_step_end "),
    ("Stable Diffusion", {"num_images_per_prompt": 2}, "argument num_images_per_prompt at its default, got 2"),
    ("Stable Diffusion", {"latents": torch.zeros(5, 4, 8, 8)}, "argument latents "),
    ("Stable Diffusion", {"prompt_embeds": torch.zeros(5, 77, 32)}, "argument prompt_embeds "),
    ("Stable Diffusion", {"callback": print}, "argument callback "),
    ("Stable Diffusion XL", {"denoising_end": 0.8}, "argument denoising_end at its default, got 0.8"),
    ("Stable Diffusion XL", {"negative_original_size": (8, 8)}, "argument negative_original_size "),
    ("Stable Diffusion XL", {"prompt_2": "a house"}, "argument prompt_2 "),
    ("Stable Diffusion 3", {"skip_guidance_layers": [0]}, r"argument skip_guidance_layers at its default, got \[0\]"),
    ("Stable Diffusion 3", {"joint_attention_kwargs": {}}, "argument joint_attention_kwargs "),
    ("Flux", {"negative_ip_adapter_image": IMAGE}, "argument negative_ip_adapter_image "),
    ("PixArt-sigma", {"callback_steps": 2}, "argument callback_steps at its default, got 2"),
    ("PixArt-alpha", {"num_inference_steps": 1}, "num_inference_steps = 1"),
    ("Wan", {"attention_kwargs": {}}, "argument attention_kwargs "),
]


def refused(pipe, kwargs, message, plan=None):
    """Raised with a message that says what to do, before a generator was touched."""
    gens = generators()
    with pytest.raises(NotNative, match=message) as error:
        native(pipe, plan or flat(), kwargs, gens=gens)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(gens, generators()))
    return str(error.value)


@pytest.mark.parametrize("family, options, message", REFUSED, ids=[f"{name}: {', '.join(given)}" for name, given, _ in REFUSED])
def test_arguments_that_are_not_covered(built, family, options, message):
    text = refused(built(family), BUILDS[family][1] | options, message)
    assert text.endswith("call the pipeline inside sage.enable")


def test_schedulers_outside_the_table(built):
    pipe, kwargs = built("Stable Diffusion"), GUIDED
    scheduler = pipe.scheduler
    pipe.scheduler = PNDMScheduler.from_config(scheduler.config)
    refused(pipe, kwargs, r"the native loop steps through the coefficient table, which this scheduler leaves \(PNDMScheduler")
    pipe.scheduler = type(scheduler).from_config(scheduler.config, thresholding=True)
    refused(pipe, kwargs, "dynamic thresholding")
    pipe.scheduler = scheduler


def test_pipelines_without_an_adapter(built):
    class Mine(StableDiffusionPipeline):
        pass

    for cls in (StableDiffusionImg2ImgPipeline, Mine):
        pipe = relative(cls)
        assert adapter_for(pipe) is None
        refused(pipe, GUIDED, f"{cls.__name__} has no native adapter .*; call the pipeline inside sage.enable")


def test_caches():
    pipe = flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    kwargs = BUILDS["Flux"][1]
    refused(pipe, kwargs, r"FluxPipeline: a cache is on \(FBC\w+\)")
    pipe.transformer.disable_cache()
    native(pipe, flat(), kwargs)


def test_device_maps():
    pipe = flux()
    pipe.hf_device_map = {"transformer": "cuda:0", "vae": "cuda:1"}
    refused(pipe, BUILDS["Flux"][1], "its modules are spread over cuda:0, cuda:1 by a device map")
    pipe.hf_device_map = {"transformer": "cpu", "vae": "cpu"}
    native(pipe, flat(), BUILDS["Flux"][1])


def test_wrong_numbers_of_things(built):
    pipe = built("Stable Diffusion")
    with pytest.raises(ValueError, match="prompts must hold 5 entries, one per leaf of the plan, got 4"):
        draw(pipe, flat(), PROMPTS[:4], None, generators())
    with pytest.raises(ValueError, match="negatives must hold 5 entries, one per leaf of the plan, got 6"):
        draw(pipe, flat(), PROMPTS, [*NEGATIVES, ""], generators())
    with pytest.raises(ValueError, match="generators must hold 5 entries, one per leaf of the plan, got 3"):
        draw(pipe, flat(), PROMPTS, None, generators()[:3])
    with pytest.raises(ValueError, match="graphs need x_init and the denoiser on a CUDA device"):
        native(pipe, flat(), GUIDED, graphs=True)


def test_the_pipelines_own_checks(built):
    with pytest.raises(ValueError, match="have to be divisible by 8"):
        native(built("Stable Diffusion"), flat(), GUIDED | {"height": 9, "width": 16})
    with pytest.raises(ValueError, match="guidance_scale_2"):
        native(built("Wan"), flat(), BUILDS["Wan"][1] | {"guidance_scale_2": 2.0})


def test_one_picture(built):
    for family in ("Stable Diffusion", "Stable Diffusion XL", "Flux true CFG", "PixArt-alpha", "Wan 2.2"):
        pipe, kwargs = built(family), BUILDS[family][1]
        plan = SharingPlan.independent(LEAVES[:1])
        got = draw(pipe, plan, PROMPTS[:1], NEGATIVES[:1], generators()[:1], output_type="latent", **kwargs)[0]
        assert worst(got, stock(pipe, kwargs)[:1]) <= 1e-5


def test_a_leaf_whose_solver_draws_before_the_groups_part(built):
    """Every leaf's generator draws at every call; the trunk uses its representative's."""
    pipe = built("Stable Diffusion")
    scheduler = pipe.scheduler
    check(with_solver(pipe, "euler-a", {}), GUIDED, SharingPlan.flat(LEAVES, [[0, 1, 2, 3, 4]], 0.75, representatives=[3]))
    pipe.scheduler = scheduler
