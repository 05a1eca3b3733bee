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
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf8"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")), encoding="utf8")  # a third less
    vocabulary = tokenizer["model"]["vocab"]
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

A miniature text-to-image model in the layout of `StableDiffusionPipeline`: 32 px scenes of one to three emoji. It is there so that
the package shows pictures and runs its tests without downloading anything, and so that what sharing costs can be measured by
anybody in minutes. It is not a general image model. It knows {trained_names} emoji (`captions.txt` of `sage/emoji`, without those of
`held_out.txt`), eight colours of ground, one to three objects, "left of" and "above".

    import sage.emoji

    pipe = sage.emoji.load_pipeline()
    pipe("a fox on a blue background", num_inference_steps=20, guidance_scale=2.5).images[0]    # place and size are open
    pipe("fox", num_inference_steps=20, guidance_scale=2.5).images[0]                           # a name alone: centred, on white

![Real pictures above, drawn ones below](contact_sheet.png)

Captions of the benchmark at random; in each pair of rows real pictures are above and the model's below ({steps} steps of DDIM, guidance
{guidance}). They show the same captions, not the same pictures: where things lie is not in the caption.

## Is it good enough to measure on?

| gate, on independent pictures of trained groups | wanted | found | |
|---|---|---|---|
{gate}

{verdict}

## What is in the folder

| part | what | parameters | trained for |
|---|---|---|---|
{parts}

{megabytes} MB in all, float16 safetensors (BatchNorm statistics in float32); pipelines load in float32 by default.
Latents are 8 x 8 x 16: a fixed linear code of 4 x 4 patches (`codec.safetensors`), which the AutoencoderKL was taught to read and write.
The scheduler is DDIM with v-prediction on Stable Diffusion's scaled-linear schedule, trailing timesteps. `sprites.webp` holds the
{names} emoji that scenes are composed of: `sage.emoji.real_pictures` draws as many real pictures of any scene as are wanted.

## Data and licences

- Pictures: Noto Color Emoji (artwork Apache-2.0, font OFL-1.1), composed into scenes at random place, size and ground, anew
  each time one is trained on. {held_out_names} of the {names} emoji, whole groups of alike names, were never shown to the denoiser.
- Captions: names from Unicode's `emoji-test.txt` (Unicode licence) in our own grammar (`sage/emoji/scenes.py`).
- Text for the encoder's distillation: names of emoji, definitions, examples and nouns of WordNet 3.0 (WordNet licence),
  and prompts composed from our own word lists.
- The encoder's teacher: all-MiniLM-L6-v2 (Apache-2.0), whose projected weights the student also started from.

## Measured

By `python -m sage.emoji.build --stage evaluate` on {machine}; every figure is in `metrics.json`. Brackets hold
95 % intervals, from resampling groups.

| what | drawn | real pictures |
|---|---|---|
{compared}

| what | figure |
|---|---|
{figures}

Identification asks whether a picture lies nearer to its own caption than to the other captions of its group (cosine of the captions >= 0.6,
at most 8 of them), by the scorer. Score is 100 times the cosine of picture and caption there. Diversity is the mean distance between
pictures of one group, in the scorer's features; layout the same between thumbnails of 8 x 8 px. Generator and scorer have different seeds and no
common weights, **but both saw scenes of the same emoji**.

## Made by

    python -m sage.emoji.build

Seeds: {seeds}. Needs the font, `emoji-test.txt`, WordNet and the teacher; `--help` says where they
come from. The trainings took {minutes} minutes of wall time together on two cores shared with other work; the text encoder is that of an
earlier build by the same recipe. A build from scratch repeats the recipe, not the bits.
"""


def write_card(folder: Path, metrics: dict) -> None:
    """Writes metrics.json and, from nothing but it, README.md."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n", encoding="utf8")
    (folder / "README.md").write_text(card(metrics), encoding="utf8")


