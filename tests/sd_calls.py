"""Calls of the tiny Stable Diffusion pipeline that tests of sharing have in common."""

import torch
from tiny import NEGATIVES, PROMPTS

from sage import Leaf, SharingPlan

STEPS, GUIDANCE = 6, 3.0
SEEDS = [100 + number for number in range(len(PROMPTS))]
LEAVES = [Leaf(prompt) for prompt in PROMPTS]
GROUPS = [[0, 2, 4], [1, 3]]


def draw(pipe, prompts=PROMPTS, negatives=NEGATIVES, seeds=SEEDS, **kwargs) -> torch.Tensor:
    """Latents [B, 4, 8, 8] of one call, a generator per picture."""
    options = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent") | kwargs
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, negative_prompt=negatives, generator=generators, **options).images


def flat(share: float = 0.5, groups=GROUPS) -> SharingPlan:
    """Groups whose first member represents them."""
    return SharingPlan.flat(LEAVES, groups, share, representatives=[group[0] for group in groups])
