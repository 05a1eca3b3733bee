"""The denoiser: a small conditional U-Net on 8 x 8 x 16 latents, v-prediction, trained on the CPU.

Two choices matter more than size. Stable Diffusion's scaled-linear schedule leaves the model most of its time at
noise levels where details are decided, and hundreds of passes over the captions let it learn each of them: with a
cosine schedule and a tenth of the passes the same network draws only the class of a thing.
"""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .checkpoint import Run
from .codec import CHANNELS, PatchCodec
from .recipe import UnetRecipe
from .scenes import Composer, Scene

TIMESTEPS = 1000


class SceneSource:
    """Pictures of scenes, composed as they are asked for, with what the denoiser attends to.

    Args: scenes: what is drawn from.  states: [captions, L, C] float16, the text encoder's, of the distinct captions in order of
        appearance.  composer, codec: make latents of a scene.
    """

    def __init__(self, scenes: Sequence[Scene], states: torch.Tensor, composer: Composer, codec: PatchCodec):
        self.scenes, self.states, self.composer, self.codec = scenes, states, composer, codec
        captions = distinct_captions(scenes)
        row = {caption: i for i, caption in enumerate(captions)}
        self._rows = torch.tensor([row[scene.caption] for scene in scenes])
        if len(states) != len(captions):
            raise ValueError(f"SceneSource: states: wanted one for each of {len(captions)} captions, got {len(states)}")

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents [count, 16, 8, 8], states [count, L, C]), scenes drawn with replacement."""
        picked = torch.randint(0, len(self.scenes), (count,), generator=generator)
        pictures = self.composer([self.scenes[i] for i in picked], generator)
        return self.codec.encode(pictures), self.states[self._rows[picked]].float()


def distinct_captions(scenes: Sequence[Scene]) -> list[str]:
    return list(dict.fromkeys(scene.caption for scene in scenes))


def build_unet(recipe: UnetRecipe, condition_width: int):
    """Attention at 4 x 4 only: at 8 x 8 it would take half of the time. What the caption says reaches the layers at 8 x 8 beside the
    timestep, as scales and shifts of a pooled embedding, which costs a twentieth of a step and learns faster."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=recipe.channels, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=condition_width, attention_head_dim=recipe.head, resnet_time_scale_shift="scale_shift",
        addition_embed_type="text", addition_embed_type_num_heads=recipe.pooling_heads)


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


class Shards:
    """Forward and backward over equal parts of a batch, one part a thread.

    Threads inside the operations of a network this small mostly wait for each other, so those are turned off, for the whole process.

    Args: model: its gradients are those of the mean loss over the batch.  count: parts, which share the model's weights.
    """

    def __init__(self, model: torch.nn.Module, count: int):
        self.models = [model] + [copy.deepcopy(model) for _ in range(count - 1)]
        for replica in self.models[1:]:
            for own, shared in zip(replica.parameters(), model.parameters()):
                own.data = shared.data
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, sample: torch.Tensor, t: torch.Tensor, states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Adds to the gradients of the model. Returns the mean loss."""
        count, n = len(self.models), len(sample)

        def part(k: int) -> torch.Tensor:
            rows = slice(n * k // count, n * (k + 1) // count)
            loss = F.mse_loss(self.models[k](sample[rows], t[rows], states[rows]).sample, target[rows]) * (rows.stop - rows.start) / n
            loss.backward()
            return loss.detach()

        losses = list(self._pool.map(part, range(count)))
        for replica in self.models[1:]:
            for own, shared in zip(replica.parameters(), self.models[0].parameters()):
                shared.grad += own.grad
                own.grad = None
        return sum(losses)


def train_unet(source: SceneSource, null_states: torch.Tensor, recipe: UnetRecipe, path: Path, save_every: int = 250):
    """Trains from scratch, or from the checkpoint at `path`.

    Args: null_states (Tensor): [1, L, C], the states of the empty caption.
    Returns: the averaged UNet2DConditionModel, in eval mode.
    """
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = build_unet(recipe, null_states.shape[2]).to(memory_format=torch.channels_last).train()
    average = copy.deepcopy(model).requires_grad_(False)
    weights, averaged = list(model.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(weights, recipe.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    run = Run(path, "unet", recipe, {"model": model, "average": average}, optimizer, generator, save_every)
    level, n, shards = alphas_cumprod(recipe), recipe.batch, Shards(model, torch.get_num_threads())
    for step in run:
        run.set_lr(recipe.lr * float(np.interp(step, *zip(*recipe.lr_knots))))
        x0, states = source.draw(n, generator)
        noise = torch.randn(x0.shape, generator=generator)
        # One timestep from each of n equal strata: the loss's variance over t goes.
        offset = torch.rand(1, generator=generator)
        t = ((torch.arange(n) + offset) / n * TIMESTEPS).long().clamp(0, TIMESTEPS - 1)
        t = t[torch.randperm(n, generator=generator)]
        alpha, sigma = level[t].sqrt()[:, None, None, None], (1 - level[t]).sqrt()[:, None, None, None]
        dropped = torch.rand(n, generator=generator) < recipe.caption_drop
        states = torch.where(dropped[:, None, None], null_states, states)
        sample = (alpha * x0 + sigma * noise).contiguous(memory_format=torch.channels_last)
        loss = shards.backward(sample, t, states, alpha * noise - sigma * x0)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - min(recipe.ema, (1 + step) / (10 + step)))
        run.log(loss)
    return average.eval()
