"""Inception-v3 as FID uses it: the network, its weights, and clean-fid's way of preparing a picture.

The network is the one of 2015 that FID was defined with (arXiv:1512.00567; arXiv:1706.08500). It differs from torchvision's in how
four of its blocks pool. torch-fidelity has it too, but needs torchvision to be imported and only loads pickles. Parameters have the
names of the published file, so that file fits once converted:

    convert_inception("weights-inception-2015-12-05-6726825d.pth", "inception.safetensors", allow_pickle=True)
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["InceptionV3", "clean_resize", "convert_inception", "read_weights"]

DIM = 2048
SIDE = 299  # pixels the network takes
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
PUBLISHED = "6726825d"  # how the sha256 of the published file begins, as its name says
ORIGIN = "sha256_of_original"  # key in a converted file's metadata
_SAME = {"kernel_size": 3, "stride": 1, "padding": 1}  # a pool that keeps the size


class _Conv(nn.Module):
    """Convolution, BatchNorm with ε = 0.001, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, count_include_pad=False, **_SAME)


def _largest(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, **_SAME)


def _halved(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=2)


class _Block(nn.Module):
    """Branches beside one another, concatenated.

    Args:
        inputs: channels.
        branches: each (pool or None, convolutions after one another, convolutions that part at its end); a convolution is
            (name, outputs, kernel, stride, padding), the last two left out where they are 1 and 0.
    """

    def __init__(self, inputs: int, *branches: tuple):
        super().__init__()
        self.branches = []
        for pool, chain, *ends in branches:
            width = inputs
            for name, *shape in chain:
                self.add_module(name, _Conv(width, *shape))
                width = shape[0]
            for name, *shape in ends:
                self.add_module(name, _Conv(width, *shape))
            self.branches.append((pool, [name for name, *_ in chain], [name for name, *_ in ends]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = []
        for pool, chain, ends in self.branches:
            y = x if pool is None else pool(x)
            for name in chain:
                y = self.get_submodule(name)(y)
            out += [self.get_submodule(name)(y) for name in ends] or [y]
        return torch.cat(out, 1)


def _a(inputs: int, pooled: int) -> _Block:
    return _Block(
        inputs,
        (None, [("branch1x1", 64, 1)]),
        (None, [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5, 1, 2)]),
        (None, [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 1, 1)]),
        (_mean, [("branch_pool", pooled, 1)]),
    )


def _b(inputs: int) -> _Block:
    return _Block(
        inputs,
        (None, [("branch3x3", 384, 3, 2)]),
        (None, [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 2)]),
        (_halved, []),
    )


def _c(inputs: int, width: int) -> _Block:
    wide, tall = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    return _Block(
        inputs,
        (None, [("branch1x1", 192, 1)]),
        (None, [("branch7x7_1", width, 1), ("branch7x7_2", width, *wide), ("branch7x7_3", 192, *tall)]),
        (None, [("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, *tall), ("branch7x7dbl_3", width, *wide),
                ("branch7x7dbl_4", width, *tall), ("branch7x7dbl_5", 192, *wide)]),
        (_mean, [("branch_pool", 192, 1)]),
    )


def _d(inputs: int) -> _Block:
    return _Block(
        inputs,
        (None, [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)]),
        (None, [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7), 1, (0, 3)), ("branch7x7x3_3", 192, (7, 1), 1, (3, 0)),
                ("branch7x7x3_4", 192, 3, 2)]),
        (_halved, []),
    )


def _e(inputs: int, pool: Any) -> _Block:
    wide, tall = (384, (1, 3), 1, (0, 1)), (384, (3, 1), 1, (1, 0))
    return _Block(
        inputs,
        (None, [("branch1x1", 320, 1)]),
        (None, [("branch3x3_1", 384, 1)], ("branch3x3_2a", *wide), ("branch3x3_2b", *tall)),
        (None, [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3, 1, 1)], ("branch3x3dbl_3a", *wide), ("branch3x3dbl_3b", *tall)),
        (pool, [("branch_pool", 192, 1)]),
    )


