"""Judges an exported folder: what the autoencoder loses, what the model draws, how near the encoder is to its teacher."""

import math
import platform
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from .codec import PatchCodec, psnr
from .data import Dataset
from .scorer import Scorer

TAU = 0.6  # cosine from which two captions may share a group
GROUP_LIMIT = 8


def cliques(similarity: np.ndarray, tau: float = TAU, limit: int = GROUP_LIMIT) -> list[list[int]]:
    """Groups in which every pair reaches tau, most similar pairs merged first; loners are groups of one.

    Args: similarity (ndarray): [N, N] symmetric.
    """
    n = len(similarity)
    member = {i: [i] for i in range(n)}
    home = list(range(n))
    rows, columns = np.nonzero(np.triu(similarity >= tau, 1))
    order = np.argsort(-similarity[rows, columns], kind="stable")
    for a, b in zip(rows[order], columns[order]):
        a, b = home[a], home[b]
        if a == b or len(member[a]) + len(member[b]) > limit:
            continue
        if similarity[np.ix_(member[a], member[b])].min() >= tau:
            for i in member[b]:
                home[i] = a
            member[a] += member.pop(b)
    return [sorted(group) for group in member.values()]


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


def draw(pipe, prompts: list[str], seed: int, steps: int = NUM_INFERENCE_STEPS, guidance: float = GUIDANCE_SCALE,
         batch: int = 64) -> torch.Tensor:
    """[N, 3, 32, 32] in [-1, 1], one picture per prompt; picture i depends on seed + i and its prompt only."""
    pipe.set_progress_bar_config(disable=True)
    out = []
    for start in tqdm(range(0, len(prompts), batch), desc="evaluate: draw", unit="batch"):
        part = prompts[start:start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images = pipe(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators,
                      output_type="np").images
        out.append(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(out)


def identified(images: torch.Tensor, texts: torch.Tensor, groups: list[list[int]]) -> float:
    """The share of pictures nearer to their own caption than to any other of their group.

    Args: images, texts (Tensor): [N, C] of norm 1, row i belonging together.
    """
    right = [int((texts[g] @ images[i]).argmax()) == g.index(i) for g in groups for i in g]
    return sum(right) / len(right)


def evaluate_generator(pipe, scorer: Scorer, dataset: Dataset, pool: Dataset, prompts: int,
                       seed: int = 0) -> tuple[dict, dict]:
    """Draws the captions of whole groups of `dataset`, chosen at random, until `prompts` are reached.

    Args: pool: whose pictures a drawn one is compared with; holds those of `dataset`.
    Returns: the figures, and {"drawn", "real"} for a contact sheet.
    """
    texts = scorer.embed_texts(dataset.captions)
    grouped = [g for g in cliques((texts @ texts.T).numpy()) if len(g) > 1]
    order = torch.randperm(len(grouped), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, rows = [], []
    for index in order:
        if len(rows) >= prompts:
            break
        chosen.append(list(range(len(rows), len(rows) + len(grouped[index]))))
        rows += grouped[index]
    real, words = dataset.pictures()[rows], texts[rows]
    drawn = draw(pipe, [dataset.captions[i] for i in rows], seed)
    ours, theirs = scorer.embed_images(drawn), scorer.embed_images(real)
    nearest = torch.cdist(drawn.flatten(1), pool.pictures().flatten(1)).argmin(1).tolist()
    own = [pool.captions[near] == dataset.captions[i] for near, i in zip(nearest, rows)]
    figures = {
        "prompts": len(rows), "groups": len(chosen), "steps": NUM_INFERENCE_STEPS, "guidance": GUIDANCE_SCALE, "seed": seed,
        "chance": len(chosen) / len(rows), "identification_drawn": identified(ours, words, chosen),
        "identification_real": identified(theirs, words, chosen), "cosine_drawn": float((ours * words).sum(1).mean()),
        "cosine_real": float((theirs * words).sum(1).mean()), "nearest_is_own": sum(own) / len(own),
        "captions": len(texts), "captions_grouped": sum(map(len, grouped)) / len(texts),
    }
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    return rounded, {"drawn": drawn, "real": real}


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
    my_groups, their_groups = cliques(mine), cliques(theirs)
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
    """Real pictures above, drawn ones below, `columns` to a row; both [N, 3, H, W] in [-1, 1]."""
    from PIL import Image

    side, gap = real.shape[2], 2
    lines = math.ceil(len(real) / columns)
    sheet = np.full((lines * 2 * (side + gap), columns * (side + gap), 3), 200, np.uint8)
    for offset, pictures in ((0, real), (1, drawn)):
        pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for k, pixel in enumerate(pixels):
            y, x = (2 * (k // columns) + offset) * (side + gap), (k % columns) * (side + gap)
            sheet[y:y + side, x:x + side] = pixel
    image = Image.fromarray(sheet)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)


def machine() -> str:
    """The machine the figures were made on, in words."""
    name = platform.processor() or platform.machine()
    try:
        models = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = models[0] if models else name
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
