"""Denoising by hand, one row at a time, with stock diffusers schedulers: what happens at a branch is left to the test."""

import copy
import sys
from unittest import mock

import diffusers
import torch
from tiny import NEGATIVES, PROMPTS

import sage
from sage.solvers import SOLVERS, table_for
from sage_kernels.philox import normals

STEPS, GUIDANCE, SHAPE = 6, 3.0, (4, 8, 8)
SEEDS = [100 + number for number in range(len(PROMPTS))]
LEAVES = [sage.Leaf(prompt, seed=seed) for prompt, seed in zip(PROMPTS, SEEDS)]


def philox(leaf: int, call: int, shape=SHAPE) -> torch.Tensor:
    """[1, ...]: what the kernel draws for a leaf's seed at a call."""
    count = torch.Size(shape).numel()
    return normals(torch.tensor([SEEDS[leaf]]), torch.tensor([call], dtype=torch.int32), count).view(1, *shape)


class Setting:
    """A tiny pipeline's U-Net with a stock scheduler, the prompts' conditions and the pictures' initial latents."""

    def __init__(self, pipe, solver: str, steps: int = STEPS, **overrides):
        name, options = SOLVERS[solver]
        self.unet = pipe.unet
        self.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **{**options, **overrides})
        self.scheduler.set_timesteps(steps)
        self.embeds, self.negatives = pipe.encode_prompt(PROMPTS, "cpu", 1, True, NEGATIVES)
        drawn = [torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
        self.x_init = torch.cat(drawn) * self.scheduler.init_noise_sigma
        self.table = table_for(self.scheduler)
        self.rows: list[int] = []  # of every denoiser call of `sample`

    def denoise(self, model_input, timestep, conditions):
        self.rows.append(len(model_input))
        return self.unet(model_input, timestep, encoder_hidden_states=conditions).sample

    @torch.no_grad()
    def sample(self, plan, x_init=None, leaves=None, **options):
        """`sage.sample` of some of the prompts (None: all)."""
        at = list(range(len(PROMPTS))) if leaves is None else leaves
        given = dict(negative_conditions=self.negatives[at], guidance_scale=GUIDANCE)
        if self.table.stochastic:
            given["seeds"] = torch.tensor(SEEDS)[at]
        x_init = self.x_init[at] if x_init is None else x_init
        return sage.sample(self.denoise, plan, self.table, x_init, self.embeds[at], **given | options)


class Row:
    """One row on its way, with a scheduler of its own.

    Attributes:
        x: [1, ...], the latents.
        call: denoiser calls made.
        output, before: the last guided model output, and the latents it was made for.
    """

    def __init__(self, setting: Setting, x: torch.Tensor):
        self.setting, self.x, self.call, self.scheduler = setting, x, 0, copy.deepcopy(setting.scheduler)
        self.output = self.before = None

    def copy(self) -> "Row":
        return copy.deepcopy(self, {id(self.setting): self.setting})

    @torch.no_grad()
    def run(
        self, calls: int, members: list[int], noise_of: int | None = None, guidance: float = GUIDANCE, negative=None, stream: int = 0
    ):
        """Go on for some calls under the mean of the members' conditions.

        Args:
            noise_of: the leaf whose Philox noise a stochastic solver gets.
            negative: [1, ...] instead of the mean of the members' negative conditions.
            stream: added to the call's number in the noise.
        """
        condition, mean = (_mean(embeds[members]) for embeds in (self.setting.embeds, self.setting.negatives))
        negative = mean if negative is None else negative
        for t in self.scheduler.timesteps[self.call : self.call + calls]:
            doubled = self.scheduler.scale_model_input(torch.cat([self.x, self.x]), t)
            uncond, cond = self.setting.unet(doubled, t, encoder_hidden_states=torch.cat([negative, condition])).sample.chunk(2)
            self.before, self.output = self.x, uncond + guidance * (cond - uncond)
            module = sys.modules[type(self.scheduler).__module__]
            with mock.patch.object(module, "randn_tensor", self._noise(noise_of, stream), create=True):
                self.x = self.scheduler.step(self.output, t, self.x).prev_sample
            self.call += 1
        return self

    def finish(self, leaf: int, **options) -> torch.Tensor:
        """[...]: the leaf's picture, from here on alone."""
        return self.run(len(self.scheduler.timesteps) - self.call, [leaf], leaf, **options).x[0]

    def part(self, eta: float, noise: torch.Tensor) -> "Row":
        """Replace part of the noise that the last step ended with by `noise` [1, ...].

        x' = α'·x0 + √(σ'² − c²)·ε + c·noise, c = η·σ'·√(1 − (σ'α/(σα'))²), where x' = α'·x0 + σ'·ε was the step's result.
        """
        alpha, sigma, alpha_end, sigma_end, x0 = self._levels()
        c = eta * sigma_end * (1 - (sigma_end * alpha / (sigma * alpha_end)) ** 2) ** 0.5
        eps = (self.x - alpha_end * x0) / sigma_end
        self.x = alpha_end * x0 + (sigma_end**2 - c**2) ** 0.5 * eps + c * noise
        if hasattr(self.scheduler, "disable_corrector"):  # it would go back to the sample before the noise
            self.scheduler.disable_corrector = [*self.scheduler.disable_corrector, self.call - 1]
        return self

    def _levels(self):
        """(α, σ) where the last step began, (α', σ') where it ended, and the x0 that its last output predicts (v-prediction)."""
        scheduler, i = self.scheduler, self.call - 1
        if isinstance(scheduler, diffusers.DDIMScheduler):
            t = int(scheduler.timesteps[i])
            kept = [scheduler.alphas_cumprod[t - lag].item() for lag in (0, 1000 // len(scheduler.timesteps))]
            (alpha, sigma), (alpha_end, sigma_end) = ((k**0.5, (1 - k) ** 0.5) for k in kept)
            return alpha, sigma, alpha_end, sigma_end, alpha * self.before - sigma * self.output
        heun = isinstance(scheduler, diffusers.HeunDiscreteScheduler)
        seen, now, after = (scheduler.sigmas[j].item() for j in (i, i - heun, i + 1))
        root = (seen**2 + 1) ** 0.5
        if heun or isinstance(scheduler, diffusers.EulerDiscreteScheduler):  # x = x0 + s·ε
            return 1.0, now, 1.0, after, self.before / root**2 - seen / root * self.output
        (alpha, sigma), (alpha_end, sigma_end) = ((1 / (s**2 + 1) ** 0.5, s / (s**2 + 1) ** 0.5) for s in (now, after))
        return alpha, sigma, alpha_end, sigma_end, self.before / root - seen / root * self.output

    def _noise(self, leaf: int | None, stream: int):
        def draw(shape, **options):
            assert leaf is not None, "the solver draws noise"
            return philox(leaf, self.call + stream)

        return draw


def _mean(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().mean(0, keepdim=True).float()
