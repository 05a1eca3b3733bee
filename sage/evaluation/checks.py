"""What the metrics ask of their arguments; all is then computed in float64, where the tensor lies."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sage.plan_checks import integer, short

__all__ = ["as_features", "as_groups", "as_pair", "as_unit"]


def as_features(x: Any, name: str, least: int = 1) -> torch.Tensor:
    """Features as float64 [N, C], on the device they came on (on the CPU where a device has no float64).

    Args:
        x: [N, C] tensor or array of real numbers.
        name: what errors call it, operation and argument.
        least: the rows that are needed.

    Raises:
        TypeError: no tensor or array of real numbers.
        ValueError: another shape, too few rows, NaN or infinity.
    """
    if not torch.is_tensor(x):
        array = np.asarray(x)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be a tensor or array of real numbers, got {type(x).__name__} of {array.dtype}")
        x = torch.from_numpy(array.astype(np.float64))  # a copy: arrays may be read-only
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}; use {name.split()[-1]}.double()")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must be [N, C], one row of features per picture, got {list(x.shape)}")
    if len(x) < least:
        raise ValueError(f"{name} needs at least {least} row{'s' if least > 1 else ''}, got {len(x)}; give more pictures")
    x = x.detach()
    x = (x.cpu() if x.device.type == "mps" else x).double()
    finite = x.isfinite().all(1)
    if not finite.all():
        bad = (~finite).nonzero()[:, 0].tolist()
        raise ValueError(f"{name} must be finite, but rows {short(bad)} hold NaN or infinity; look at those pictures")
    return x


def as_pair(a: Any, b: Any, operation: str, least: int = 1, names: tuple[str, str] = ("a", "b")) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of features of one width and on one device, as `as_features` gives them.

    Raises:
        TypeError: as `as_features`; two devices.
        ValueError: as `as_features`; two widths.
    """
    a, b = as_features(a, f"{operation}: {names[0]}", least), as_features(b, f"{operation}: {names[1]}", least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{operation}: {names[0]} and {names[1]} must have one width, got {list(a.shape)} and {list(b.shape)}; "
                         "use the same extractor for both")
    if a.device != b.device:
        raise TypeError(f"{operation}: {names[0]} and {names[1]} must be on one device, got {a.device} and {b.device}; use .to()")
    return a, b


def as_unit(x: Any, name: str, least: int = 1) -> torch.Tensor:
    """Embeddings as float64 [N, C] whose rows have length 1; lengths must be 1 up to the rounding of half precision.

    Raises:
        TypeError, ValueError: as `as_features`; rows of another length.
    """
    x = as_features(x, name, least)
    length = x.norm(dim=1, keepdim=True)
    bad = ((length[:, 0] - 1).abs() > 0.01).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"{name} must have rows of length 1, but rows {short(bad)} have {float(length[bad[0]]):.4g} and others; "
                         "use embed_images or embed_texts, or divide by the norm")
    return x / length


def as_groups(groups: Sequence[Sequence[int]], n: int, name: str) -> list[list[int]]:
    """Groups as lists of row numbers; no row may be in two groups, and rows may be in none.

    Args:
        groups: each a sequence or tensor of row numbers.
        n: number of rows.
        name: what errors call it.

    Raises:
        TypeError: no sequence of sequences of integers.
        ValueError: an empty group, a row out of range, a row twice.
    """
    try:
        lists = [group.tolist() if hasattr(group, "tolist") else list(group) for group in groups]
    except TypeError:
        raise TypeError(f"{name} must be a list of lists of row numbers, got {groups!r:.80}; one list per group") from None
    lists = [[integer(row, f"{name}: row of group {k}") for row in group] for k, group in enumerate(lists)]
    seen: dict[int, int] = {}
    for k, group in enumerate(lists):
        if not group:
            raise ValueError(f"{name}: group {k} is empty; leave it out")
        for row in group:
            if not 0 <= row < n:
                raise ValueError(f"{name}: group {k} has row {row}, but there are {n} rows, 0 to {n - 1}")
            if row in seen:
                raise ValueError(f"{name}: row {row} is in groups {seen[row]} and {k}; a row may be in one group, once")
            seen[row] = k
    return lists
