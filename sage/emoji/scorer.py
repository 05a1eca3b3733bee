"""The judge: an image tower trained contrastively against the text encoder's sentence embeddings.

It says how well a picture fits a caption (a cosine, read like a CLIP score) and gives features for distances between
sets of pictures. It shares neither weights nor seed with the generator, but both have seen scenes of the same emoji.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from .checkpoint import Run
from .recipe import ScorerRecipe

MAX_LOG_TEMPERATURE = 4.0


class _Block(nn.Module):
    """Two 3 x 3 convolutions before each a norm, beside a 1 x 1 shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(x))
        return self.shortcut(x) + self.conv2(F.relu(self.norm2(self.conv1(x))))


class ImageTower(nn.Module):
    """Pictures and captions to points in one space.

    The captions' embeddings come from the text encoder; one linear map of them is learned with the tower, since what tells two
    captions of a group apart is little of what the encoder keeps.

    Args: width (int): channels after the stem; features are 8 * width wide.  dim (int): width of the embeddings.
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.blocks = nn.Sequential(_Block(width, 2 * width, 1), _Block(2 * width, 4 * width, 2),
                                    _Block(4 * width, 4 * width, 1), _Block(4 * width, 8 * width, 2))
        self.norm = nn.BatchNorm2d(8 * width)
        self.project = nn.Linear(8 * width, dim)
        self.project_text = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.project_text.weight)
        self.log_temperature = nn.Parameter(torch.tensor(2.6))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """[N, 3, 32, 32] in [-1, 1] to [N, 8 * width], non-negative; for Fréchet and kernel distances."""
        return F.relu(self.norm(self.blocks(self.stem(pictures)))).mean((2, 3))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """[N, 3, 32, 32] in [-1, 1] to [N, dim] of norm 1."""
        return F.normalize(self.project(self.features(pictures)), dim=1)

    def texts(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[N, dim], the text encoder's sentence embeddings, to [N, dim] of norm 1."""
        return F.normalize(self.project_text(embeddings), dim=1)


class Scorer:
    """The tower and the text encoder together, ready to judge.

    Example:
        scorer = sage.emoji.load_scorer()
        cosines = scorer.embed_images(images) @ scorer.embed_texts(prompts).T
    """

    def __init__(self, tower: ImageTower, text_encoder, tokenizer):
        self.tower, self.text_encoder, self.tokenizer = tower.eval(), text_encoder.eval(), tokenizer

    @staticmethod
    def to_tensor(images) -> torch.Tensor:
        """PIL images, or a uint8 tensor [N, 3, H, W], or a float one in [-1, 1]: to [N, 3, 32, 32] in [-1, 1]."""
        if not torch.is_tensor(images):
            import numpy as np

            images = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"scorer: images must be [N, 3, H, W], got {tuple(images.shape)}; stack RGB pictures")
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        if images.shape[2:] != (32, 32):
            images = F.interpolate(images.float(), (32, 32), mode="bicubic", antialias=True, align_corners=False)
        return images.float().clamp(-1, 1)

    @torch.no_grad()
    def embed_images(self, images, batch: int = 256) -> torch.Tensor:
        """[N, 256] float32 of norm 1."""
        return torch.cat([self.tower(part) for part in self.to_tensor(images).split(batch)])

    @torch.no_grad()
    def image_features(self, images, batch: int = 256) -> torch.Tensor:
        """[N, 224] float32, for distances between sets of pictures."""
        return torch.cat([self.tower.features(part) for part in self.to_tensor(images).split(batch)])

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """[N, 256] float32 of norm 1, beside pictures; not the sentence embeddings that prompts are grouped by."""
        from .text_encoder import embed

        return self.tower.texts(embed(self.text_encoder, self.tokenizer, texts))


def augment(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, blur, tint and noise: what a generator's pictures may differ in without being wrong."""
    n, _, h, w = pictures.shape
    uniform = lambda *shape: torch.rand(*shape, generator=generator)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    dy, dx = torch.randint(0, 5, (2, n), generator=generator)
    rows, columns = (d[:, None] + torch.arange(side) for d, side in ((dy, h), (dx, w)))
    padded = F.pad(pictures, (2,) * 4, mode="replicate")
    x = padded[torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    blurred = F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, uniform(n, 1, 1, 1) * (uniform(n, 1, 1, 1) < 0.4))
    x = (x + 0.05 * normal(n, 1, 1, 1) + 0.04 * normal(n, 3, 1, 1)) * (1 + 0.1 * normal(n, 1, 1, 1))
    x = x + 0.15 * uniform(n, 1, 1, 1) * (uniform(n, 1, 1, 1) < 0.5) * normal(*x.shape)
    return x.clamp(-1.2, 1.2)


def train_scorer(draw: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]], dim: int, recipe: ScorerRecipe, path: Path,
                 save_every: int = 50) -> ImageTower:
    """Trains from scratch, or from the checkpoint at `path`.

    Args:
        draw: (count, generator) to (pictures [count, 3, 32, 32] float32 in [-1, 1], rows of no two equal captions; embeddings
            [count, dim] float32 of norm 1, their captions').
    """
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    tower = ImageTower(recipe.width, dim).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(tower.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    run = Run(path, "scorer", recipe, {"tower": tower}, optimizer, generator, save_every)
    target = torch.arange(recipe.batch)
    for step in run:
        run.set_lr(recipe.lr * min(1.0, (step + 1) / recipe.warmup) * max(0.01, 1 - step / recipe.steps))
        pictures, embeddings = draw(recipe.batch, generator)
        seen = augment(pictures, generator).contiguous(memory_format=torch.channels_last)
        logits = tower(seen) @ tower.texts(embeddings).T * tower.log_temperature.clamp(max=MAX_LOG_TEMPERATURE).exp()
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss, right=(logits.argmax(1) == target).float().mean())
    return tower.eval()


def save_scorer(tower: ImageTower, folder: Path) -> None:
    """Writes config.json and float16 weights; BatchNorm's statistics stay float32, their range is not ours to bound."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"width": tower.stem.out_channels, "dim": tower.project.out_features}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
    tensors = {key: (value.half() if value.is_floating_point() and "running" not in key else value).contiguous()
               for key, value in tower.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def load_tower(folder: Path) -> ImageTower:
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    tower = ImageTower(**config)
    tower.load_state_dict(load_file(folder / "model.safetensors"))
    return tower.eval()
