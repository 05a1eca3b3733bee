"""What a step is fed: latents of pictures and conditions of captions, encoded as they come or read from caches.

Latents are the modes of the autoencoder's posterior, so that a training is the same with a cache and without.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from sage.training.cache import LatentCache, TextCache
from sage.training.data import TrainingSet, Transform
from sage.training.families import Family
from sage.training.sampler import GroupBatch, GroupBatchSampler, GroupPictures

__all__ = ["Inputs"]


class Inputs:
    """Batches for a family's denoiser.

    Args:
        family: whose encoders make latents and conditions.
        training_set, transform, seed: the pictures, and how they become tensors.
        cache: folder of the caches.
        cache_latents, cache_text: keep latents, and conditions, in it.
    """

    def __init__(
        self,
        family: Family,
        training_set: TrainingSet,
        transform: Transform,
        seed: int,
        cache: Path,
        *,
        cache_latents: bool = False,
        cache_text: bool = False,
    ):
        self.family, self.training_set, self.transform, self.seed = family, training_set, transform, seed
        self.latent_cache = self.text_cache = None
        if cache_latents:
            self.latent_cache = LatentCache(cache, training_set, transform, _identity("latents", {"vae": family.pipe.vae}))
        if cache_text:
            encoders = {name: part for name, part in family.pipe.components.items() if name.startswith("text_encoder") and part is not None}
            self.text_cache = TextCache(cache, _identity(f"conditions {sorted(family.asked.items())}", encoders))

    @property
    def encodes(self) -> bool:
        """Whether encoders are needed once the caches are filled."""
        return self.latent_cache is None or self.text_cache is None

    def fill(self, rank: int, world_size: int, progress: bool = True) -> None:
        """Make what the caches lack: this process's part of it."""
        if self.latent_cache is not None:
            self.latent_cache.fill(self._encode_pixels, rows=range(rank, len(self.training_set), world_size), progress=progress)
        if self.text_cache is not None:
            captions = sorted(set(self.training_set.captions))[rank::world_size]
            if captions:
                self.text_cache.fill(captions, self.family.encode_prompts, progress=progress)

    def loader(self, sampler: GroupBatchSampler, num_workers: int = 0) -> DataLoader:
        """Batches in the sampler's order, each read as a whole by one of the workers."""
        pictures = GroupPictures(self.training_set, self.transform, self.seed)
        if self.latent_cache is not None:
            pictures = _Latents(self.latent_cache, self.seed)
        # A worker of its own would take its seed from torch's random state; here nothing depends on it.
        return DataLoader(pictures, sampler=sampler, batch_size=None, num_workers=num_workers, generator=torch.Generator())

    def __call__(self, item: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(latents [n, ...] in float32, conditions with n rows) of what the loader gave, on `device`."""
        batch: GroupBatch = item["batch"]
        latents = item["latents"] if "latents" in item else self._encode_pixels(item["pixel_values"])
        captions = [self.training_set.captions[row] for row in batch.rows]
        if self.text_cache is None:
            conditions = self.family.encode_prompts(captions)
        else:
            conditions = self.text_cache.read(captions, self.family.encode_prompts)
        return latents.to(device), {name: value.to(device) for name, value in conditions.items()}

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.family.encode_images(pixels)


class _Latents(Dataset):
    """Latents of whole batches, from a filled cache."""

    def __init__(self, cache: LatentCache, seed: int):
        self.cache, self.seed = cache, seed

    def __len__(self) -> int:
        return len(self.cache.training_set)

    def __getitem__(self, batch: GroupBatch) -> dict[str, Any]:
        return {"latents": self.cache.read(batch.rows, self.seed, batch.epoch), "batch": batch}


def _identity(what: str, modules: dict[str, torch.nn.Module]) -> str:
    """A text that changes whenever the modules' weights or their dtypes do."""
    whole = hashlib.sha256()
    for part, module in sorted(modules.items()):
        for name, value in sorted(module.state_dict().items()):
            whole.update(f"{part} {name} {value.dtype} {tuple(value.shape)}\n".encode())
            whole.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"{what} {whole.hexdigest()}"
