"""Shared sampling written by hand for Stable Diffusion: the independent check of hook and native loop.

Imports nothing of this project. The trunk of a group runs alone, with a stock diffusers scheduler, under the mean of its
members' embeddings; at the branch scheduler and latents are deep-copied for each member, which goes on under its own.
"""

import copy

import torch

_STOCHASTIC = ("EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler", "SASolverScheduler")


def _step_kwargs(scheduler, generator):
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    return {"generator": generator} if takes_generator else {}


def _advance(unet, scheduler, x, t, negative, condition, guidance, generator):
    """One step of one row, as the pipeline does it: x [1, C, H, W]."""
    doubled = scheduler.scale_model_input(torch.cat([x, x]), t)
    uncond, cond = unet(doubled, t, encoder_hidden_states=torch.cat([negative, condition])).sample.chunk(2)
    return scheduler.step(uncond + guidance * (cond - uncond), t, x, **_step_kwargs(scheduler, generator)).prev_sample


def _skip_draws(scheduler, generator, steps, shape):
    """What a member's generator would have drawn during the trunk: stock draws at every step of a stochastic solver."""
    stochastic = type(scheduler).__name__ in _STOCHASTIC
    if stochastic or getattr(scheduler.config, "algorithm_type", "").startswith("sde"):
        for _ in range(steps):
            torch.randn(shape, generator=generator)


@torch.no_grad()
def shared_latents(pipe, scheduler, prompts, negatives, seeds, groups, branch, num_steps, guidance):
    """Final latents [B, C, H, W] of flat sharing.

    Args:
        groups: lists of prompt indices; the first member's noise is the trunk's.
        branch: denoiser calls that a group of more than one runs as one row.
    """
    embeds, negative_embeds = pipe.encode_prompt(prompts, "cpu", 1, True, negatives)
    size = pipe.unet.config.sample_size
    shape = (1, pipe.unet.config.in_channels, size, size)
    results = [None] * len(prompts)
    for group in groups:
        trunk = copy.deepcopy(scheduler)
        trunk.set_timesteps(num_steps)
        generators = {i: torch.Generator().manual_seed(seeds[i]) for i in group}
        noises = {i: torch.randn(shape, generator=generators[i]) for i in group}
        x = noises[group[0]] * trunk.init_noise_sigma
        calls = branch if len(group) > 1 else 0
        members = torch.tensor(group)
        mean = embeds[members].double().mean(0, keepdim=True).float()
        mean_negative = negative_embeds[members].double().mean(0, keepdim=True).float()
        for t in trunk.timesteps[:calls]:
            x = _advance(pipe.unet, trunk, x, t, mean_negative, mean, guidance, generators[group[0]])
        for i in group:
            own, y = copy.deepcopy(trunk), x.clone()
            if i != group[0]:
                _skip_draws(own, generators[i], calls, shape)
            for t in trunk.timesteps[calls:]:
                y = _advance(pipe.unet, own, y, t, negative_embeds[i : i + 1], embeds[i : i + 1], guidance, generators[i])
            results[i] = y
    return torch.cat(results)
