"""An `AutoencoderKL` around the fixed latents: the encoder regresses them, the decoder turns them into pictures.

The linear codec decodes too, but a pipeline folder may hold stock diffusers classes only. The decoder sees
neighbouring patches, so it also beats the linear one.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from .checkpoint import Run
from .codec import CHANNELS, PatchCodec
from .recipe import VaeRecipe, annealed


def build_vae(recipe: VaeRecipe):
    """A factor-4 AutoencoderKL with 16 latent channels; latents need no further scaling."""
    from diffusers import AutoencoderKL

    depth = len(recipe.channels)
    return AutoencoderKL(
        block_out_channels=recipe.channels, layers_per_block=1, latent_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
        norm_num_groups=recipe.norm_groups, sample_size=32, mid_block_add_attention=False, scaling_factor=1.0)


def train_vae(draw: Callable[[int, torch.Generator], torch.Tensor], codec: PatchCodec, recipe: VaeRecipe, path: Path,
              save_every: int = 50):
    """Trains from scratch, or from the checkpoint at `path`.

    Args: draw: (count, generator) to pictures [count, 3, 32, 32] float32 in [-1, 1].  codec: defines the latents.
    Returns: the averaged AutoencoderKL, in eval mode.
    """
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = build_vae(recipe).to(memory_format=torch.channels_last).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=1e-3, betas=(0.9, 0.99), fused=True)
    run = Run(path, "vae", recipe, {"model": model, "average": average}, optimizer, generator, save_every)
    for step in run:
        warm = min(1.0, (step + 1) / recipe.warmup)
        run.set_lr(recipe.lr * warm * annealed(step, recipe.anneal_from, recipe.steps))
        x = draw(recipe.batch, generator)
        latents = codec.encode(x)
        posterior = model.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        noisy = latents + recipe.latent_noise * torch.randn(latents.shape, generator=generator)
        y = model.decode(noisy.contiguous(memory_format=torch.channels_last)).sample
        decode_loss = F.l1_loss(y, x) + 2 * F.mse_loss(y, x)
        encode_loss = F.mse_loss(posterior.mean, latents) + 1e-3 * F.mse_loss(
            posterior.logvar, torch.full_like(posterior.logvar, recipe.logvar))
        (decode_loss + encode_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            keep = min(recipe.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        run.log(decode_loss, encode=encode_loss)
    return average.eval()
