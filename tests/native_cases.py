"""Tiny pipelines with everything that a call from prompts to pictures needs, and a call through each engine."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from families import dits, dits_flux, unet_xl, unets, videos
from families.unet_parts import encoder
from tiny import NEGATIVES, PROMPTS, randomise, tokenizer_and_vocabulary
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

import sage
from sage import Leaf, Node, SageScheduler, SharingPlan
from sage.native import draw
from sage.solvers import SOLVERS

STEPS, GUIDANCE = 4, 3.0
SEEDS = [100 + number for number in range(len(PROMPTS))]
LEAVES = [Leaf(prompt) for prompt in PROMPTS]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
WIDTH = 32  # of what the transformers are told, token by token


# ---- text encoders and decoders


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Every character is a token; an end token closes a text, as T5's does."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def t5(model=T5EncoderModel, config=T5Config):
    sizes = dict(vocab_size=100, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    return randomise(model(config(**sizes, pad_token_id=0, eos_token_id=1)), seed=6)


def clip(model, seed: int):
    """Of width 16; what it projects to has 8 numbers."""
    vocabulary = tokenizer_and_vocabulary()[1]
    ends = dict(bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"])
    sizes = dict(hidden_size=16, projection_dim=8, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2)
    return randomise(model(CLIPTextConfig(**ends, **sizes, vocab_size=len(vocabulary))), seed)


def decoder() -> AutoencoderKL:
    torch.manual_seed(3)
    blocks = dict(block_out_channels=[4, 8], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    return AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=2, scaling_factor=0.7, shift_factor=0.1).eval()


def video_decoder() -> AutoencoderKLWan:
    torch.manual_seed(3)
    means, deviations = [0.1, -0.2, 0.3, 0.0], [1.5, 0.7, 1.0, 2.0]
    sizes = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return AutoencoderKLWan(**sizes, latents_mean=means, latents_std=deviations).eval()


def with_parts(pipe, **parts):
    pipe.register_modules(**parts)
    return pipe


# ---- pipelines


def xl():
    return with_parts(unet_xl.xl_pipeline(), vae=encoder())


def sd3():
    encoders = dict(text_encoder=clip(CLIPTextModelWithProjection, 1), text_encoder_2=clip(CLIPTextModelWithProjection, 2))
    tokenizer = tokenizer_and_vocabulary()[0]
    pipe = with_parts(dits.sd3(), vae=decoder(), text_encoder_3=t5(), tokenizer_3=t5_tokenizer(), **encoders)
    pipe.tokenizer_max_length = tokenizer.model_max_length
    return with_parts(pipe, tokenizer=tokenizer, tokenizer_2=tokenizer)


def flux(**options):
    parts = dict(text_encoder=clip(CLIPTextModel, 1), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(), vae=decoder())
    return with_parts(dits_flux.flux(**options), tokenizer=tokenizer_and_vocabulary()[0], **parts)


def pixart(name: str, sample_size: int):
    return with_parts(dits.pixart(name, sample_size), text_encoder=t5(), tokenizer=t5_tokenizer(), vae=decoder())


def wan(**parts):
    encoder = t5(UMT5EncoderModel, UMT5Config)
    return with_parts(videos.wan(**parts), text_encoder=encoder, tokenizer=t5_tokenizer(), vae=video_decoder())


def wan22():
    return wan(transformer_2=videos.wan_transformer(seed=1), boundary_ratio=videos.BOUNDARY)


@dataclass(frozen=True)
class Case:
    """One pipeline, and the arguments of its call.

    Attributes:
        solvers: solver name → overrides of the scheduler's config; "" keeps the pipeline's scheduler.
        copies: rows of a picture at one denoiser call of the native loop.
    """

    name: str
    build: Any
    kwargs: dict
    solvers: dict[str, dict] = field(default_factory=lambda: {"": {}})
    copies: int = 2


SMALL = {"height": 64, "width": 64, "max_sequence_length": 24}
FLOW_SOLVERS = {"": {}, "dpm++2m": FLOW, "unipc": FLOW}
UNET_SOLVERS = ("ddim", "euler", "euler-a", "dpm++2m", "dpm++2m-sde", "unipc", "lcm", "heun", "kdpm2-a")
GUIDED = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
PIXART = {**GUIDED, **SMALL, "use_resolution_binning": False, "clean_caption": False}
CASES = [
    Case("Stable Diffusion", unets.STABLE_DIFFUSION.build, GUIDED, {name: {} for name in UNET_SOLVERS}),
    Case("Stable Diffusion XL", xl, GUIDED, {"": {}, "dpm++2m": {}, "euler-a": {}}),
    Case("Stable Diffusion 3", sd3, GUIDED | SMALL, FLOW_SOLVERS),
    Case("Flux", flux, {"num_inference_steps": STEPS, **SMALL}, FLOW_SOLVERS, copies=1),
    Case("Flux true CFG", lambda: flux(guidance_embeds=False), GUIDED | SMALL | {"true_cfg_scale": GUIDANCE}),
    Case("PixArt-alpha", lambda: pixart("PixArtAlphaPipeline", 128), PIXART, {"": {}, "dpm++2m-sde": {}}),
    Case("PixArt-sigma", lambda: pixart("PixArtSigmaPipeline", 8), PIXART, {"": {}, "unipc": {}}),
    Case("Wan", wan, GUIDED | SMALL | {"num_frames": 5}, {"": {}, "dpm++2m": FLOW}),
    Case("Wan 2.2", wan22, GUIDED | SMALL | {"num_frames": 5, "guidance_scale_2": 2.0}),
]


def with_solver(pipe, solver: str, overrides: dict, sage_class: bool = False):
    """The pipeline with another scheduler: diffusers' own class, or this package's."""
    import diffusers

    if solver and sage_class:
        pipe.scheduler = SageScheduler.from_config(pipe.scheduler.config, solver=solver, **overrides)
    elif solver:
        name, options = SOLVERS[solver]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options, **overrides)
    return pipe


# ---- plans


def flat(share: float = 0.5) -> SharingPlan:
    groups = [[0, 2, 4], [1, 3]]
    return SharingPlan.flat(LEAVES, groups, share, representatives=[group[0] for group in groups])


def tree() -> SharingPlan:
    """Two of three part later than the third."""
    pair = Node((2, 4), 2, 0.75, (Node.single(2), Node.single(4)))
    root = Node((0, 2, 4), 2, 0.25, (Node.single(0), pair))
    return SharingPlan.tree(LEAVES, [root, Node((1, 3), 1, 0.5, (Node.single(1), Node.single(3)))])


def apart() -> SharingPlan:
    return SharingPlan.independent(LEAVES)


# ---- the engines


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def native(pipe, plan, kwargs, negatives=NEGATIVES, gens=None, output_type="latent", **options):
    """(pictures, stats, resolved plan) of the native loop."""
    return draw(pipe, plan, PROMPTS, negatives, gens or generators(), output_type=output_type, **options, **kwargs)


def stock(pipe, kwargs, negatives=NEGATIVES, gens=None, output_type="latent"):
    """Pictures of the pipeline's own call."""
    given = {} if negatives is None else {"negative_prompt": negatives}
    return pipe(PROMPTS, generator=gens or generators(), output_type=output_type, **given, **kwargs)[0]


def hooked(pipe, plan, kwargs, negatives=NEGATIVES, gens=None, output_type="latent", **options):
    """(pictures, stats, resolved plan) of the pipeline's own call inside `sage.enable`."""
    with sage.enable(pipe, plan, **options) as sharing:
        pictures = stock(pipe, kwargs, negatives, gens, output_type)
    return pictures, sharing.stats, sharing.resolved


class Rows:
    """Counts the rows of the denoiser's calls."""

    def __init__(self, pipe):
        self.seen: list[int] = []
        names = ("unet", "transformer", "transformer_2")
        modules = [module for module in (getattr(pipe, name, None) for name in names) if module is not None]
        self._handles = [module.register_forward_pre_hook(self._saw, with_kwargs=True) for module in modules]

    def _saw(self, module, args, kwargs):
        latents = args[0] if args else kwargs["hidden_states"]
        self.seen.append(len(latents))

    def __enter__(self):
        return self.seen

    def __exit__(self, *exc_info):
        for handle in self._handles:
            handle.remove()
