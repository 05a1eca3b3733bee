"""What training feeds each family's denoiser, held against what the stock pipeline and sharing feed it."""

import inspect

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from families import dits, unets, videos
from native_cases import GUIDANCE, PIXART, PROMPTS, SMALL, flat, flux, pixart, sd3, t5, t5_tokenizer, with_parts, xl
from peft import LoraConfig, inject_adapter_in_model

import sage
from sage.training.families import FAMILIES, NoiseSchedule, family_for
from sage.training.targets import Segments

SEGMENTS = Segments(rows=torch.tensor([0, 2, 4, 1, 3]), offsets=torch.tensor([0, 3, 5]))  # as `flat` groups
PIXELS = (16, 16)  # the tiny autoencoders make 8 × 8 latents of it


def sana():
    torch.manual_seed(4)
    blocks = {f"{part}coder_{name}": value for part in ("en", "de") for name, value in SANA_BLOCKS.items()}
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41, **blocks).eval()
    pipe = with_parts(dits.sana(), text_encoder=t5(), tokenizer=t5_tokenizer(), vae=vae)
    pipe.transformer.register_to_config(timestep_scale=0.5)
    return pipe


def normalised_xl():
    pipe = xl()
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.0, 2.0])
    return pipe


SANA_BLOCKS = {"block_types": "ResBlock", "block_out_channels": (8, 16), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
INSTRUCTION = ["Describe it better.", "Prompt: "]
SANA = {"height": 256, "width": 256, "max_sequence_length": 24, "use_resolution_binning": False, "complex_human_instruction": INSTRUCTION}

# name → (the tiny pipeline, arguments of its call)
CASES = {
    "Stable Diffusion": (unets.STABLE_DIFFUSION.build, {}),
    "Stable Diffusion XL": (xl, {}),
    "Stable Diffusion XL, normalised latents": (normalised_xl, {}),
    "Stable Diffusion 3": (sd3, SMALL),
    "Flux distilled": (flux, {"guidance_scale": 2.5, **SMALL}),
    "Flux": (lambda: flux(guidance_embeds=False), SMALL),
    "PixArt-alpha": (lambda: pixart("PixArtAlphaPipeline", 128), PIXART),
    "PixArt-sigma": (lambda: pixart("PixArtSigmaPipeline", 8), PIXART),
    "Sana": (sana, SANA),
}


@pytest.fixture(scope="module", params=CASES)
def name(request):
    torch.set_num_threads(1)
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    return CASES[name][0]()


@pytest.fixture(scope="module")
def family(name, pipe):
    return family_of(name, pipe)


def family_of(name, pipe):
    """With those arguments of the call that reach the denoiser."""
    known = FAMILIES[type(pipe).__name__].call_arguments
    return family_for(pipe, **{argument: value for argument, value in CASES[name][1].items() if argument in known})


def draw(name, pipe, guided=False, **options):
    """A stock call of two steps, latents out."""
    kwargs = {**CASES[name][1], "num_inference_steps": 2, "output_type": "latent", **options}
    if not isinstance(pipe, FluxPipeline):  # which has no guidance in one batch
        kwargs["guidance_scale"] = GUIDANCE if guided else 1.0
    generators = [torch.Generator().manual_seed(number) for number in range(len(PROMPTS))]
    return pipe(PROMPTS, generator=generators, return_dict=False, **kwargs)[0]


class Captured:
    """Arguments (by name, those in containers by their own) and outputs of a module's calls while inside."""

    def __init__(self, module):
        self.module, self.inputs, self.outputs = module, [], []

    def __enter__(self):
        self._handle = self.module.register_forward_hook(self._saw, with_kwargs=True)
        return self

    def __exit__(self, *exc_info):
        self._handle.remove()

    def _saw(self, module, args, kwargs, output):
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        given = {**given, **(given.pop("added_cond_kwargs", None) or {})}
        self.inputs.append({key: value for key, value in given.items() if torch.is_tensor(value)})
        self.outputs.append(output[0])


def unpacked(pipe, latents):
    return pipe._unpack_latents(latents, 64, 64, 8) if isinstance(pipe, FluxPipeline) else latents


def noisy_of(pipe, inputs):
    """The latents [R, 4, 8, 8] that a captured call was given."""
    return unpacked(pipe, inputs.get("sample", inputs.get("hidden_states")))


def assert_same_call(got: dict, expected: dict):
    """Equal in every tensor argument; the same timestep may stand for all rows."""
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        value = value.expand_as(got[key]) if key == "timestep" else value
        assert value.shape == got[key].shape, key
        torch.testing.assert_close(got[key], value.to(got[key].dtype), rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def replay(pipe, family, stock: Captured, step: int, conditions):
    """`predict` for the latents and the timestep of a captured call: (what the denoiser was given, what came back)."""
    latents = noisy_of(pipe, stock.inputs[step])
    timesteps = pipe.scheduler.timesteps[step].expand(len(latents))
    with Captured(family.denoiser) as replayed, torch.no_grad():
        output = family.predict(latents, timesteps, conditions)
    return replayed.inputs[0], output


# ---- the denoiser's call


@pytest.mark.parametrize("step", [0, 1])
def test_predict_is_the_stock_pipelines_call(name, pipe, family, step):
    with Captured(family.denoiser) as stock:
        draw(name, pipe)
    given, output = replay(pipe, family, stock, step, family.encode_prompts(PROMPTS))
    assert_same_call(given, stock.inputs[step])
    assert output.shape == (len(PROMPTS), 4, 8, 8) and output.abs().max() > 1e-2
    torch.testing.assert_close(output, unpacked(pipe, stock.outputs[step])[:, :4], rtol=1e-5, atol=1e-5)


def test_the_mean_condition_is_what_sharing_feeds_the_denoiser(name, pipe, family):
    with Captured(family.denoiser) as shared, sage.enable(pipe, flat(0.5)):
        draw(name, pipe)
    assert [len(noisy_of(pipe, inputs)) for inputs in shared.inputs] == [2, 5]
    conditions = family.encode_prompts(PROMPTS)
    given, output = replay(pipe, family, shared, 0, family.mean_conditions(conditions, SEGMENTS))
    assert_same_call(given, shared.inputs[0])
    torch.testing.assert_close(output, unpacked(pipe, shared.outputs[0])[:, :4], rtol=1e-5, atol=1e-5)
    assert (given["encoder_hidden_states"] - conditions["encoder_hidden_states"][:2]).abs().max() > 1e-2, "a mean of different rows"


def test_an_empty_caption_is_what_guidance_starts_from(name, pipe, family):
    """For Flux there is no such row without true guidance: the empty text stands in."""
    empty = family.encode_empty(3)
    if isinstance(pipe, FluxPipeline):
        expected = family.encode_prompts([""] * 3)
    else:
        with Captured(family.denoiser) as stock:
            draw(name, pipe, guided=True)
        expected = {key: stock.inputs[0][key][:3] for key in empty}
    assert empty.keys() == expected.keys() == family.encode_prompts(["a"]).keys()
    for key, value in expected.items():
        torch.testing.assert_close(empty[key], value, rtol=0, atol=1e-6)


def test_a_row_does_not_depend_on_the_others(family):
    """Each row has its own noise level and condition."""
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps, conditions = torch.tensor([10, 500, 990]), family.encode_prompts(PROMPTS[:3])
    with torch.no_grad():
        together = family.predict(latents, timesteps, conditions)
        for i in range(3):
            alone = family.predict(latents[i : i + 1], timesteps[i : i + 1], {k: v[i : i + 1] for k, v in conditions.items()})
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)
        other = family.predict(latents, timesteps.flip(0), conditions)
    assert (other - together)[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-4


# ---- images


def test_images_come_back_through_the_stock_decoding(name, pipe, family, monkeypatch):
    """The sampler ends with encoded images: its decoder must be given what the encoder said."""
    pixels = torch.rand(len(PROMPTS), 3, *PIXELS, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = family.encode_images(pixels)
    assert latents.shape == (len(PROMPTS), 4, 8, 8) and latents.dtype == torch.float32 and not latents.requires_grad
    final = pipe._pack_latents(latents, *latents.shape) if isinstance(pipe, FluxPipeline) else latents
    monkeypatch.setattr(pipe.scheduler, "step", lambda *args, **kwargs: (final,))
    decode, decoded = pipe.vae.decode, []
    monkeypatch.setattr(pipe.vae, "decode", lambda z, *args, **kwargs: decoded.append(z) or decode(z, *args, **kwargs))
    draw(name, pipe, output_type="pt")
    with torch.no_grad():
        encoded = pipe.vae.encode(pixels)
    raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    torch.testing.assert_close(decoded[0], raw, rtol=1e-5, atol=1e-5)
    assert (latents - raw).abs().max() > 1e-3, "the scale is not one"


def test_a_generator_draws_from_the_posterior(name, pipe, family):
    pixels = torch.zeros(2, 3, *PIXELS)
    first, again, other = (family.encode_images(pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "Sana"), "Sana's autoencoder is deterministic"


@pytest.mark.parametrize("pixels", [torch.zeros(3, 16, 16), torch.zeros(2, 4, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)])
def test_pixels_are_checked(pixels):
    family = family_for(unets.STABLE_DIFFUSION.build())
    with pytest.raises(ValueError, match=r"pixels must be floating point \[N, 3, H, W\]"):
        family.encode_images(pixels)


def test_an_autoencoder_that_overflows_encodes_in_float32():
    pipe = unets.STABLE_DIFFUSION.build()
    pixels = torch.rand(1, 3, *PIXELS, generator=torch.Generator().manual_seed(3)).half().float()
    pipe.vae.half()
    latents = family_for(pipe).encode_images(pixels)
    assert pipe.vae.dtype == torch.float16
    assert torch.equal(latents, family_for(with_parts(pipe, vae=pipe.vae.float())).encode_images(pixels))


# ---- LoRA


def test_lora_alone_is_trained(name):
    pipe = CASES[name][0]()
    family = family_of(name, pipe)
    conditions = family.encode_prompts(PROMPTS[:2])
    latents, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([100, 900])
    before = family.predict(latents, timesteps, conditions).detach()
    family.denoiser.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=list(family.lora_targets), init_lora_weights=False), family.denoiser)
    output = family.predict(latents, timesteps, conditions)
    assert (output - before).abs().max() > 1e-4
    output.square().mean().backward()
    adapted = {key: parameter for key, parameter in family.denoiser.named_parameters() if "lora_" in key}
    for target in family.lora_targets:
        assert any(f".{target}.lora_A" in key for key in adapted), f"{target} adapts nothing"
    reached = {key for key, parameter in family.denoiser.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert reached and reached <= adapted.keys()
    others = [part for part in (pipe.vae, getattr(pipe, "text_encoder", None)) if part is not None]
    assert all(parameter.grad is None for part in others for parameter in part.parameters())
    assert not any(value.requires_grad for value in conditions.values())


def test_a_wrapper_may_be_called_in_the_place_of_the_denoiser():
    class Twice(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return (2 * self.module(*args, **kwargs)[0],)

    family = family_for(flux(), max_sequence_length=24)
    given = torch.ones(1, 4, 8, 8), torch.tensor([300.0]), family.encode_prompts(["a cat"])
    with torch.no_grad():
        assert torch.equal(family.predict(*given, Twice(family.denoiser)), 2 * family.predict(*given))


def test_the_denoiser_computes_in_its_own_dtype():
    pipe = sd3()
    family = family_for(pipe, max_sequence_length=24)
    pipe.transformer.to(torch.bfloat16)
    with Captured(pipe.transformer) as seen, torch.no_grad():
        output = family.predict(torch.ones(1, 4, 8, 8), torch.tensor([300.5]), family.encode_prompts(["a cat"]))
    assert output.dtype == torch.float32
    dtypes = {key: value.dtype for key, value in seen.inputs[0].items()}
    tokens = dict.fromkeys(["hidden_states", "encoder_hidden_states", "pooled_projections"], torch.bfloat16)
    assert dtypes == {**tokens, "timestep": torch.float32}


# ---- means


def test_means_weigh_tokens_by_their_masks():
    """Two captions of different length: at the longer one's last tokens it alone counts; a group of one stays as it is."""
    family = family_for(pixart("PixArtSigmaPipeline", 8), clean_caption=False, max_sequence_length=4)
    tokens = torch.tensor([[1.0, 2, 3, 4], [3, 6, 9, 12], [5, 5, 5, 5]])[..., None]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    segments = Segments(rows=torch.tensor([1, 0, 2]), offsets=torch.tensor([0, 2, 3]))
    means = family.mean_conditions({"encoder_hidden_states": tokens, "encoder_attention_mask": mask}, segments)
    assert means["encoder_hidden_states"][..., 0].tolist() == [[2, 4, 3, 8], [5, 5, 5, 5]]
    assert means["encoder_attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_means_of_some_rows_and_of_rows_in_several_nodes():
    family = family_for(unets.STABLE_DIFFUSION.build())
    tokens = torch.tensor([0.0, 1, 3, 8]).view(4, 1, 1)
    segments = Segments(rows=torch.tensor([3, 1, 3]), offsets=torch.tensor([0, 1, 3]))
    assert family.mean_conditions({"encoder_hidden_states": tokens}, segments)["encoder_hidden_states"].flatten().tolist() == [8, 4.5]


def test_sizes_that_are_given_replace_the_latents_own_and_must_be_alike_in_a_node():
    family = family_for(xl())
    ids = torch.tensor([[32.0, 16, 4, 0, 16, 16]] * 3)
    conditions = {**family.encode_prompts(PROMPTS[:3]), "time_ids": ids}
    segments = Segments(rows=torch.tensor([0, 1, 2]), offsets=torch.tensor([0, 2, 3]))
    means = family.mean_conditions(conditions, segments)
    assert torch.equal(means["time_ids"], ids[:2])
    with Captured(family.denoiser) as seen, torch.no_grad():
        family.predict(torch.zeros(2, 4, 8, 8), torch.tensor([5, 6]), means)
    assert torch.equal(seen.inputs[0]["time_ids"], ids[:2])
    ids[1, 2] = 0
    with pytest.raises(ValueError, match=r"conditions\['time_ids'\] differs between rows 1 and 0"):
        family.mean_conditions(conditions, segments)


def test_pictures_that_are_not_square_are_told_by_their_sides():
    family = family_for(pixart("PixArtAlphaPipeline", 128), clean_caption=False)
    sizes = family.size_conditions(2, height=64, width=32)
    assert sizes["resolution"].tolist() == [[64, 32]] * 2 and sizes["aspect_ratio"].tolist() == [[2]] * 2
    for other in (pixart("PixArtAlphaPipeline", 8), pixart("PixArtSigmaPipeline", 128)):
        assert family_for(other, clean_caption=False).size_conditions(2, 64, 32) == {}, "it is told no sizes"
    assert family_for(xl()).size_conditions(1, 24, 16)["time_ids"].tolist() == [[24, 16, 0, 0, 24, 16]]


# ---- the noise schedule


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
def test_levels_are_those_of_add_noise(cls):
    scheduler = cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
    schedule, timesteps = NoiseSchedule(scheduler), torch.tensor([0, 1, 400, 999])
    generator = torch.Generator().manual_seed(5)
    x, noise = (torch.randn(4, 3, generator=generator) for _ in range(2))
    alpha, sigma = schedule.levels(timesteps)
    torch.testing.assert_close(alpha[:, None] * x + sigma[:, None] * noise, scheduler.add_noise(x, noise, timesteps), rtol=1e-5, atol=1e-5)
    assert (schedule.prediction_type, schedule.num_train_timesteps, schedule.continuous) == ("v_prediction", 1000, False)


def test_levels_are_what_eulers_denoiser_is_given():
    """The solver keeps x + s·noise and hands over that divided by sqrt(1 + s²)."""
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(10)
    alpha, sigma = NoiseSchedule(scheduler).levels(scheduler.timesteps.long())
    torch.testing.assert_close(sigma / alpha, scheduler.sigmas[:-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(10))
    for s, t, expected in zip(scheduler.sigmas.clone(), scheduler.timesteps.clone(), sigma):
        scheduler.set_timesteps(10)  # the scheduler looks up the next timestep anew
        torch.testing.assert_close(scheduler.scale_model_input(s, t), expected, rtol=1e-4, atol=1e-5)


def test_levels_of_flow_matching_are_those_of_its_shifted_schedule():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule, timesteps = NoiseSchedule(scheduler), scheduler.timesteps[[0, 100, 999]]
    alpha, sigma = schedule.levels(timesteps)
    torch.testing.assert_close(sigma, scheduler.sigmas[[0, 100, 999]])
    x, noise = torch.tensor([[1.0], [2], [3]]), torch.tensor([[-1.0], [5], [0]])
    torch.testing.assert_close(alpha[:, None] * x + sigma[:, None] * noise, scheduler.scale_noise(x, timesteps, noise))
    assert (schedule.prediction_type, schedule.continuous) == ("flow_prediction", True)
    assert [level.tolist() for level in schedule.levels(torch.tensor([250]))] == [[0.75], [0.25]]


def test_a_solver_told_to_predict_flow_has_flow_levels():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(4)
    sigma = NoiseSchedule(scheduler).levels(scheduler.timesteps)[1]
    torch.testing.assert_close(sigma, scheduler.sigmas[:-1].float(), rtol=0, atol=1e-3)  # it rounds its timesteps to whole ones


# ---- refusals


def test_unknown_pipelines_and_schedulers_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="WanPipeline cannot be trained.*FluxPipeline.*StableDiffusionXLPipeline"):
        family_for(videos.wan())
    pipe = unets.STABLE_DIFFUSION.build()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(NotImplementedError, match="FlowMatchEulerDiscreteScheduler: invert_sigmas"):
        NoiseSchedule(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(NotImplementedError, match="EDMEulerScheduler with prediction_type 'epsilon'.*alphas_cumprod"):
        family_for(pipe)


def test_a_pipeline_with_sharing_on_has_its_family():
    pipe = unets.STABLE_DIFFUSION.build()
    with sage.enable(pipe, share=0.4):
        assert type(family_for(pipe)) is FAMILIES["StableDiffusionPipeline"]


def test_wrong_arguments_are_refused_by_name():
    pipe = unets.STABLE_DIFFUSION.build()
    with pytest.raises(TypeError, match="call arguments that training knows are clip_skip, got guidance_scale"):
        family_for(pipe, guidance_scale=3.0)
    family = family_for(pipe)
    with pytest.raises(TypeError, match="captions must be a sequence of texts"):
        family.encode_prompts("a cat")
    with pytest.raises(TypeError, match="timesteps must be of an integer dtype"):
        family.levels(torch.tensor([1.0]))
    conditions = family.encode_prompts(["a cat"])
    with pytest.raises(ValueError, match="encoder_hidden_states must have 2 rows"):
        family.predict(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), conditions)
    with pytest.raises(ValueError, match="timesteps must have 1 rows"):
        family.predict(torch.zeros(1, 4, 8, 8), torch.tensor(1), conditions)


def test_flux_refuses_latents_that_cannot_be_packed():
    family = family_for(flux(), max_sequence_length=24)
    with pytest.raises(ValueError, match="latents must have even sides.*7 × 8"):
        family.predict(torch.zeros(1, 4, 7, 8), torch.tensor([1]), family.encode_prompts(["a cat"]))
