"""Every number the build depends on, in one place; `quick()` shrinks the run, not the code it runs through."""

import dataclasses


def annealed(step: int, start: int, steps: int) -> float:
    """Learning-rate factor: from 1 to 2/3 at `start`, from there to 0 at `steps`, piecewise linear."""
    return 1 - step / (3 * start) if step < start else 2 / 3 * (1 - (step - start) / (steps - start))


@dataclasses.dataclass(frozen=True)
class VaeRecipe:
    seed: int = 11
    scenes: int = 16_000
    stills: float = 0.2
    steps: int = 750
    anneal_from: int = 600
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 50
    latent_noise: float = 0.05  # [latent deviations] on the decoder's input, so that it forgives a denoiser's errors
    logvar: float = -10.0  # the encoder is deterministic but for this
    channels: tuple[int, ...] = (32, 64, 64)
    norm_groups: int = 16
    ema: float = 0.995


@dataclasses.dataclass(frozen=True)
class TextRecipe:
    seed: int = 5
    vocabulary: int = 9_800
    width: int = 256
    layers: tuple[int, ...] = (0, 2, 5)  # the teacher's layers that the student's start from
    intermediate: int = 1024
    definitions: int = 20_000
    examples: int = 25_000
    names: int = 12_000
    prompts: int = 45_000
    steps: int = 1250
    anneal_from: int = 600
    batch_tokens: int = 2048
    lr: float = 1e-3
    warmup: int = 100
    token_weight: float = 1.0
    pooled_weight: float = 10.0
    relational_weight: float = 30.0


@dataclasses.dataclass(frozen=True)
class UnetRecipe:
    seed: int = 1
    scenes: int = 16_000  # drawn once; their pictures are composed anew each time
    stills: float = 0.15  # the share of single emoji on white among them
    steps: int = 8000
    batch: int = 48
    lr: float = 1e-3
    lr_knots: tuple[tuple[int, float], ...] = ((0, 0.01), (99, 1.0), (5000, 1.0), (8000, 0.01))  # (step, factor), linear in between
    caption_drop: float = 0.1  # the share of captions replaced by "", for classifier-free guidance
    channels: tuple[int, ...] = (64, 128)
    head: int = 32
    pooling_heads: int = 4  # of the attention that pools the caption
    ema: float = 0.999
    beta_start: float = 0.00085  # Stable Diffusion's scaled-linear schedule, 1000 steps
    beta_end: float = 0.012


@dataclasses.dataclass(frozen=True)
class ScorerRecipe:
    seed: int = 23  # not the generator's
    scenes: int = 16_000
    stills: float = 0.1
    steps: int = 500
    batch: int = 128
    width: int = 28
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 50


@dataclasses.dataclass(frozen=True)
class Recipes:
    """All of them. codec_pictures: what the patch code is fitted to.  evaluation_prompts, evaluation_images: most of the benchmark's
    prompts that are drawn and judged, and pictures of each."""

    text: TextRecipe = TextRecipe()
    unet: UnetRecipe = UnetRecipe()
    vae: VaeRecipe = VaeRecipe()
    scorer: ScorerRecipe = ScorerRecipe()
    codec_pictures: int = 6_000
    evaluation_prompts: int | None = None
    evaluation_images: int = 2


def full() -> Recipes:
    """What the shipped weights were made by."""
    return Recipes()


def quick() -> Recipes:
    """A minute on two cores: proves the chain, not the model."""
    return Recipes(
        text=TextRecipe(definitions=100, examples=100, names=100, prompts=200, vocabulary=2500, steps=4, anneal_from=2),
        unet=UnetRecipe(scenes=200, steps=4, batch=8), vae=VaeRecipe(scenes=200, steps=4, batch=8, anneal_from=2),
        scorer=ScorerRecipe(scenes=200, steps=4, batch=32), codec_pictures=200, evaluation_prompts=12)
