"""The denoiser: a small conditional U-Net on 8 x 8 x 16 latents, v-prediction, trained on the CPU.

Two choices matter more than size. Stable Diffusion's scaled-linear schedule leaves the model most of its time at
noise levels where details are decided, and hundreds of passes over the captions let it learn each of them: with a
cosine schedule and a tenth of the passes the same network draws only the class of a thing.
"""

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .checkpoint import Run
from .codec import CHANNELS
from .recipe import UnetRecipe

TIMESTEPS = 1000


class Stills:
    """Every caption has one picture. A richer source (composed scenes) needs `states` and `draw` only.

    states: [captions, 16, C] float32, what the denoiser attends to.  focus: [F] int64, the rows to end on.
    """

    def __init__(self, latents: torch.Tensor, states: torch.Tensor, focus: torch.Tensor):
        self.latents, self.states, self.focus = latents, states, focus

    def draw(self, count: int, focused: bool, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents [count, 16, 8, 8], caption rows [count] int64), drawn with replacement."""
        rows = torch.randint(0, len(self.focus) if focused else len(self.latents), (count,), generator=generator)
        rows = self.focus[rows] if focused else rows
        return self.latents[rows], rows


def build_unet(recipe: UnetRecipe, condition_width: int):
    from diffusers import UNet2DConditionModel

    depth = len(recipe.channels)
    return UNet2DConditionModel(
        sample_size=8, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=recipe.channels,
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * depth,
        up_block_types=("CrossAttnUpBlock2D",) * depth, cross_attention_dim=condition_width,
        attention_head_dim=recipe.head)


def build_scheduler(recipe: UnetRecipe):
    """DDIM, as shipped. The schedule ends short of pure noise, so sampling starts at its very last timestep."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS, beta_start=recipe.beta_start, beta_end=recipe.beta_end,
        beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing", steps_offset=1)  # trailing ignores the offset; the pipeline insists on it


def alphas_cumprod(recipe: UnetRecipe) -> torch.Tensor:
    """[1000] float32, the square of alpha_t."""
    betas = torch.linspace(recipe.beta_start**0.5, recipe.beta_end**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def train_unet(source: Stills, null_states: torch.Tensor, recipe: UnetRecipe, path: Path, save_every: int = 250):
    """Trains from scratch, or from the checkpoint at `path`.

    Args: null_states (Tensor): [1, 16, C], the states of the empty caption.
    Returns: the averaged UNet2DConditionModel, in eval mode.
    """
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = build_unet(recipe, null_states.shape[2]).to(memory_format=torch.channels_last).train()
    average = copy.deepcopy(model).requires_grad_(False)
    weights, averaged = list(model.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(weights, recipe.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    run = Run(path, "unet", recipe, {"model": model, "average": average}, optimizer, generator, save_every)
    level, n = alphas_cumprod(recipe), recipe.batch
    for step in run:
        run.set_lr(recipe.lr * float(np.interp(step, *zip(*recipe.lr_knots))))
        x0, rows = source.draw(n, step >= recipe.focus_from, generator)
        noise = torch.randn(x0.shape, generator=generator)
        # One timestep from each of n equal strata: the loss's variance over t goes.
        offset = torch.rand(1, generator=generator)
        t = ((torch.arange(n) + offset) / n * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        t = t[torch.randperm(n, generator=generator)]
        alpha, sigma = level[t].sqrt()[:, None, None, None], (1 - level[t]).sqrt()[:, None, None, None]
        dropped = torch.rand(n, generator=generator) < recipe.caption_drop
        states = torch.where(dropped[:, None, None], null_states, source.states[rows])
        sample = (alpha * x0 + sigma * noise).contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(model(sample, t, states).sample, alpha * noise - sigma * x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - min(recipe.ema, (1 + step) / (10 + step)))
        run.log(loss)
    return average.eval()
