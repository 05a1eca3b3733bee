"""Extractors, on tiny networks made here, and what their distances may be called."""

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchmetrics.functional.multimodal.clip_score import clip_score

import sage.emoji
from sage.emoji.scorer import ImageTower, Scorer
from sage.evaluation import clip_scores, distance_name, inception, kernel_distance, load_extractor
from sage.evaluation.features import ClipFeatures, Extractor
from sage.evaluation.pictures import as_uint8, batches

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["red", "blue", "cat", "dog"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_factor": 8.0}


def pictures(n=5, size=40, seed=0):
    """PIL images of noise, smooth enough to survive resizing."""
    random = np.random.default_rng(seed)
    small = [Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(n)]
    return [image.resize((size, size), Image.Resampling.BICUBIC) for image in small]


def as_tensor(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def tokenizer():
    words = {word: k for k, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(words, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=8, **special)


def image_processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    torch.manual_seed(0)
    text = SMALL | {"vocab_size": 8, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL | {"image_size": 32, "patch_size": 8}, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-dinov2"
    torch.manual_seed(1)
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    transformers.Dinov2Model(config).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def scorer(monkeypatch):
    """A scorer of the shipped kind with random weights, in place of the shipped one."""
    torch.manual_seed(3)

    class Small(Scorer):
        def embed_texts(self, texts):
            assert next(self.tower.parameters()).device.type == "cpu"
            return torch.nn.functional.normalize(torch.randn(len(texts), 12, generator=torch.Generator().manual_seed(0)), dim=1)

    made = Small(ImageTower(4, 12), torch.nn.Linear(1, 1), None)
    monkeypatch.setattr(sage.emoji, "load_scorer", lambda: made)
    return made


# Importing


def test_importing_loads_torch_only():
    packages = {"transformers", "diffusers", "PIL", "scipy", "torchmetrics", "torchvision"}
    code = f"import sage.evaluation, sys; print(sorted({packages} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Pictures


def test_pictures_of_all_kinds_become_the_same_pixels():
    images = pictures()
    pixels = as_tensor(images)
    for given in (pixels, pixels / 127.5 - 1, iter(images), list(pixels)):
        assert torch.equal(torch.stack(list(as_uint8(given, "images"))), pixels)
    assert [len(batch) for batch in batches(iter(images), 2, "images")] == [2, 2, 1]
    assert next(as_uint8([images[0].convert("L")], "images")).shape == (3, 40, 40)
    with pytest.raises(ValueError, match="images must be at least one picture, got none"):
        next(batches([], 2, "images"))


def test_floats_are_rounded_as_diffusers_does():
    from diffusers.image_processor import VaeImageProcessor

    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    assert torch.equal(torch.stack(list(as_uint8(x, "x"))), as_tensor(VaeImageProcessor().postprocess(x, output_type="pil")))


# The embedded scorer


def test_emoji_features_are_the_scorers(scorer):
    extractor = load_extractor("emoji")
    images = as_tensor(pictures(5, 32))
    assert isinstance(extractor, Extractor) and (extractor.name, extractor.dim) == ("emoji scorer", 32)
    torch.testing.assert_close(extractor.image_features(images, batch=2), scorer.image_features(images))
    torch.testing.assert_close(extractor.embed_images(images), scorer.embed_images(images))
    torch.testing.assert_close(extractor.embed_features(extractor.image_features(images)), scorer.embed_images(images))
    torch.testing.assert_close(extractor.embed_texts(WORDS), scorer.embed_texts(WORDS))


def test_emoji_features_take_pictures_of_several_sizes(scorer):
    extractor = load_extractor("emoji")
    mixed = [*pictures(2, 48), *pictures(1, 32, seed=1)]
    features = extractor.image_features(mixed)
    torch.testing.assert_close(features[:2], scorer.image_features(mixed[:2]))
    torch.testing.assert_close(features[2:], scorer.image_features(mixed[2:]))


def test_the_shipped_scorer_loads():
    extractor = load_extractor("emoji")
    assert extractor.image_features(pictures(2)).shape == (2, extractor.dim)
    for embeds in (extractor.embed_images(pictures(2)), extractor.embed_texts(["red apple", "rocket"])):
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(2))


# CLIP


def test_clip_features_are_the_models_own(clip_folder):
    extractor = load_extractor(f"clip:{clip_folder}")
    images, texts = pictures(), ["red cat", "blue dog", "dog", "red red blue", "cat"]
    assert isinstance(extractor, Extractor) and (extractor.name, extractor.dim) == ("CLIP tiny-clip", 24)
    tokens, pixels = tokenizer()(texts, padding=True, return_tensors="pt"), image_processor()(images, return_tensors="pt")
    with torch.no_grad():
        wanted = transformers.CLIPModel.from_pretrained(clip_folder)(tokens["input_ids"], pixels["pixel_values"], tokens["attention_mask"])
    torch.testing.assert_close(extractor.embed_images(images, batch=2), wanted.image_embeds)
    torch.testing.assert_close(extractor.embed_texts(texts, batch=2), wanted.text_embeds)
    features = extractor.image_features(images)
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=1), wanted.image_embeds)
    assert (features.norm(dim=1) - 1).abs().max() > 0.01 and features.dtype == torch.float32
    assert torch.equal(extractor.embed_features(extractor.image_features(images, batch=2)), extractor.embed_images(images, batch=2))


def test_clip_score_agrees_with_torchmetrics(clip_folder):
    extractor = load_extractor(f"clip:{clip_folder}")

    class Both:
        def __call__(self, text=None, images=None, **options):
            return tokenizer()(text, **options) if images is None else image_processor()(images, return_tensors="pt")

    class Model(transformers.CLIPModel):  # torchmetrics wants tensors, transformers 5 gives outputs
        def get_image_features(self, *args, **options):
            return super().get_image_features(*args, **options).pooler_output

        def get_text_features(self, *args, **options):
            return super().get_text_features(*args, **options).pooler_output

    images, texts = pictures(6), ["red cat", "blue dog", "dog", "red", "cat", "blue"]
    load = lambda: (Model.from_pretrained(clip_folder).eval(), Both())
    ours = clip_scores(extractor.embed_images(images), extractor.embed_texts(texts))
    theirs = [float(clip_score(image, text, load).detach()) for image, text in zip(as_tensor(images), texts)]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-3)
    assert max(theirs) > 1  # not all cut at 0


