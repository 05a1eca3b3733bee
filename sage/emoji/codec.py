"""The latent space: a linear patch codec, fixed by principal components before anything is trained.

A 4 x 4 patch of an RGB picture is 48 numbers; its 16 leading principal components keep 27 dB. Having the latents
fixed from the start lets the denoiser train while nothing else exists, and leaves the `AutoencoderKL` in the shipped
folder with a regression to do rather than a representation to find.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

PATCH = 4
CHANNELS = 16


class PatchCodec:
    """Encodes pictures to unit-scale latents and back.

    basis: [48, 16] orthonormal columns.  mean: [48].  gain: [16], applied after the projection. The gain divides by
    the square root of a component's deviation, half-way between raw components (details drown in the noise
    schedule) and whitened ones (the noise in the details drowns the picture), then brings the whole to deviation 1.
    """

    def __init__(self, basis: torch.Tensor, mean: torch.Tensor, gain: torch.Tensor):
        self.basis, self.mean, self.gain = basis, mean, gain

    @classmethod
    def fit(cls, pictures: torch.Tensor) -> "PatchCodec":
        """Args: pictures (Tensor): [N, 3, H, W] float32 in [-1, 1]."""
        patches = _patches(pictures).reshape(-1, 3 * PATCH**2).double()
        mean = patches.mean(0)
        _, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean))
        basis = vectors.flip(1)[:, :CHANNELS]
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # the sign of a vector is free
        latents = (patches - mean) @ basis
        gain = latents.std(0).rsqrt()
        gain = gain / (latents * gain).std()
        return cls(basis.float().contiguous(), mean.float(), gain.float())

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] in [-1, 1] to [N, 16, H/4, W/4]."""
        latents = (_patches(pictures) - self.mean) @ self.basis * self.gain
        return latents.permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[N, 16, h, w] to [N, 3, 4h, 4w], clamped to [-1, 1]."""
        patches = (latents.permute(0, 2, 3, 1) / self.gain) @ self.basis.T + self.mean
        return F.pixel_shuffle(patches.permute(0, 3, 1, 2), PATCH).clamp(-1, 1)

    def save(self, path: Path) -> None:
        save_file({"basis": self.basis, "mean": self.mean, "gain": self.gain}, path)

    @classmethod
    def load(cls, path: Path) -> "PatchCodec":
        if not path.is_file():
            raise RuntimeError(f"patch codec: nothing at {path}; run: python -m sage.emoji.build --stage data")
        tensors = load_file(path)
        return cls(tensors["basis"], tensors["mean"], tensors["gain"])


def _patches(pictures: torch.Tensor) -> torch.Tensor:
    return F.pixel_unshuffle(pictures, PATCH).permute(0, 2, 3, 1)  # [N, H/4, W/4, 48]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio [dB]; range of the values is [-1, 1]."""
    mse = (a - b).div(2).pow(2).mean((1, 2, 3)).clamp(min=1e-10)
    return float(-10 * mse.log10().mean())
