"""Prompt files for `bench_grouping.py`, and as many real-looking embeddings as asked for, made of them.

Prompts are read, perturbed as templates (a word or two of each replaced by words of other prompts) and embedded by the encoder that
comes with the package. More vectors than that come from differences of meaning: e(a) + s·(e(b) − e(c)), where b and c are two
different perturbations of one template and s is drawn; so they have the spectrum and the neighbourhoods of embeddings, which noise has
not. The encoder's vectors are shorter than WIDTH: they are turned into that space, and a little noise fills all its directions.
"""

import csv
import hashlib
import random
from pathlib import Path

import numpy as np

from sage.embed import embed_prompts
from sage.prompts import read_prompts

WIDTH = 384  # of all-MiniLM-L6-v2, the usual sentence encoder; the shipped one's vectors are turned into this space
NOISE = 0.1  # length of the noise beside a vector of length 1
VARIANTS = 4  # perturbations of each prompt
MOST_TEXTS = 12_000  # that are embedded


def read_set(path):
    """(prompts without repetitions, sha256 of the file); a .tsv has them in its column Prompt."""
    path = Path(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".tsv":
        with path.open(encoding="utf-8", newline="") as file:
            prompts = [row["Prompt"].strip() for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    else:
        prompts = read_prompts(str(path)).prompts
    return list(dict.fromkeys(prompts)), digest


def files(path):
    """The prompt files of a folder, or the one that was named."""
    path = Path(path)
    return sorted(f for f in path.iterdir() if f.suffix in (".txt", ".tsv", ".jsonl")) if path.is_dir() else [path]


def perturbed(prompts, rng):
    """(texts, template of each): every prompt, and VARIANTS of it with a word or two replaced."""
    words = sorted({word for prompt in prompts for word in prompt.split() if len(word) > 3})
    texts, templates = [], []
    for number, prompt in enumerate(prompts):
        for variant in range(VARIANTS + 1):
            parts = prompt.split()
            for _ in range(rng.randint(1, 2) if variant else 0):
                parts[rng.randrange(len(parts))] = rng.choice(words)
            texts.append(" ".join(parts))
            templates.append(number)
    return texts, templates


class Source:
    """An endless, seeded source of embeddings like those of prompts.

    Args:
        prompts: what the texts are made of.
        seed: of all that is drawn.
    """

    def __init__(self, prompts, seed=0):
        rng = random.Random(seed)
        chosen = rng.sample(prompts, min(len(prompts), MOST_TEXTS // (VARIANTS + 1)))
        texts, self.templates = perturbed(chosen, rng)
        self.prompts, self.texts = len(chosen), len(texts)
        vectors = embed_prompts(texts, progress=True).vectors
        turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)))[0][: vectors.shape[1]]
        self.vectors = (vectors @ turn).astype(np.float32)  # cosines stay what they are

    def draw(self, count, seed):
        """float32 [count, WIDTH], rows of length 1."""
        rng = np.random.default_rng(seed)
        out = np.empty((count, WIDTH), dtype=np.float32)
        per = VARIANTS + 1
        for begin in range(0, count, 50_000):
            some = min(50_000, count - begin)
            a = rng.integers(0, self.texts, some)
            template = rng.integers(0, self.prompts, some) * per
            first = rng.integers(0, per, some)
            b, c = template + first, template + (first + rng.integers(1, per, some)) % per
            step = rng.uniform(0.5, 1.5, (some, 1)).astype(np.float32)
            made = self.vectors[a] + step * (self.vectors[b] - self.vectors[c])
            made += rng.standard_normal((some, WIDTH), dtype=np.float32) * (NOISE / WIDTH**0.5)
            out[begin : begin + some] = made / np.linalg.norm(made, axis=1, keepdims=True)
        return out


def threshold_for(vectors, degree, seed=0):
    """(the least similarity, in hundredths, at which a vector has `degree` neighbours or fewer, or .99; how many it has), by a sample."""
    rng = np.random.default_rng(seed)
    rows = vectors[rng.choice(len(vectors), min(1000, len(vectors)), replace=False)]
    levels = np.round(np.arange(0.3, 0.991, 0.01), 2)
    counts = np.zeros(len(levels))
    for begin in range(0, len(vectors), 50_000):
        tile = rows @ vectors[begin : begin + 50_000].T
        counts += [(tile >= level).sum() for level in levels]
    neighbours = counts / len(rows) - 1
    chosen = next((number for number, mean in enumerate(neighbours) if mean <= degree), len(levels) - 1)
    return float(levels[chosen]), float(neighbours[chosen])
