"""Judges an exported folder: what the autoencoder loses, what the model draws, how near the encoder is to its teacher."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sage import info
from sage.embed import embed_prompts
from sage.evaluation.bootstrap import interval
from sage.evaluation.diversity import copies, pairwise_distance
from sage.evaluation.matching import clip_scores, identification
from sage.grouping import group

from . import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from .codec import PatchCodec, psnr
from .scenes import Composer, Scene
from .scorer import Scorer

TAU = 0.6  # cosine from which two captions may share a group
GATE = {"identification": 0.7, "diversity_ratio": 0.9, "blind": 24 / 32}
THUMBNAIL = 8  # side of the thumbnails that layouts are compared on [px]


@torch.no_grad()
def evaluate_codec(vae, codec: PatchCodec, pictures: torch.Tensor) -> dict:
    """Fidelity of the autoencoder and of the linear code it was fitted to, on [N, 3, 32, 32] in [-1, 1]."""
    decoded, both = [], []
    for x in pictures.split(128):
        decoded.append(vae.decode(codec.encode(x)).sample.clamp(-1, 1))
        both.append(vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1))
    return {"decoder_psnr_db": round(psnr(torch.cat(decoded), pictures), 2),
            "roundtrip_psnr_db": round(psnr(torch.cat(both), pictures), 2),
            "linear_psnr_db": round(psnr(codec.decode(codec.encode(pictures)), pictures), 2)}


def draw(pipe, captions: Sequence[str], images_per_prompt: int, seed: int) -> torch.Tensor:
    """uint8 [N · images_per_prompt, 3, 32, 32]: what `sage.generate` draws when nothing is shared, at the default steps."""
    from sage.generation import generate

    result = generate(pipe, list(captions), share=0, images_per_prompt=images_per_prompt, seed=seed, max_rows=128,
                      num_inference_steps=NUM_INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE)
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in result.images])


def picture_groups(captions: Sequence[str], images_per_prompt: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of pictures whose captions share a group: all of them, which are resampled together; and group after group one picture of
    each caption, those that would share a trunk."""
    groups = [g for g in group(embed_prompts(list(captions)).vectors, list(captions), TAU) if len(g) > 1]
    clusters = [[i * images_per_prompt + k for i in g for k in range(images_per_prompt)] for g in groups]
    return clusters, [[i * images_per_prompt + k for i in g] for g in groups for k in range(images_per_prompt)]


def thumbnails(pictures: torch.Tensor) -> torch.Tensor:
    """[N, 192] in [0, 1]: what is left of pictures at 8 x 8 px, their layout and colours."""
    return F.adaptive_avg_pool2d(pictures.float() / 255, THUMBNAIL).flatten(1)


def evaluate_scenes(pipe, scorer: Scorer, scenes: Sequence[Scene], composer: Composer, images_per_prompt: int,
                    seed: int = 0) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Draws scenes independently and judges them beside real pictures of the same captions.

    Returns: {"drawn": figures, "real": figures, "diversity_ratio", "layout_ratio", "copies", and what was asked for}, and the drawn and
        the real pictures. `copies` is the share of drawn ones whose nearest real picture, of eight a caption, shows other emoji than
        the caption names.
    """
    captions = [scene.caption for scene in scenes]
    repeated = [scene for scene in scenes for _ in range(images_per_prompt)]
    groups = picture_groups(captions, images_per_prompt)
    named = [scene.caption for scene in repeated]
    texts = scorer.embed_texts(named)
    compose = lambda number, some: ((composer(some, torch.Generator().manual_seed(number)) + 1) * 127.5).round().to(torch.uint8)
    pictures = {"drawn": draw(pipe, captions, images_per_prompt, seed), "real": compose(seed + 1, repeated)}
    found = {name: _figures(scorer, some, texts, named, groups) for name, some in pictures.items()}
    shown = [scene for scene in scenes for _ in range(8)]
    near = copies(scorer.image_features(pictures["drawn"]), scorer.image_features(compose(seed + 2, shown)),
                  [_content(scene) for scene in shown], [_content(scene) for scene in repeated])
    ratio = lambda name: round(found["drawn"][name]["value"] / found["real"][name]["value"], 4)
    figures = found | {"prompts": len(scenes), "images_per_prompt": images_per_prompt, "seed": seed, "steps": NUM_INFERENCE_STEPS,
                       "guidance": GUIDANCE_SCALE, "diversity_ratio": ratio("diversity"), "layout_ratio": ratio("layout"),
                       "copies": round(near.share, 4)}
    return figures, pictures["drawn"], pictures["real"]


def _content(scene: Scene) -> str:
    """Which emoji a scene shows, however many of each: what "two mushrooms" shows is no other emoji than what "a mushroom" does."""
    return ", ".join(sorted(set(scene.names)))


def _figures(scorer: Scorer, pictures: torch.Tensor, texts: torch.Tensor, captions: list[str],
             groups: tuple[list[list[int]], list[list[int]]]) -> dict:
    """Figures of [N, 3, H, W] and their captions, resampled by whole groups; `groups` as `picture_groups` gives them."""
    clusters, sets = groups
    images, per_group = scorer.embed_images(pictures), len(sets) // len(clusters)
    named = identification(images, texts, clusters, captions)
    diversity, layout = (pairwise_distance(x, sets) for x in (scorer.image_features(pictures), thumbnails(pictures)))
    estimates = {"identification": interval(named.right, named.groups), "score": interval(clip_scores(images, texts), clusters),
                 "diversity": interval(diversity.values, diversity.joined(per_group)),
                 "layout": interval(layout.values, layout.joined(per_group))}
    rounded = {name: {k: round(v, 4) if isinstance(v, float) else v for k, v in x.as_json().items()} for name, x in estimates.items()}
    return rounded | {"chance": round(named.chance, 4)}


def evaluate_stills(pipe, composer: Composer, names: Sequence[str], seed: int = 0) -> dict:
    """Names alone: the share of drawn pictures whose nearest real still, by pixels, is that of their name."""
    drawn = draw(pipe, names, 1, seed).float().flatten(1)
    real = ((composer([Scene((name,), still=True) for name in names], torch.Generator()) + 1) * 127.5).flatten(1)
    own = torch.cdist(drawn, real).argmin(1) == torch.arange(len(names))
    return {"names": len(names), "nearest_is_own": round(float(own.double().mean()), 4)}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two flat arrays; ties, which cosines hardly have, are ranked in order."""
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable").astype(np.float64) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def evaluate_text(ours: torch.Tensor, teachers: torch.Tensor, source: str) -> dict:
    """Agreement of two sets of sentence embeddings, each [N, C] of norm 1, on which prompts are alike."""
    mine, theirs = (ours @ ours.T).double().numpy(), (teachers @ teachers.T).double().numpy()
    upper = np.triu_indices(len(mine), 1)
    near, wanted = mine[upper] >= TAU, theirs[upper] >= TAU
    hits = int((near & wanted).sum())
    keys = [str(i) for i in range(len(mine))]
    my_groups, their_groups = (group(x.numpy(), keys, TAU) for x in (ours, teachers))
    mine_of = {i: set(g) for g in my_groups for i in g}
    grouped = [(i, set(g)) for g in their_groups if len(g) > 1 for i in g]
    mates = [len(mine_of[i] & g) > 1 for i, g in grouped]
    same = [mine_of[i] == g for i, g in grouped]
    share = lambda flags: round(sum(flags) / max(len(flags), 1), 4)
    return {"source": source, "prompts": len(mine), "spearman": round(spearman(mine[upper], theirs[upper]), 4),
            "pair_precision": round(hits / max(int(near.sum()), 1), 4),
            "pair_recall": round(hits / max(int(wanted.sum()), 1), 4),
            "pair_f1": round(2 * hits / max(int(near.sum() + wanted.sum()), 1), 4),
            "same_group": share(same), "shares_a_mate": share(mates), "teacher_grouped": round(len(grouped) / len(mine), 4),
            "our_grouped": round(sum(len(g) for g in my_groups if len(g) > 1) / len(mine), 4)}


