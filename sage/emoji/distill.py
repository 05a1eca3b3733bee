"""Distillation of the text encoder: the teacher's answers are computed once and cached, then the student trains.

Three losses: token states (means over words, in the projected basis), sentence embeddings (cosine), and the
similarities between the sentences of a batch (their errors are what grouping would feel).
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .checkpoint import Run
from .recipe import TextRecipe, annealed
from .text_encoder import SENTENCE_LENGTH, build_student, build_tokenizer, masked_mean, prune_vocabulary, teacher_folder, transplant


@dataclasses.dataclass
class Targets:
    """The corpus as the student sees it and the teacher answered it; sentence i is a slice of each flat tensor.

    ids, words: [T] int32, the student's pieces and the word each belongs to, counted within its sentence.
    pieces: [N + 1] int64 offsets into ids.  states: [W, C] float16, word means of the teacher's last hidden states.
    spans: [N + 1] int64 offsets into states.  pooled: [N, 384] float16, the teacher's sentence embeddings, norm 1.
    basis: [384, C] float32.
    """

    ids: torch.Tensor
    words: torch.Tensor
    pieces: torch.Tensor
    states: torch.Tensor
    spans: torch.Tensor
    pooled: torch.Tensor
    basis: torch.Tensor


def load_teacher(folder: Path | None):
    from transformers import AutoTokenizer, BertModel

    folder = folder or teacher_folder()
    teacher = BertModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval().requires_grad_(False)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True), teacher


def _word_index(encoding) -> list[int]:
    """Per piece the number of its word; [CLS] is word 0 and [SEP] the last."""
    index, last, count = [], object(), -1
    for word in encoding.word_ids:
        if word is None or word != last:
            count += 1
        index.append(count)
        last = word if word is not None else object()
    return index


def _encode(tokenizer, texts: list[str]):
    """Unpadded encodings with word indices: list of (ids, words)."""
    encodings = tokenizer(texts, truncation=True, max_length=SENTENCE_LENGTH).encodings
    return [(e.ids, _word_index(e)) for e in encodings]


def _pad(rows: list, fill: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(r, dtype=torch.long) for r in rows], True, fill)


def _word_means(hidden: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Means over the pieces of each word, sentence after sentence.

    Args: hidden: [N, L, C].  words: [N, L] int64, word within the sentence.  mask: [N, L] bool.
    Returns: [words in all sentences, C].
    """
    counts = torch.where(mask, words, -1).amax(1) + 1
    first = F.pad(counts.cumsum(0), (1, 0))
    flat = (words + first[:-1, None])[mask]
    total = torch.zeros(int(first[-1]), hidden.shape[2]).index_add_(0, flat, hidden[mask])
    return total / torch.bincount(flat, minlength=len(total))[:, None]


