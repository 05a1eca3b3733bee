"""Embedding prompts, with tiny random encoders built here: nothing is downloaded."""

import json
import shutil
import socket
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from sage.embed import Embeddings, embed_prompts
from sage.emoji import text_encoder_path
from sage.encoders import _load

WORDS = ["a", "red", "blue", "old", "small", "fox", "boat", "moon", "in", "the", "snow", "at", "night", "painting", "of"]
VOCABULARY = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
PROMPTS = ["a red fox", "a blue boat at night", "a red fox", "the moon", "a painting of a small old boat in the snow at"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("embedding reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def build_tokenizer(limit: int = 16) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2),
                                                                                                 ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                                   sep_token="[SEP]", model_max_length=limit)


def build_bert(positions: int = 40) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=positions, initializer_range=0.5)
    return BertModel(config).eval()


def build_clip(kind=CLIPTextModel, positions: int = 24) -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                            intermediate_size=64, projection_dim=16, max_position_embeddings=positions,
                            bos_token_id=2, eos_token_id=3, initializer_range=0.5)
    return kind(config).eval()


def build_t5(kind=T5EncoderModel) -> T5EncoderModel:
    torch.manual_seed(2)
    return kind(T5Config(vocab_size=len(VOCABULARY), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("encoder"), build_bert())


def save(folder, model) -> str:
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def by_hand(model, prompt: str, pool) -> np.ndarray:
    """One prompt alone, without padding."""
    ids = torch.tensor([build_tokenizer()(prompt)["input_ids"]])
    with torch.inference_mode():
        vector = pool(model(input_ids=ids))[0].double().numpy()
    return vector / np.linalg.norm(vector)


def mean(output):
    return output.last_hidden_state.mean(1)


def test_mean_of_the_tokens_of_each_prompt(folder):
    found = embed_prompts(PROMPTS, folder)
    assert isinstance(found, Embeddings) and len(found) == 5 and found.encoder == folder
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (5, 32)
    assert not found.unknown.any() and found.unknown.dtype == bool
    expected = np.array([by_hand(build_bert(), prompt, mean) for prompt in PROMPTS])
    assert np.abs(found.vectors - expected).max() < 2e-6
    assert np.abs(np.linalg.norm(found.vectors, axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("batch_size", [3, 64])
def test_vectors_do_not_depend_on_order_or_repetition(folder, batch_size):
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(24)]
    first = embed_prompts(prompts, folder, batch_size=batch_size).vectors
    order = rng.integers(0, 24, 40)
    order = np.concatenate([order, np.setdiff1d(np.arange(24), order)])
    again = embed_prompts([prompts[i] for i in order], folder, batch_size=batch_size, progress=True).vectors
    assert (again == first[order]).all()
    alone = np.concatenate([embed_prompts([prompt], folder).vectors for prompt in prompts[:8]])
    assert np.abs(alone - first[:8]).max() < 2e-6  # other prompts move a vector by rounding at most


def test_long_prompts_are_cut_at_the_positions_and_counted(folder):
    """The tokenizer's own limit of 16 serves the diffusion model and is not asked: the model has 40 positions."""
    long, cut = " ".join(["red fox"] * 15), " ".join(["fox"] * 38)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_prompts([long, cut], folder)
    with pytest.warns(UserWarning, match="2 of 3 prompts are longer than the 40 tokens"):
        found = embed_prompts([cut + " fox moon", "a fox", cut + " boat"], folder)
    assert (found.vectors[0] == found.vectors[2]).all()


def test_prompts_that_are_mostly_unknown_are_marked(folder):
    prompts = ["a red fox", "ein roter Fuchs", "狐", "", "a Zwergfuchs", "a red Zwergfuchs"]
    with pytest.warns(UserWarning, match="4 of 6 prompts are mostly unknown.*'ein roter Fuchs'"):
        found = embed_prompts(prompts, folder)
    assert found.unknown.tolist() == [False, True, True, True, True, False]
    assert np.isfinite(found.vectors).all()


def test_loading_leaves_the_random_numbers_alone(folder, tmp_path):
    headless = build_bert()
    headless.pooler = None  # its weights are then missing, and transformers draws fresh ones
    save(tmp_path, headless)
    state = torch.get_rng_state()
    embed_prompts(PROMPTS, str(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)


def test_only_safetensors_are_read(tmp_path):
    folder = save(tmp_path, build_bert())
    torch.save(build_bert().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="cannot load encoder .*safetensors"):
        embed_prompts(PROMPTS, folder)


def test_code_in_a_folder_is_not_run(tmp_path):
    folder = save(tmp_path, build_bert())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(RuntimeError, match="cannot load encoder"):
        embed_prompts(PROMPTS, folder)
    assert not (tmp_path / "ran").exists()


def test_encoder_half_of_an_encoder_decoder(tmp_path):
    found = embed_prompts(PROMPTS, save(tmp_path, build_t5(T5Model)))
    expected = by_hand(build_t5(T5Model).get_encoder(), PROMPTS[1], mean)
    assert np.abs(found.vectors[1] - expected).max() < 2e-6


@pytest.mark.parametrize("config", [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
                                    {"pooling_mode": "cls"}])
def test_sentence_transformers_folder_that_pools_its_first_token(tmp_path, config):
    folder = save(tmp_path, build_bert())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    expected = by_hand(build_bert(), PROMPTS[1], lambda output: output.last_hidden_state[:, 0])
    assert np.abs(embed_prompts(PROMPTS, folder).vectors[1] - expected).max() < 2e-6


def test_other_pooling_is_refused(tmp_path):
    folder = save(tmp_path, build_bert())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(NotImplementedError, match=r"pools by \['max'\]; known: mean, cls"):
        embed_prompts(PROMPTS, folder)


def pipeline(**parts):
    for name in [name for name in parts if name.startswith("text_encoder")]:
        parts.setdefault(name.replace("text_encoder", "tokenizer"), build_tokenizer())
    return SimpleNamespace(**parts)


def projected(output):
    return output.text_embeds


@pytest.mark.parametrize(("parts", "chosen", "pool"), [
    ({"text_encoder": build_clip()}, "text_encoder", lambda output: output.pooler_output),
    ({"text_encoder": build_bert()}, "text_encoder", mean),
    ({"text_encoder": build_t5()}, "text_encoder", mean),
    ({"text_encoder": build_clip(), "text_encoder_2": build_clip(CLIPTextModelWithProjection)},
     "text_encoder_2", projected),  # SDXL
    ({"text_encoder": None, "text_encoder_2": build_clip(CLIPTextModelWithProjection)}, "text_encoder_2", projected),
    ({"text_encoder": build_clip(), "text_encoder_2": build_t5()}, "text_encoder",
     lambda output: output.pooler_output),  # Flux
    ({"text_encoder": build_clip(CLIPTextModelWithProjection), "text_encoder_3": build_t5()}, "text_encoder",
     projected),  # SD3 has two of the first kind
])
def test_pooled_text_encoder_of_a_pipeline(parts, chosen, pool):
    found = embed_prompts(PROMPTS, "pipeline", pipeline(**parts))
    assert found.encoder == f"pipeline {chosen} ({type(parts[chosen]).__name__})"
    expected = np.array([by_hand(parts[chosen], prompt, pool) for prompt in PROMPTS])
    assert np.abs(found.vectors - expected).max() < 5e-6


def test_pipeline_encoder_in_bfloat16():
    model = build_bert().bfloat16()
    vectors = embed_prompts(PROMPTS, "pipeline", pipeline(text_encoder=model)).vectors
    assert vectors.dtype == np.float32
    assert np.abs(vectors - embed_prompts(PROMPTS, "pipeline", pipeline(text_encoder=build_bert())).vectors).max() < 0.02


def test_broken_weights_are_named(tmp_path):
    model = build_bert()
    model.embeddings.LayerNorm.weight.data[:] = float("nan")
    with pytest.raises(RuntimeError, match="no usable embedding for 'a blue boat at night'"):
        embed_prompts(PROMPTS, save(tmp_path, model))


def test_hub_ids_are_told_from_folders(monkeypatch, tmp_path):
    def load(name, source, local, *args):
        raise LookupError(f"{source} {local}")

    monkeypatch.setattr("sage.encoders._load", load)
    for name in ("all-MiniLM-L6-v2", "someone/encoder"):
        with pytest.raises(LookupError, match=f"{name} False"):
            embed_prompts(PROMPTS, name)
    with pytest.raises(LookupError, match=f"{tmp_path} True"):
        embed_prompts(PROMPTS, str(tmp_path))


LANGUAGE_MODEL = GPT2Model(GPT2Config(vocab_size=len(VOCABULARY), n_embd=8, n_layer=1, n_head=1))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: embed_prompts("a fox"), "prompts must be a sequence of str"),
    (lambda: embed_prompts([]), "prompts must hold at least one prompt"),
    (lambda: embed_prompts(["a", None]), r"prompts\[1\] must be a str, got None"),
    (lambda: embed_prompts(["a"], batch_size=0), "batch_size must be at least 1"),
    (lambda: embed_prompts(["a"], None), "encoder must be .auto., .pipeline., a folder or a hub id, got None"),
    (lambda: embed_prompts(["a"], "pipeline"), "needs the pipeline; pass pipe="),
    (lambda: embed_prompts(["a"], "./no/such/folder"), "folder './no/such/folder' does not exist"),
    (lambda: embed_prompts(["a"], "no/such/folder"), "folder 'no/such/folder' does not exist"),
    (lambda: embed_prompts(["a"], "pipeline", SimpleNamespace()), "SimpleNamespace has no text encoder that pools"),
    (lambda: embed_prompts(["a"], "pipeline", pipeline(text_encoder=LANGUAGE_MODEL)), "no text encoder that pools"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises((TypeError, ValueError, FileNotFoundError, NotImplementedError), match=message):
        call()


def test_shipped_encoder_finds_like_prompts_alike():
    try:
        text_encoder_path()
    except RuntimeError as error:
        pytest.skip(f"the shipped sentence encoder is not there yet: {error}")
    prompts = ["a red fox in the snow", "a fox sitting in snow", "a sailing boat at sea", "a ship on the ocean"]
    found = embed_prompts(prompts)
    assert found.encoder == "sage.emoji text encoder" and not found.unknown.any()
    alike = found.vectors @ found.vectors.T
    assert alike[0, 1] > 0.6 and alike[2, 3] > 0.5
    assert alike[:2, 2:].max() < 0.4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_prompts(["word " * 40])  # within 64 tokens, though the tokenizer's own limit is 16


def test_sentence_encoders_with_parts_that_are_not_read_are_refused(tmp_path):
    shutil.copytree(text_encoder_path(), tmp_path / "encoder")
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = tmp_path / "encoder" / "modules.json"
    modules.write_text(json.dumps([{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]))
    plain = embed_prompts(["a fox"], str(tmp_path / "encoder")).vectors
    assert plain.shape == (1, 256)
    modules.write_text(json.dumps([{"type": f"sentence_transformers.models.{kind}"} for kind in [*kinds, "Dense"]]))
    _load.cache_clear()
    with pytest.raises(NotImplementedError, match="has parts that are not read here .Dense.; embed with sentence-transformers"):
        embed_prompts(["a fox"], str(tmp_path / "encoder"))