def teacher_embeddings(texts: list[str], folder: Path | None) -> torch.Tensor:
    """[N, 384] float32 of norm 1."""
    from .distill import load_teacher
    from .text_encoder import embed

    tokenizer, teacher = load_teacher(folder)
    return embed(teacher, tokenizer, texts)


def contact_sheet(real: torch.Tensor, drawn: torch.Tensor, path: Path, columns: int = 16, scale: int = 2) -> None:
    """Real pictures above, drawn ones below, `columns` to a row; both uint8 [N, 3, H, W]."""
    from PIL import Image

    side, gap = real.shape[2], 2
    lines = math.ceil(len(real) / columns)
    sheet = np.full((lines * 2 * (side + gap), columns * (side + gap), 3), 200, np.uint8)
    for offset, pictures in ((0, real), (1, drawn)):
        pixels = pictures.permute(0, 2, 3, 1).numpy()
        for k, pixel in enumerate(pixels):
            y, x = (2 * (k // columns) + offset) * (side + gap), (k % columns) * (side + gap)
            sheet[y:y + side, x:x + side] = pixel
    image = Image.fromarray(sheet)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)


def blind_sheet(pictures: torch.Tensor, path: Path, columns: int = 8, scale: int = 6) -> None:
    """Numbered pictures and nothing else, for somebody who has not seen the captions."""
    from PIL import Image, ImageDraw

    side = pictures.shape[2] * scale
    cell = side + 22
    sheet = Image.new("RGB", (columns * cell, math.ceil(len(pictures) / columns) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for k, picture in enumerate(pictures):
        x, y = (k % columns) * cell, (k // columns) * cell
        pen.text((x + 4, y + 4), str(k + 1), fill="black")
        image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(image, (x + 2, y + 20))
    sheet.save(path, optimize=True)


def blind_score(folder: Path) -> dict | None:
    """What blind.json says, if it is about the weights in `folder`: {"right", "of", "judge"}."""
    path = folder / "blind.json"
    if not path.is_file():
        return None
    told = json.loads(path.read_text(encoding="utf8"))
    if told["unet_sha256"] != unet_digest(folder):
        return None
    return {"right": sum(row["right"] for row in told["pictures"]), "of": len(told["pictures"]), "judge": told["judge"]}


def unet_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()


def gate(trained: dict, blind: dict | None) -> dict:
    """Whether the model is good enough to measure sharing on; every claim of quality stands on it."""
    found = {"identification": trained["drawn"]["identification"]["value"], "diversity_ratio": trained["diversity_ratio"],
             "blind": None if blind is None else blind["right"] / blind["of"]}
    return {name: {"wanted": GATE[name], "found": value, "met": value is not None and value >= GATE[name]} for name, value in found.items()}


def machine() -> str:
    """The machine the figures were made on, in words."""
    facts = info.machine()
    return f"{facts['processor']}, {facts['threads']} threads, torch {torch.__version__}"
