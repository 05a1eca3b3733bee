"""How far apart latents or pictures are."""

import torch


def worst(a, b) -> float:
    """The largest difference of two arrays of one shape, all finite, as a share of the largest value of `b` if that is above 1."""
    a, b = (torch.as_tensor(x) for x in (a, b))
    assert a.shape == b.shape and torch.isfinite(a).all()
    return (a - b).abs().max().item() / max(1.0, b.abs().max().item())


def far(a, b, distance: float = 1e-3) -> bool:
    """Whether every row of one is further than that from the other's."""
    return min((x - y).abs().max().item() for x, y in zip(a, b, strict=True)) > distance
