"""A tiny Stable Diffusion pipeline with random weights, built from configs: no download, milliseconds per call."""

import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PROMPTS = ["a red cat", "a red car", "a blue cat", "an old house by the sea", "a green cat"]
NEGATIVES = ["blurry", "dark", "blurry", "", "grey"]


def tokenizer_and_vocabulary() -> tuple[CLIPTokenizer, dict[str, int]]:
    """A CLIP tokenizer whose only tokens are single characters."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=77)
    return tokenizer, vocabulary


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Redraw every parameter, so that nothing is zero and the condition matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.9 / fan_in**0.5)
            elif "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x in miniature: 16-pixel pictures, 8×8 latents, DDIM with SD's settings."""
    tokenizer, vocabulary = tokenizer_and_vocabulary()
    torch.manual_seed(0)
    text_config = CLIPTextConfig(
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(vocabulary),
    )
    vae = AutoencoderKL(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    randomise(unet)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.3)  # predictions of the size of noise, so that latents stay of order one
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",  # as in SD 2; keeps the latents of a random model of order one
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=randomise(CLIPTextModel(text_config), seed=1),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int, base: int = 100) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(base + number) for number in range(count)]