@torch.no_grad()
def choose_basis(tokenizer, teacher, texts: list[str], width: int) -> torch.Tensor:
    """The `width` leading directions of the teacher's hidden states, all layers and sentence embeddings alike."""
    moments = None
    for start in range(0, len(texts), 128):
        rows = _encode(tokenizer, texts[start:start + 128])
        ids, mask = _pad([r[0] for r in rows]), _pad([[1] * len(r[0]) for r in rows])
        hidden = teacher(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        # The sentence embedding counts twice: it is what similarity is read from.
        layers = [h[mask.bool()] for h in hidden] + [masked_mean(hidden[-1], mask)] * 2
        found = torch.stack([(x.T @ x).double() for x in layers])
        moments = found if moments is None else moments + found
    moments /= moments.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    _, vectors = torch.linalg.eigh(moments.mean(0))
    return vectors.flip(1)[:, :width].float().contiguous()


@torch.no_grad()
def ask_teacher(texts: list[str], captions: list[str], recipe: TextRecipe, teacher_path: Path | None, path: Path) -> None:
    """Computes everything the distillation needs and writes it to `path`; skipped when it is there already."""
    asked = ("vocabulary", "width", "definitions", "examples", "names", "prompts", "seed")
    header = {"recipe": json.dumps({name: getattr(recipe, name) for name in asked}), "texts": str(len(texts))}
    if path.is_file():
        with safe_open(path, "pt") as file:
            if {k: file.metadata()[k] for k in header} == header:
                return
    tokenizer, teacher = load_teacher(teacher_path)
    vocabulary = prune_vocabulary(tokenizer, texts, captions, recipe.vocabulary)
    ours = build_tokenizer(vocabulary)
    basis = choose_basis(tokenizer, teacher, texts[:4000], recipe.width)
    mine = _encode(ours, texts)
    theirs = _encode(tokenizer, texts)
    # Truncation at 64 pieces can cut the two tokenizations at different words; drop those few sentences.
    keep = [i for i in range(len(texts)) if mine[i][1][-1] == theirs[i][1][-1]]
    mine, theirs = [mine[i] for i in keep], [theirs[i] for i in keep]
    spans = np.concatenate([[0], np.cumsum([r[1][-1] + 1 for r in theirs])])
    states = torch.empty(int(spans[-1]), recipe.width, dtype=torch.float16)
    pooled = torch.empty(len(theirs), teacher.config.hidden_size, dtype=torch.float16)
    order = sorted(range(len(theirs)), key=lambda i: len(theirs[i][0]))
    bar = tqdm(total=len(order), desc="text: teacher", unit="sentence")
    for start in range(0, len(order), 128):
        picked = order[start:start + 128]
        ids, words = _pad([theirs[i][0] for i in picked]), _pad([theirs[i][1] for i in picked])
        mask = _pad([[1] * len(theirs[i][0]) for i in picked])
        hidden = teacher(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled[picked] = F.normalize(masked_mean(hidden, mask), dim=1).half()
        means = (_word_means(hidden, words, mask.bool()) @ basis).half()
        at = 0
        for i in picked:
            n = int(spans[i + 1] - spans[i])
            states[spans[i]:spans[i + 1]] = means[at:at + n]
            at += n
        bar.update(len(picked))
    bar.close()
    flat = lambda j: torch.tensor([x for row in mine for x in row[j]], dtype=torch.int32)
    pieces = torch.tensor(np.concatenate([[0], np.cumsum([len(r[0]) for r in mine])]))
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf8")
    save_file({"ids": flat(0), "words": flat(1), "pieces": pieces, "states": states, "spans": torch.tensor(spans),
               "pooled": pooled, "basis": basis}, path, metadata=header)


def load_targets(path: Path) -> tuple[Targets, list[str]]:
    with safe_open(path, "pt") as file:
        targets = Targets(**{f.name: file.get_tensor(f.name) for f in dataclasses.fields(Targets)})
    return targets, json.loads((path.parent / "vocab.json").read_text(encoding="utf8"))


def _batches(lengths: torch.Tensor, tokens: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Sentences of like length together, about `tokens` pieces in a batch, batches in random order."""
    jitter = lengths + 2 * torch.rand(len(lengths), generator=generator)
    order, batches, start = jitter.argsort(), [], 0
    while start < len(order):
        size = max(8, tokens // int(lengths[order[start]] + 2))
        batches.append(order[start:start + size])
        start += size
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def distill(targets: Targets, vocabulary: list[str], recipe: TextRecipe, teacher_path: Path | None, path: Path,
            save_every: int = 300):
    """Trains the student from the teacher's weights, or from the checkpoint at `path`. Returns it in eval mode."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    student = build_student(recipe, len(vocabulary))
    tokenizer, teacher = load_teacher(teacher_path)
    rows = torch.tensor(tokenizer.convert_tokens_to_ids(vocabulary))
    transplant(student, teacher, targets.basis, rows, recipe.layers)
    del teacher
    student.train()
    student.pooler.requires_grad_(False)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, recipe.lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    run = Run(path, "text: distil", recipe, {"model": student}, optimizer, generator, save_every)
    scale = targets.states[:100_000].float().pow(2).mean()
    lengths = targets.pieces.diff()
    queue: list[torch.Tensor] = []  # not part of a checkpoint: a resumed run begins a new pass over the corpus
    for step in run:
        if not queue:
            queue = _batches(lengths, recipe.batch_tokens, generator)
        picked = queue.pop().tolist()
        run.set_lr(recipe.lr * min(1.0, (step + 1) / recipe.warmup) * annealed(step, recipe.anneal_from, recipe.steps))
        part = lambda flat, offsets, i: flat[offsets[i]:offsets[i + 1]]
        ids = _pad([part(targets.ids, targets.pieces, i) for i in picked])
        words = _pad([part(targets.words, targets.pieces, i) for i in picked])
        mask = torch.arange(ids.shape[1])[None] < lengths[picked][:, None]
        wanted = torch.cat([part(targets.states, targets.spans, i) for i in picked]).float()
        pooled = targets.pooled[picked].float()
        hidden = student(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        token_loss = F.mse_loss(_word_means(hidden, words, mask), wanted) / scale
        mine = F.normalize(masked_mean(hidden, mask), dim=1)
        pooled_loss = (1 - (mine * F.normalize(pooled @ targets.basis, dim=1)).sum(1)).mean()
        relational_loss = (mine @ mine.T - pooled @ pooled.T).pow(2).sum() / (len(mine) * (len(mine) - 1))
        loss = (recipe.token_weight * token_loss + recipe.pooled_weight * pooled_loss
                + recipe.relational_weight * relational_loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss, token=token_loss, pooled=pooled_loss, relational=relational_loss)
    return student.eval()
