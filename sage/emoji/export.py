"""Assembles what ships: a plain StableDiffusionPipeline folder, the scorer beside it, and the model card."""

import json
import shutil
from pathlib import Path

import torch

from .recipe import UnetRecipe
from .text_encoder import PROMPT_LENGTH, SENTENCE_LENGTH

SIZE_LIMIT = 25_000_000  # [bytes]


def export(folder: Path, *, unet, vae, text_encoder, tokenizer, tower, unet_recipe: UnetRecipe) -> None:
    """Writes the pipeline in float16 safetensors, replacing what earlier builds left in `folder`.

    Raises: RuntimeError when the folder comes out larger than 25 MB.
    """
    from diffusers import StableDiffusionPipeline

    from .scorer import save_scorer
    from .train import build_scheduler

    folder.mkdir(parents=True, exist_ok=True)
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "scorer"):
        shutil.rmtree(folder / part, ignore_errors=True)
    tokenizer.model_max_length = PROMPT_LENGTH
    for module in (unet, vae, text_encoder):
        torch.nn.Module.to(module, torch.float16)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(unet_recipe),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder, safe_serialization=True)
    _vocabulary_file(folder / "tokenizer")
    _load_as_float32(folder / "text_encoder" / "config.json")
    _sentence_tokenizer(folder)
    save_scorer(tower, folder / "scorer")
    for config in folder.glob("*/config.json"):
        _forget_origin(config)
    size = folder_bytes(folder)
    if size > SIZE_LIMIT:
        raise RuntimeError(f"export: wanted at most {SIZE_LIMIT} bytes in {folder}, got {size}; shrink a recipe")


def _load_as_float32(config: Path) -> None:
    """Transformers opens a model in the dtype its config names; half precision on the CPU is slow and coarse."""
    values = json.loads(config.read_text(encoding="utf8"))
    values.pop("torch_dtype", None)
    config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf8")


def _vocabulary_file(folder: Path) -> None:
    """Transformers before 5 reads a BertTokenizer from a plain list of pieces."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf8"))["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n", encoding="utf8")


def _sentence_tokenizer(folder: Path) -> None:
    """The text encoder's folder gets a tokenizer of its own, which reads longer texts than the denoiser attends to."""
    for file in (folder / "tokenizer").iterdir():
        shutil.copy(file, folder / "text_encoder" / file.name)
    path = folder / "text_encoder" / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf8"))
    path.write_text(json.dumps(values | {"model_max_length": SENTENCE_LENGTH}, indent=2) + "\n", encoding="utf8")


def _forget_origin(config: Path) -> None:
    """Drops the path of the building machine."""
    values = json.loads(config.read_text(encoding="utf8"))
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf8")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
---
# Embedded emoji model

A miniature text-to-image model in the layout of `StableDiffusionPipeline`: 32 px pictures of single emoji on white,
drawn from their names. It is there so that the package shows pictures and runs its tests without downloading anything.
It is not a general image model. It draws the {focus} names in `captions.txt` of `sage/emoji`; of the other emoji names it
has only seen the first part of the training, and gives their colours and outline at best. One object per picture.

    pipe = sage.emoji.load_pipeline()
    pipe("grinning cat", num_inference_steps=20, guidance_scale=2.5).images[0]

![Real pictures above, drawn ones below](contact_sheet.png)

Random captions; in each pair of rows the real pictures are above and the model's below ({steps} DDIM steps, guidance
{guidance}).

## What is in the folder

| part | what | parameters | trained for |
|---|---|---|---|
{parts}

{megabytes} MB in all, float16 safetensors (BatchNorm statistics in float32); pipelines load in float32 by default.
Latents are 8 x 8 x 16: a fixed linear code of 4 x 4 patches, which the AutoencoderKL was taught to read and write.
The scheduler is DDIM with v-prediction on Stable Diffusion's scaled-linear schedule, trailing timesteps.

## Data and licences

- Pictures: Noto Color Emoji (artwork Apache-2.0, font OFL-1.1), {pictures} distinct emoji; the denoiser and the scorer saw
  the {captions} without skin-tone variants, the autoencoder all of them.
