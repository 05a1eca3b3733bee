"""What the transformer pipelines' families have in common: text conditions, noise, packing, flow schedules, guidance.

Nothing here imports the project: these are the rules of a trunk's condition and the pipelines' arithmetic written out by hand.
"""

import diffusers
import numpy as np
import torch
from tiny import randomise

GUIDANCE = 3.0
STEPS = 4
SIZE = 64  # pixels; 8×8 latents


def embeddings(pictures: list[int], salt: int, *shape: int) -> torch.Tensor:
    """[B, *shape]: random rows, one per picture number."""
    seeds = [1000 * salt + picture for picture in pictures]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def length(picture: int, salt: int, tokens: int) -> int:
    """How many tokens a picture's prompt has: from 2 to `tokens`, another number for each picture."""
    return 2 + (3 * picture + salt) % (tokens - 1)


def token_masks(pictures: list[int], salt: int, tokens: int) -> torch.Tensor:
    """int64 [B, tokens]: one at the tokens that count."""
    return torch.stack([(torch.arange(tokens) < length(picture, salt, tokens)).long() for picture in pictures])


def text(embeds: dict[str, tuple], masks: dict[str, str] | None = None, negative=True, mask_type=torch.int64, **options) -> dict:
    """The fields `conditions`, `row` and `mean` of a family that is conditioned by embeddings and token masks.

    Args:
        embeds: shape of a row of every embedding, by the name that the pipeline's call gives it.
        masks: the embedding that each token mask goes with; its first dimension is the tokens.
        negative: the same again under the name "negative_...".
        mask_type: the dtype that the pipeline has masks in.
        options: the rest of the call's keyword arguments.
    """
    prefixes = ("", "negative_") if negative else ("",)
    shapes = {prefix + name: shape for prefix in prefixes for name, shape in embeds.items()}
    masked = {prefix + mask: prefix + name for prefix in prefixes for mask, name in (masks or {}).items()}
    fixed = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, **options}

    def conditions(pipe, pictures):
        rows = {name: embeddings(pictures, salt, *shape) for salt, (name, shape) in enumerate(shapes.items(), 1)}
        for salt, (mask, name) in enumerate(masked.items()):
            rows[mask] = token_masks(pictures, salt, shapes[name][0]).to(mask_type)
        return {**fixed, **rows}

    def row(pipe, kwargs, i):
        return {name: kwargs[name][i : i + 1] for name in (*shapes, *masked)}

    def mean(members):
        stacked = {name: torch.cat([member[name] for member in members]) for name in members[0]}
        mask_of = {name: mask for mask, name in masked.items()}
        averaged = {name: masked_mean(stacked[name], stacked.get(mask_of.get(name))) for name in shapes}
        return {**averaged, **{mask: stacked[mask].amax(0, keepdim=True) for mask in masked}}

    return {"conditions": conditions, "row": row, "mean": mean}


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[M, ...] → [1, ...]: at each token over the members that have it, over all of them where none has."""
    if mask is None:
        return x.double().mean(0, keepdim=True).to(x.dtype)
    weights = torch.where(mask.bool().any(0), mask.double(), torch.ones((), dtype=torch.float64))
    return (x.double() * weights[..., None]).sum(0, keepdim=True).div(weights.sum(0)[..., None]).to(x.dtype)


def pipeline(name: str, transformer: torch.nn.Module, scheduler, **parts):
    """A pipeline whose transformer has random weights and whose other modules are None where `parts` does not give them."""
    cls = getattr(diffusers, name)
    given = {"transformer": randomise(transformer), "scheduler": scheduler, **parts}
    pipe = cls(**{part: None for part in cls._get_signature_keys(cls)[0]} | given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, pack=lambda x: x):
    """The field `start` of a family whose latents begin as `pack` of plain noise [1, *shape]."""
    return lambda pipe, kwargs, generator: pack(torch.randn((1, *shape), generator=generator))


def pack(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] → [N, H·W/4, 4·C]: 2×2 patches become tokens."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def flow_shift(tokens: int) -> float:
    """Flux's mu for a sequence of so many image tokens."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def even_sigmas(mu: float | None = None):
    """The field `scheduler_setup` of most flow-matching pipelines."""
    sigmas = np.linspace(1.0, 1 / STEPS, STEPS)
    return lambda pipe, scheduler: scheduler.set_timesteps(sigmas=sigmas, mu=mu)


def both(condition: dict, name: str) -> torch.Tensor:
    """The unconditional row, then the conditional one."""
    return torch.cat([condition["negative_" + name], condition[name]])


def guided(output: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance of a batch whose first half is unconditional."""
    unconditional, conditional = output.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def apart(predict):
    """`predict` of a family that guides by two calls: `predict(pipe, x, t, condition, prefix)` is one of them."""

    def guided_apart(pipe, x, t, condition, s):
        conditional, unconditional = (predict(pipe, x, t, condition, prefix) for prefix in ("", "negative_"))
        return unconditional + GUIDANCE * (conditional - unconditional)

    return guided_apart
