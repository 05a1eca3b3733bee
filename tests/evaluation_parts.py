"""Stand-ins for tests of `sage evaluate`: prompts embedded by their letters, pictures judged by fixed random projections."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image

from sage.cli import cli
from sage.embed import Embeddings
from sage.evaluation.pictures import as_uint8

PROMPTS = ["a red cat", "a red car", "a red cup", "an old house", "an old horse", "two green apples", "two green pears", "zebra"]
GROUPS = [(0, 1, 2), (3, 4), (5, 6)]  # by the first three letters; the last one is alone


def embed_by_letters(prompts, encoder="auto", pipe=None, **options):
    """Equal first three letters: alike; others: not."""
    vectors = np.zeros((len(prompts), 64), dtype=np.float32)
    for row, prompt in enumerate(prompts):
        vectors[row, sum(map(ord, prompt[:3])) % 64] = 0.9
        vectors[row, int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 20] += 0.3
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embeddings(vectors, "first letters", np.zeros(len(prompts), dtype=bool))


class Projections:
    """An extractor of 8 features, without any network."""

    name, dim, identity = "projections", 8, "seed 0"

    def image_features(self, images, batch=64):
        small = [torch.nn.functional.interpolate(x[None].float() / 255, (8, 8), mode="area").flatten() for x in as_uint8(images, "images")]
        return torch.stack(small) @ torch.randn(192, self.dim, generator=torch.Generator().manual_seed(0))


class Judging(Projections):
    """One that knows texts too."""

    def embed_features(self, features):
        return torch.nn.functional.normalize(features, dim=1)

    def embed_texts(self, texts):
        seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
        drawn = torch.stack([torch.randn(self.dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return torch.nn.functional.normalize(drawn, dim=1)


def load_extractor(spec, *, device="cpu", **options):
    if spec == "clip:blind":
        return Projections()
    if spec != "clip:tiny":
        raise ValueError(f"load_extractor: unknown extractor {spec!r}; known are clip:tiny")
    return Judging()


def patch(monkeypatch) -> None:
    monkeypatch.setattr("sage.embed.embed_prompts", embed_by_letters)
    monkeypatch.setattr("sage.evaluation.features.load_extractor", load_extractor)


def sage(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def real_pictures(folder: Path, count: int) -> list[str]:
    """Names of some small pictures, written into a folder."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def pictures(folder: Path) -> dict[str, bytes]:
    """All PNG files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def lora(pipe, folder: Path, seed: int = 0) -> Path:
    """A LoRA of a pipeline's U-Net, large enough to be seen; the pipeline is left without it."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    type(pipe).save_lora_weights(folder, unet_lora_layers=layers, safe_serialization=True)
    pipe.unload_lora_weights()
    return folder / "pytorch_lora_weights.safetensors"