- Captions: names from Unicode's `emoji-test.txt` (Unicode licence).
- Text for the encoder's distillation: those names, definitions, examples and nouns of WordNet 3.0 (WordNet licence),
  and prompts composed from our own word lists.
- The encoder's teacher: all-MiniLM-L6-v2 (Apache-2.0), whose projected weights the student also started from.

## Measured

By `python -m sage.emoji.build --stage evaluate` on {machine}; every figure is in `metrics.json`.

| what | figure |
|---|---|
{figures}

Identification asks whether a picture lies nearer to its own caption than to the other captions of its group (groups of captions
with pairwise cosine >= 0.6, at most 8), by the scorer. Generator and scorer have different seeds and no common weights,
**but both saw the same pictures**, so these figures speak of recall, not of generalisation.

## Made by

    python -m sage.emoji.build

Seeds: {seeds}. Needs the font, `emoji-test.txt`, WordNet and the teacher; `--help` says where they
come from. The trainings took {minutes} minutes of wall time together on a machine shared with other work. They were
interrupted and taken up again, with their numbers of steps and learning rates settled on the way; the recipe in the source
states what was run. A build from scratch repeats the recipe, not the bits.
"""


def write_card(folder: Path, metrics: dict) -> None:
    """Writes metrics.json and, from nothing but it, README.md."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n", encoding="utf8")
    (folder / "README.md").write_text(card(metrics), encoding="utf8")


def card(metrics: dict) -> str:
    """The model card: a function of metrics.json alone."""
    training, sizes = metrics["training"], metrics["parameters"]
    what = {"unet": "UNet2DConditionModel, two cross-attention levels", "vae": "AutoencoderKL, factor 4, 16 channels",
            "text_encoder": "BertModel, distilled", "scorer": "image tower, judges pictures (not part of the pipeline)"}
    stage = {"text_encoder": "text"}
    parts = [f"| `{name}/` | {text} | {sizes[name]:,} | {training[stage.get(name, name)]['steps']:,} steps |"
             for name, text in what.items()]
    codec, drawn, everything, text = metrics["codec"], metrics["generator"], metrics["all_captions"], metrics["text"]
    figures = [
        ("decoder, from the exact latents", f"{codec['decoder_psnr_db']:.1f} dB"),
        ("encoder and decoder together", f"{codec['roundtrip_psnr_db']:.1f} dB"),
        ("linear patch code, for comparison", f"{codec['linear_psnr_db']:.1f} dB"),
        (f"identification of drawn pictures ({drawn['prompts']} captions in {drawn['groups']} groups; "
         f"chance {drawn['chance']:.3f})",
         f"{drawn['identification_drawn']:.3f}"),
        ("identification of the real pictures of those captions", f"{drawn['identification_real']:.3f}"),
        ("cosine of picture and caption, drawn / real", f"{drawn['cosine_drawn']:.3f} / {drawn['cosine_real']:.3f}"),
        (f"drawn pictures whose nearest real one, of {metrics['captions']:,}, is that of their caption",
         f"{drawn['nearest_is_own']:.3f}"),
        (f"for captions from all {metrics['captions']:,}: identification (chance {everything['chance']:.3f}), nearest",
         f"{everything['identification_drawn']:.3f}, {everything['nearest_is_own']:.3f}"),
    ]
    if text:
        figures += [
            (f"text encoder: Spearman with the teacher's pair similarities, {text['source']} ({text['prompts']} prompts)",
             f"{text['spearman']:.3f}"),
            ("text encoder: pairs at cosine >= 0.6, F1 against the teacher's", f"{text['pair_f1']:.3f}"),
            ("text encoder: grouped prompts with exactly the teacher's group", f"{text['same_group']:.3f}"),
        ]
    return CARD.format(
        parts="\n".join(parts), figures="\n".join(f"| {name} | {value} |" for name, value in figures),
        megabytes=f"{metrics['bytes'] / 1e6:.1f}", machine=metrics["machine"], pictures=f"{metrics['pictures']:,}",
        captions=f"{metrics['captions']:,}", focus=drawn["captions"], steps=drawn["steps"], guidance=drawn["guidance"],
        seeds=", ".join(f"{name} {run['recipe']['seed']}" for name, run in sorted(training.items())),
        minutes=round(sum(run["seconds"] for run in training.values()) / 60))
