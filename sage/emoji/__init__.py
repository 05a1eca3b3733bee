"""The embedded default: a miniature Stable Diffusion that draws 32 px scenes of emoji, its text encoder, its scorer and its prompts.

    import sage.emoji

    pipe = sage.emoji.load_pipeline()
    image = pipe("a fox on a blue background", num_inference_steps=20, guidance_scale=2.5).images[0]
    scenes = sage.emoji.benchmark()                    # what quality is measured on
    real = sage.emoji.real_pictures(scenes, seed=1)    # uint8 [N, 3, 32, 32]

The weights ship with the package; `python -m sage.emoji.build` makes them from the font and the names. Importing this
module loads neither diffusers nor transformers.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from .scenes import Composer
    from .scorer import Scorer

GUIDANCE_SCALE = 2.5  # what the published samples were drawn with
NUM_INFERENCE_STEPS = 20

_WEIGHTS = Path(__file__).parent / "weights"


def _folder(path: Path, probe: str) -> Path:
    if not (path / probe).is_file():
        raise RuntimeError(f"sage.emoji: wanted {probe} in {path}, found none; the weights ship with the package: reinstall "
                           "it, or build them with: python -m sage.emoji.build")
    return path


def model_path() -> Path:
    """The folder to give to `StableDiffusionPipeline.from_pretrained`."""
    return _folder(_WEIGHTS, "model_index.json")


def text_encoder_path() -> Path:
    """The folder to give to transformers' `AutoModel` and `AutoTokenizer` (which here reads up to 64 tokens).

    A sentence embedding is the attention-masked mean of the last hidden states, divided by its norm.
    """
    return _folder(_WEIGHTS / "text_encoder", "tokenizer.json")


def scorer_path() -> Path:
    """The folder of the image tower."""
    return _folder(_WEIGHTS / "scorer", "model.safetensors")


def load_pipeline(torch_dtype: "torch.dtype | None" = None) -> "StableDiffusionPipeline":
    """The pipeline, on the CPU, from the shipped folder alone.

    Args: torch_dtype (torch.dtype | None): float32 where none is given (the file holds float16).
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn that a BertModel is no CLIPTextModel, which is meant
    try:
        pipe = StableDiffusionPipeline.from_pretrained(model_path(), local_files_only=True, use_safetensors=True)
    finally:
        logging.set_verbosity(level)
    return pipe if torch_dtype is None else pipe.to(torch_dtype)


def load_scorer() -> "Scorer":
    """The scorer with its text encoder, in float32 on the CPU."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from .scorer import Scorer, load_tower

    folder = text_encoder_path()
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    return Scorer(load_tower(scorer_path()), encoder, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def load_composer() -> "Composer":
    """What draws real pictures of scenes, from the shipped sprites."""
    from .benchmark_scenes import load_sprites
    from .scenes import Composer, names

    every = names()
    return Composer(every, load_sprites(_folder(_WEIGHTS, "sprites.webp") / "sprites.webp", len(every)))


def benchmark(held_out: bool = False) -> "list":
    """The scenes that quality is measured on, see `sage.emoji.benchmark_scenes.benchmark`; their captions are the prompts."""
    from .benchmark_scenes import benchmark as read

    return read(held_out)


def real_pictures(scenes, images_per_prompt: int = 1, seed: int = 0) -> "torch.Tensor":
    """Real pictures of scenes, see `sage.emoji.benchmark_scenes.real_pictures`."""
    from .benchmark_scenes import real_pictures as compose

    return compose(scenes, images_per_prompt, seed)