def test_clip_cuts_long_texts_and_says_so(clip_folder):
    extractor = load_extractor(f"clip:{clip_folder}")
    with pytest.warns(UserWarning, match="1 of 2 texts have more than 8 tokens and were cut"):
        extractor.embed_texts(["red " * 9, "cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor.embed_texts(["red " * 6])
    with pytest.raises(TypeError, match="texts must be a list of strings, at least one"):
        extractor.embed_texts([])


def test_loading_does_not_move_the_callers_random_numbers(clip_folder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    load_extractor(f"clip:{clip_folder}")
    assert torch.equal(state, torch.get_rng_state())


def test_a_hub_id_is_only_looked_for_here_when_asked_so(monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("reached for the network"))
    for spec in ("clip:nobody/no-such-model", "dinov2:nobody/no-such-model"):
        with pytest.raises(RuntimeError, match="cannot load 'nobody/no-such-model'.*safetensors"):
            load_extractor(spec, local_files_only=True)


def test_a_pickled_model_is_not_loaded(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(clip_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="clip: cannot load .*safetensors"):
        load_extractor(f"clip:{tmp_path}")


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_an_extractor_with_other_weights_is_another_one(kind, clip_folder, dino_folder, tmp_path):
    folder = {"clip": clip_folder, "dinov2": dino_folder}[kind]
    first = load_extractor(f"{kind}:{folder}").identity
    assert load_extractor(f"{kind}:{folder}").identity == first
    shutil.copytree(folder, tmp_path / folder.name)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layernorm.bias") or name.endswith("post_layernorm.bias"))
    weights[name] = weights[name] + 1e-6
    save_file(weights, tmp_path / folder.name / "model.safetensors", {"format": "pt"})
    other = load_extractor(f"{kind}:{tmp_path / folder.name}")
    assert other.identity != first and other.name == load_extractor(f"{kind}:{folder}").name


# DINOv2


def test_dino_features_are_the_class_token(dino_folder):
    extractor = load_extractor(f"dinov2:{dino_folder}")
    images = pictures()
    pixels = image_processor()(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = transformers.Dinov2Model.from_pretrained(dino_folder)(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor.image_features(images, batch=3), wanted)
    assert (extractor.name, extractor.dim) == ("DINOv2 tiny-dinov2", 32) and isinstance(extractor, Extractor)


def test_a_model_of_the_other_kind_is_refused(clip_folder, dino_folder):
    with pytest.raises(NotImplementedError, match='tiny-clip is a CLIPModel; name a DINOv2, or use "clip:NAME"'):
        load_extractor(f"dinov2:{clip_folder}")
    with pytest.raises(NotImplementedError, match="tiny-dinov2 is a Dinov2Model, which has no image and text features"):
        load_extractor(f"clip:{dino_folder}")


# Names


def test_names_do_not_overclaim(scorer, clip_folder, dino_folder, monkeypatch):
    monkeypatch.setattr(inception, "load_inception", lambda *args: (torch.nn.Identity(), False))
    emoji, clip = load_extractor("emoji"), load_extractor(f"clip:{clip_folder}")
    dino, unknown = load_extractor(f"dinov2:{dino_folder}"), load_extractor("inception:weights.safetensors")
    names = {kind: [distance_name(kind, x) for x in (emoji, clip, dino, unknown)] for kind in ("frechet", "kernel", "cmmd")}
    assert names["frechet"][0] == "Fréchet distance (emoji scorer)" and names["kernel"][0] == "kernel distance (emoji scorer)"
    assert names["cmmd"][1] == "Gaussian-kernel MMD² × 1000 (CLIP tiny-clip)"
    assert not any(claim in name for made in names.values() for name in made for claim in ("FID", "KID", "CMMD"))
    unknown.is_published = True
    assert [distance_name(kind, unknown) for kind in ("frechet", "kernel")] == ["FID", "KID"]
    assert "CMMD" not in distance_name("cmmd", unknown)
    unknown.dim = 768
    assert "FID" not in distance_name("frechet", unknown)
    vision = transformers.CLIPVisionConfig(image_size=336, patch_size=14, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    large = transformers.CLIPConfig(vision_config=vision.to_dict(), projection_dim=768)
    monkeypatch.setattr(clip.model, "config", large), monkeypatch.setattr(clip, "dim", 768)
    assert distance_name("cmmd", clip) == "CMMD (CLIP tiny-clip)"
    large.vision_config.image_size = 224
    assert "CMMD" not in distance_name("cmmd", clip)
    with pytest.raises(ValueError, match="kind must be one of frechet, kernel, cmmd, got 'fid'"):
        distance_name("fid", emoji)


@pytest.mark.parametrize("spec", ["FID", "clip", "clip:", "dinov2:", "inception:", "emoji:x", "", None])
def test_unknown_extractors_are_refused_with_the_known_ones(spec):
    with pytest.raises(ValueError, match=r'known are "emoji", "clip:NAME", "dinov2:NAME" and "inception:FILE"'):
        load_extractor(spec)


def test_a_folder_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="clip: folder './no/such' does not exist"):
        load_extractor("clip:./no/such")


def test_a_missing_package_names_the_extra(monkeypatch, clip_folder):
    def missing(*args, **options):
        raise ImportError("this tokenizer needs sentencepiece")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(RuntimeError, match=r"needs a package that is missing \(this tokenizer needs sentencepiece\)"):
        ClipFeatures(str(clip_folder))


def test_features_go_into_distances_and_names_into_json(clip_folder):
    extractor = load_extractor(f"clip:{clip_folder}")
    a, b = extractor.image_features(pictures(6, seed=1)), extractor.image_features(pictures(7, seed=2))
    line = json.dumps({distance_name("kernel", extractor): kernel_distance(a, b)})
    assert "kernel distance (CLIP tiny-clip)" in json.loads(line)
