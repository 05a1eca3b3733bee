"""What the tests of training have in common: a tiny training set, a family that is a formula, and a tiny training."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sage.training.options import TrainOptions
from sage.training.sampler import GroupBatch

CAPTIONS = ["a red cat", "a blue cat", "a green cat", "a red car", "a blue car", "an old house", "the sea"]
GROUPS = [((0,), (1,), (2,)), ((3,), (4,)), ((5,),), ((6,),)]  # of the pictures of `write_pictures`


def write_pictures(folder: Path, captions=CAPTIONS) -> Path:
    """A folder of random pictures of different sizes, with metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, caption in enumerate(captions):
        pixels = np.random.default_rng(number).integers(0, 256, (17 + number, 24 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def options_for(out: Path, data: Path, **options) -> TrainOptions:
    """A training of a few steps on 16-pixel pictures; checked."""
    usual = {"pretrained_model_name_or_path": "tiny", "resolution": 16, "max_train_steps": 4, "train_batch_size": 4,
             "num_inference_steps": 4, "learning_rate": 1e-2}  # fmt: skip
    made = TrainOptions(str(out), train_data_dir=str(data), **{**usual, **options})
    made.check()
    return made


def read_log(out: Path) -> list[dict]:
    """The lines of log.jsonl without their times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def batch_of(groups, epoch=0, filler=False, images=None) -> GroupBatch:
    """A batch whose rows are in these groups, by number."""
    images = len(groups) if images is None else images
    return GroupBatch(tuple(range(len(groups))), tuple(groups), images, filler, epoch, 0)


class ToyFamily:
    """Predicts scale · z + the condition's first number + t / 1000: everything that a step hands on shows in it.

    Attributes:
        calls: (z, timesteps, conditions) of every prediction.
    """

    def __init__(self, prediction_type="epsilon"):
        self.prediction_type, self.calls = prediction_type, []
        self.scale = torch.tensor(0.7, requires_grad=True)

    def mean_conditions(self, conditions, segments):
        return {name: segments.reduce(segments.gather(value).double(), "sum").float() / segments.counts[:, None]
                for name, value in conditions.items()}  # fmt: skip

    def predict(self, latents, timesteps, conditions, denoiser=None):
        self.calls.append((latents, timesteps, conditions))
        offset = conditions["text"][:, 0] + timesteps / 1000
        return self.scale * latents + offset.view(-1, *[1] * (latents.ndim - 1))