class InceptionV3(nn.Module):
    """float32 [N, 3, 299, 299] in levels of 0 to 255, not rounded → [N, 2048], the mean over the last block's places ("pool3")."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = _Conv(3, 32, 3, 2), _Conv(32, 32, 3), _Conv(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80, 1), _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(768, 128), _c(768, 160), _c(768, 160), _c(768, 192)
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, _mean), _e(2048, _largest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - 128) / 128
        x = _halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def clean_resize(picture: torch.Tensor) -> torch.Tensor:
    """uint8 [3, H, W] → float32 [3, 299, 299] in 0 to 255, as clean-fid does (arXiv:2104.11222, section 3).

    PIL's bicubic filter, which widens with the scale, on each channel in 32-bit floats; cut to 0 … 255, not rounded.
    """
    from PIL import Image

    channels = [Image.fromarray(channel).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for channel in picture.float().numpy()]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]).clip(0, 255))


def read_weights(source: str | Path | None, allow_pickle: bool = False) -> tuple[dict[str, torch.Tensor], str | None]:
    """The network's tensors, and the sha256 of the pickle they come from, if that is known.

    Args:
        source: a .safetensors file; or, with consent, the published .pth; None: that is downloaded to torch.hub's folder.
        allow_pickle: consent to unpickle (torch.load with weights_only).

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: a pickle without consent; the download fails; the file cannot be read.
    """
    if source is not None and not Path(source).is_file():
        raise FileNotFoundError(f"inception: weights file {str(source)!r} does not exist")
    if source is not None and Path(source).suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(source, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, (file.metadata() or {}).get(ORIGIN)
        except SafetensorError as error:
            raise RuntimeError(f"inception: cannot read {str(source)!r} as safetensors: {error}") from error
    if not allow_pickle:
        what = "no file was given, and the published weights are" if source is None else f"{Path(source).name!r} is"
        raise RuntimeError(f"inception: {what} a pickle, which can run code when loaded; give a .safetensors file "
                           "(sage.evaluation.convert_inception makes one of the published file), or pass allow_pickle=True")
    source = _downloaded() if source is None else Path(source)
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's, zipfile's and its own errors here
        raise RuntimeError(f"inception: cannot read {source.name!r} as weights: {error}") from error
    return weights, hashlib.sha256(source.read_bytes()).hexdigest()


def _downloaded() -> Path:
    """The published file in torch.hub's folder, brought there if need be."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=PUBLISHED, progress=False)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"inception: cannot download {URL} ({error}); bring the file here and give its name") from error
    return path


def load_inception(source: str | Path | None, allow_pickle: bool = False) -> tuple[InceptionV3, bool]:
    """The network, ready, and whether its weights are known to be the published ones.

    Raises:
        FileNotFoundError, RuntimeError: as `read_weights`. ValueError: weights of another network.
    """
    weights, origin = read_weights(source, allow_pickle)
    model = InceptionV3()
    wanted = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    wrong = [key for key, value in wanted.items() if key not in weights or weights[key].shape != value.shape]
    if wrong:
        raise ValueError(f"inception: {len(wrong)} of {len(wanted)} tensors are missing or of another shape, the first is "
                         f"{wrong[0]!r}; give FID's Inception-v3 (torch-fidelity's or pytorch-fid's), not torchvision's")
    model.load_state_dict({key: weights[key] for key in wanted}, strict=False)
    return model.eval().requires_grad_(False), origin is not None and origin.startswith(PUBLISHED)


def convert_inception(source: str | Path | None, target: str | Path, *, allow_pickle: bool = False) -> None:
    """Write the weights as safetensors, with the sha256 of the original beside them; later runs need no pickle.

    Args:
        source: the published .pth; None: downloaded.
        target: the .safetensors file to write.
        allow_pickle: consent to unpickle the source once.

    Raises:
        FileNotFoundError, RuntimeError: as `read_weights`. ValueError: target has another suffix.
    """
    if Path(target).suffix != ".safetensors":
        raise ValueError(f"convert_inception: target must end in .safetensors, got {str(target)!r}")
    from safetensors.torch import save_file

    weights, origin = read_weights(source, allow_pickle)
    save_file({key: value.contiguous() for key, value in weights.items()}, target, metadata={ORIGIN: origin} if origin else None)