def card(metrics: dict) -> str:
    """The model card: a function of metrics.json alone."""
    training, sizes, trained = metrics["training"], metrics["parameters"], metrics["benchmark"]["trained"]
    what = {"unet": "UNet2DConditionModel, cross-attention at 4 x 4", "vae": "AutoencoderKL, factor 4, 16 channels",
            "text_encoder": "BertModel, distilled", "scorer": "image tower, judges pictures (not part of the pipeline)"}
    stage = {"text_encoder": "text"}
    parts = [f"| `{name}/` | {text} | {sizes[name]:,} | {training[stage.get(name, name)]['steps']:,} steps |"
             for name, text in what.items()]
    return CARD.format(
        gate=_gate_rows(metrics), verdict=_verdict(metrics["gate"]), parts="\n".join(parts), compared="\n".join(_compared(metrics)),
        figures="\n".join(f"| {name} | {value} |" for name, value in _single_figures(metrics)), names=metrics["names"],
        held_out_names=metrics["held_out_names"], trained_names=metrics["names"] - metrics["held_out_names"],
        megabytes=f"{metrics['bytes'] / 1e6:.1f}", machine=metrics["machine"], steps=trained["steps"], guidance=trained["guidance"],
        seeds=", ".join(f"{name} {run['recipe']['seed']}" for name, run in sorted(training.items())),
        minutes=round(sum(run["seconds"] for run in training.values()) / 60))


def _gate_rows(metrics: dict) -> str:
    words = {"identification": "identification within groups", "diversity_ratio": "diversity within groups, over that of real pictures",
             "blind": "pictures whose objects somebody who had not seen the captions named"}
    blind, rows = metrics["blind"], []
    for name, word in words.items():
        row = metrics["gate"][name]
        found = "not asked" if row["found"] is None else f"{row['found']:.3f}"
        if name == "blind" and blind:
            found = f"{blind['right']} of {blind['of']} ({blind['judge']})"
        wanted = f"{row['wanted'] * 32:.0f} of 32" if name == "blind" else f"{row['wanted']:g}"
        rows.append(f"| {word} | {wanted} | {found} | {'met' if row['met'] else '**missed**'} |")
    return "\n".join(rows)


def _verdict(gate: dict) -> str:
    if all(row["met"] for row in gate.values()):
        return "The gate is met."
    return "**The gate is not met: what is measured on this model says how methods compare, and is no claim about quality.**"


def _compared(metrics: dict) -> list[str]:
    words = {"identification": "identification", "score": "score", "diversity": "diversity", "layout": "layout"}
    rows = []
    for split, told in (("trained", "trained emoji"), ("held_out", "emoji never trained on")):
        found = metrics["benchmark"][split]
        for name, word in words.items():
            drawn, real = (f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in (found["drawn"][name], found["real"][name]))
            chance = f", chance {found['drawn']['chance']:.3f}" if name == "identification" else ""
            asked = f"{found['prompts']} captions, {found['images_per_prompt']} pictures each{chance}"
            rows.append(f"| {word}, {told} ({asked}) | {drawn} | {real} |")
    return rows


def _single_figures(metrics: dict) -> list[tuple[str, str]]:
    codec, text, stills = metrics["codec"], metrics["text"], metrics["stills"]
    copied = [f"{metrics['benchmark'][split]['copies']:.3f}" for split in ("trained", "held_out")]
    figures = [
        ("pictures nearest to a real picture of other emoji, trained / never trained on", " / ".join(copied)),
        (f"names alone: drawn pictures whose nearest real one, of {stills['names']}, is their own", f"{stills['nearest_is_own']:.3f}"),
        ("decoder, from the exact latents", f"{codec['decoder_psnr_db']:.1f} dB"),
        ("encoder and decoder together", f"{codec['roundtrip_psnr_db']:.1f} dB"),
        ("linear patch code, for comparison", f"{codec['linear_psnr_db']:.1f} dB"),
    ]
    if text:
        figures += [
            (f"text encoder: Spearman with the teacher's pair similarities, {text['source']} ({text['prompts']} prompts)",
             f"{text['spearman']:.3f}"),
            ("text encoder: pairs at cosine >= 0.6, F1 against the teacher's", f"{text['pair_f1']:.3f}"),
            ("text encoder: grouped prompts with exactly the teacher's group", f"{text['same_group']:.3f}"),
        ]
    return figures
