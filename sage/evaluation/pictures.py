"""Pictures of any kind as 8-bit pixels: what a file would hold, so figures do not depend on whether a picture was saved."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

__all__ = ["as_uint8", "batches", "to_pil"]


def as_uint8(images: Any, name: str) -> Iterator[torch.Tensor]:
    """One picture after the other, uint8 [3, H, W] on the CPU.

    Args:
        images: uint8 [N, 3, H, W]; or floats [N, 3, H, W] in [-1, 1] (not [0, 1]), which are cut to it and rounded as diffusers
            does; or PIL images and uint8 [3, H, W] tensors of any sizes, as a list or one by one from an iterator.
        name: what errors call it, operation and argument.

    Raises:
        TypeError: something else. ValueError: another shape, NaN, or floats far outside [-1, 1].
    """
    if torch.is_tensor(images):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{name} must be [N, 3, H, W], got {list(images.shape)}; stack RGB pictures")
        yield from (_quantised(image, name) for image in images)
        return
    if isinstance(images, (str, bytes)) or not isinstance(images, Iterable) or hasattr(images, "__array__"):
        raise TypeError(f"{name} must be a tensor [N, 3, H, W] or a list of PIL images, got {type(images).__name__}")
    for image in images:
        yield _one(image, name)


def _one(image: Any, name: str) -> torch.Tensor:
    if torch.is_tensor(image) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
        return image.cpu()
    if not hasattr(image, "convert"):
        what = f"a tensor {list(image.shape)} of {image.dtype}" if torch.is_tensor(image) else type(image).__name__
        raise TypeError(f"{name} must hold PIL images or uint8 tensors [3, H, W], got {what}")
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _quantised(x: torch.Tensor, name: str) -> torch.Tensor:
    x = x.detach().cpu()
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise TypeError(f"{name} must be uint8 or floats in [-1, 1], got {x.dtype}; use images.byte() for levels of 0 to 255")
    largest = float(x.abs().max())
    if not largest <= 2:
        raise ValueError(f"{name} must be in [-1, 1], got {largest:.4g}; give levels of 0 to 255 as uint8")
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()


def batches(images: Any, size: int, name: str) -> Iterator[list[torch.Tensor]]:
    """`as_uint8` in lists of `size`; holds one at a time. Refuses no pictures at all (ValueError)."""
    pictures = as_uint8(images, name)
    batch = list(islice(pictures, size))
    if not batch:
        raise ValueError(f"{name} must be at least one picture, got none")
    while batch:
        yield batch
        batch = list(islice(pictures, size))


def to_pil(picture: torch.Tensor) -> Any:
    """uint8 [3, H, W] → a PIL image."""
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
