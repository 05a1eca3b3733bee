"""What a pipeline's loop must be like for sharing to be right, looked at at the first step of a shared call.

Sharing takes row r of everything to be picture r, in copies one after another. A loop that interleaves its guidance copies,
hands its pictures to the denoiser in another order than to the scheduler, or runs them one by one would give pictures that look
right and are not: it is refused instead. Pictures that begin with equal noise cannot be told apart; then the next steps are looked at too,
as long as every group is one row.
"""

from __future__ import annotations

from typing import Any

import torch

from sage.denoiser import refuse_different
from sage.rows import Rows

_OWN, _OTHER = 1e-3, 0.999  # a row is out of place when another picture's latents fit it this much better, and this well
_APART = 0.25  # images beside the latents may differ by this share of their norm: encoders draw a little noise for each picture

_MIXED = (
    "{name} was called with latents whose row {row} holds picture {other} where sage expects picture {own}: the loop orders its rows "
    "otherwise than as copies of all pictures one after another, and a group's rows would be mixed up. Share in a loop of your own with "
    "sage.sample, or call the denoiser with torch.cat([latents] * k)"
)


class FirstStep:
    """Remembers the latents that the denoisers were given before the first step, and checks them at the step."""

    def __init__(self, rows: Rows, rules: dict[str, str]):
        self.rows, self.rules = rows, rules
        self._seen: list[tuple[str, torch.Tensor]] = []

    def saw(self, name: str, latents: Any) -> None:
        """A denoiser is called with `latents`, [k·B, ...] or a list of k·B rows."""
        if isinstance(latents, list):
            if any(row.shape != latents[0].shape for row in latents):
                return  # rows of different sizes cannot be mixed up unseen
            latents = torch.stack(latents)
        self._seen.append((name, latents))

    def check(self, model_output: torch.Tensor, sample: torch.Tensor) -> bool:
        """Refuse a loop whose rows are not the pictures', or whose pictures differ in more than their noise.

        Args:
            model_output, sample: [B, ...], what `scheduler.step` was given.

        Returns:
            Whether that settles it: False while pictures of different groups are too alike to tell.

        Raises:
            ValueError.
        """
        for name, latents in self._seen:
            latent, rest = _latent_part(latents, sample)
            if latent is not None:
                self._check_order(name, latent, sample.flatten(1))
            if rest is not None:
                pair = _apart(rest, self.rows, len(latents) // len(sample))
                if pair is not None:
                    raise ValueError(
                        f"what {name} gets beside the latents (an image, a mask: {tuple(rest.shape)}) differs between pictures "
                        f"{pair[0]} and {pair[1]}, which the plan puts into one group; group only pictures that have the same"
                    )
        self._seen.clear()
        if self.rules["model_output"] == "alike":
            self._check_outputs(model_output)
        groups = _directions(sample.flatten(1).index_select(0, self.rows.representatives.to(sample.device)))
        return bool(((groups @ groups.T).fill_diagonal_(0.0) < _OTHER).all())

    def _check_order(self, name: str, latent: torch.Tensor, sample: torch.Tensor) -> None:
        """Row c·B + r of `latent` [k·B, n] is row r of `sample` [B, n], up to a factor."""
        given, own = _directions(latent).unflatten(0, (-1, len(sample))), _directions(sample)
        fit = given @ own.T  # [k, B, B] cosines of given rows with every picture
        ours = fit.diagonal(dim1=1, dim2=2)
        best, other = fit.max(dim=2)
        wrong = ((best > ours + _OWN) & (best > _OTHER)).flatten()
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(_MIXED.format(name=name, row=row, own=row % len(sample), other=int(other.flatten()[row])))

    def _check_outputs(self, model_output: torch.Tensor) -> None:
        """Members of a node had one denoiser row: what the loop made of it must still be one."""
        members = model_output.index_select(0, self.rows.representative_rows(model_output.device))
        gap = (members - model_output).float().flatten(1).abs().amax(1)
        wrong = gap > 1e-3 * model_output.float().abs().max()
        if bool(wrong.any()):
            leaf = int(wrong.nonzero()[0])
            pair = leaf, int(self.rows.representative_of[leaf])
            refuse_different("what the loop makes of the denoiser's output (guidance, for example)", "model_output", pair)


def _latent_part(x: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """([k·B, n] the latents in a denoiser's input, what was concatenated to them); None where there is no telling."""
    if x[0].numel() == sample[0].numel():
        return x.flatten(1), None
    if x.ndim != sample.ndim:
        return None, None
    wider = [dim for dim in range(1, x.ndim) if x.shape[dim] != sample.shape[dim]]
    if len(wider) != 1 or x.shape[wider[0]] < sample.shape[wider[0]]:
        return None, None
    dim, size, more = wider[0], sample.shape[wider[0]], x.shape[wider[0]] - sample.shape[wider[0]]
    first, last = x.narrow(dim, 0, size).flatten(1), x.narrow(dim, more, size).flatten(1)
    if _likeness(last, sample) > _likeness(first, sample):
        return last, x.narrow(dim, 0, more)
    return first, x.narrow(dim, size, more)


def _likeness(x: torch.Tensor, sample: torch.Tensor) -> float:
    """Mean cosine of the first B rows with the pictures."""
    own = _directions(sample.flatten(1))
    return float((_directions(x[: len(own)]) * own).sum(1).mean())


def _apart(x: torch.Tensor, rows: Rows, copies: int) -> tuple[int, int] | None:
    """Two members of one node whose rows of `x` [k·B, ...] are different images; None if there are none."""
    own = x.float().flatten(1)
    other = own.index_select(0, rows.representative_rows(x.device, copies))
    far = (own - other).norm(dim=1) > _APART * torch.maximum(own.norm(dim=1), other.norm(dim=1))
    mask = ((own == 0) | (own == 1)).all(0)  # what says yes or no must be the same to the bit
    far |= ((own != other) & mask).any(1)
    if not bool(far.any()):
        return None
    leaf = int(far.nonzero()[0]) % rows.num_leaves
    return leaf, int(rows.representative_of[leaf])


def _directions(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x.float(), dim=1)
