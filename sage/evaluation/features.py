"""Pictures → features, with the network that you name; and what a distance of such features may be called.

    extractor = load_extractor("emoji")                                 # the scorer that comes with the package
    extractor = load_extractor("clip:openai/clip-vit-base-patch32")     # a folder or hub id, safetensors only
    extractor = load_extractor("dinov2:./dinov2-small")
    extractor = load_extractor("inception:inception.safetensors")       # for FID and KID
    features = extractor.image_features(images)

Pictures are rounded to 8 bits first, so they give the same features whether they were saved or not. Networks run in float32.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from sage.evaluation import inception
from sage.evaluation.identity import modules_identity
from sage.evaluation.pictures import batches, to_pil

__all__ = ["ClipFeatures", "DinoFeatures", "EmojiFeatures", "Extractor", "InceptionFeatures", "distance_name", "load_extractor"]

KNOWN = '"emoji", "clip:NAME", "dinov2:NAME" and "inception:FILE"'
EXTRA = 'pip install "sage-diffusion[eval]"'


@runtime_checkable
class Extractor(Protocol):
    """What turns pictures into features.

    Those that also know texts have `embed_texts`, `embed_images` and `embed_features`, with rows of length 1; the last of features that
    are there already.

    Args:
        name: for records; holds no path.
        dim: width of the features.
        identity: changes with the weights.
    """

    name: str
    dim: int
    identity: str

    def image_features(self, images: Any, batch: int = 64) -> torch.Tensor:
        """Pictures (see `sage.evaluation.pictures.as_uint8`) → float32 [N, dim] on the CPU."""


class EmojiFeatures:
    """The scorer of the embedded model: 224 features, and embeddings beside those of captions.

    Args:
        device: where the image tower runs; texts are embedded on the CPU.
    """

    name = "emoji scorer"

    def __init__(self, device: Any = "cpu"):
        from sage.emoji import load_scorer

        self.scorer, self.device = load_scorer(), device
        self.tower = copy.deepcopy(self.scorer.tower).to(device)  # the scorer keeps its own, beside the text encoder
        self.dim = self.tower.norm.num_features
        self.identity = modules_identity({"tower": self.scorer.tower, "text_encoder": self.scorer.text_encoder})

    def _run(self, function: Callable, images: Any, batch: int) -> torch.Tensor:
        ready = lambda pictures: torch.cat([self.scorer.to_tensor(picture[None]) for picture in pictures]).to(self.device)
        return _run(lambda pictures: function(ready(pictures)), images, batch, f"{self.name}: images")

    def image_features(self, images: Any, batch: int = 256) -> torch.Tensor:
        """float32 [N, 224]."""
        return self._run(self.tower.features, images, batch)

    def embed_images(self, images: Any, batch: int = 256) -> torch.Tensor:
        """float32 [N, 256], rows of length 1."""
        return self._run(self.tower, images, batch)

    @torch.no_grad()
    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [N, 256], rows of length 1."""
        return torch.nn.functional.normalize(self.scorer.tower.project(features), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [N, 256], rows of length 1."""
        return self.scorer.embed_texts(list(texts))


class ClipFeatures:
    """A CLIP, or another model of transformers with image and text features in one space, such as SigLIP.

    Features are the projected embeddings before they are divided by their length. Pictures are prepared as the model's own
    processor says, with PIL. (The authors of CMMD resize without widening the filter, which differs for large pictures.)

    Args:
        source: a folder, or an id on the hub.
        device: where it runs.
        local_files_only: whether to refuse downloads; a folder never downloads.

    Raises:
        FileNotFoundError, RuntimeError: it cannot be had or loaded. NotImplementedError: a model without both kinds of features.
    """

    def __init__(self, source: str, device: Any = "cpu", local_files_only: bool = False):
        from transformers import AutoTokenizer

        self.model, self._prepare, name = _pretrained("clip", source, device, local_files_only)
        self.name, self.device = f"CLIP {name}", device
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            raise NotImplementedError(f"clip: {name} is a {type(self.model).__name__}, which has no image and text features in one "
                                      'space; name a CLIP or SigLIP, or use "dinov2:NAME"')
        self.tokenizer = _from_hub(AutoTokenizer, "clip", source, local_files_only)
        text = self.model.config.text_config
        self.limit = min(self.tokenizer.model_max_length, text.max_position_embeddings)
        self._padding = "max_length" if "siglip" in self.model.config.model_type else True  # SigLIP was trained so
        self.dim = self.image_features([torch.zeros(3, 32, 32, dtype=torch.uint8)]).shape[1]
        self.identity = modules_identity({"model": self.model})

    @property
    def is_cmmds(self) -> bool:
        """Whether it has the shape of the model that CMMD is defined with, ViT-L/14 at 336 pixels."""
        vision = getattr(self.model.config, "vision_config", None)
        shape = [getattr(vision, key, None) for key in ("image_size", "patch_size", "hidden_size", "num_hidden_layers")]
        return self.model.config.model_type == "clip" and shape == [336, 14, 1024, 24] and self.dim == 768

    def image_features(self, images: Any, batch: int = 64) -> torch.Tensor:
        """float32 [N, dim]."""
        run = lambda pictures: _pooled(self.model.get_image_features(pixel_values=self._prepare(pictures)))
        return _run(run, images, batch, f"{self.name}: images")

    def embed_images(self, images: Any, batch: int = 64) -> torch.Tensor:
        """float32 [N, dim], rows of length 1."""
        return self.embed_features(self.image_features(images, batch))

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [N, dim], rows of length 1."""
        return torch.nn.functional.normalize(features, dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch: int = 256) -> torch.Tensor:
        """float32 [N, dim], rows of length 1. Warns, with a count, of texts that are longer than the model reads."""
        texts = list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{self.name}: texts must be a list of strings, at least one, got {texts!r:.80}")
        cut = sum(len(ids) > self.limit for ids in self.tokenizer(texts).input_ids)
        if cut:
            warnings.warn(f"{self.name}: {cut} of {len(texts)} texts have more than {self.limit} tokens and were cut", stacklevel=2)
        parts = []
        for k in range(0, len(texts), batch):
            tokens = self.tokenizer(texts[k : k + batch], padding=self._padding, truncation=True, max_length=self.limit,
                                    return_tensors="pt").to(self.device)
            parts.append(_pooled(self.model.get_text_features(**tokens)).float().cpu())
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)


class DinoFeatures:
    """DINOv2 (arXiv:2304.07193): the class token after the last norm. Prepared as the model's own processor says, with PIL.

    Args, Raises: as `ClipFeatures`; NotImplementedError for a model that is no DINOv2.
    """

    def __init__(self, source: str, device: Any = "cpu", local_files_only: bool = False):
        self.model, self._prepare, name = _pretrained("dinov2", source, device, local_files_only)
        if self.model.config.model_type not in ("dinov2", "dinov2_with_registers"):
            raise NotImplementedError(f'dinov2: {name} is a {type(self.model).__name__}; name a DINOv2, or use "clip:NAME" for a CLIP')
        self.name, self.dim = f"DINOv2 {name}", self.model.config.hidden_size
        self.identity = modules_identity({"model": self.model})

    def image_features(self, images: Any, batch: int = 64) -> torch.Tensor:
        """float32 [N, dim]."""
        return _run(lambda pictures: self.model(pixel_values=self._prepare(pictures)).pooler_output, images, batch, f"{self.name}: images")


class InceptionFeatures:
    """FID's Inception-v3 with clean-fid's preparation: 8-bit pixels, resized by `clean_resize`.

    The network was compared with torch-fidelity's on random weights; that the published weights give the published FIDs is not
    tested, as the tests have no such weights.

    Args:
        source: as in `sage.evaluation.inception.read_weights`.
        device: where it runs.
        allow_pickle: consent to load the published pickle.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: as `sage.evaluation.inception.load_inception`.
    """

    dim = inception.DIM

    def __init__(self, source: str | None, device: Any = "cpu", allow_pickle: bool = False):
        model, self.is_published = inception.load_inception(source, allow_pickle)
        self.model, self.device = model.to(device), device
        self.name = "Inception-v3" if self.is_published else "Inception-v3, weights of unknown origin"
        self.identity = modules_identity({"model": self.model})

    def image_features(self, images: Any, batch: int = 32) -> torch.Tensor:
        """float32 [N, 2048]."""
        ready = lambda pictures: torch.stack([inception.clean_resize(picture) for picture in pictures]).to(self.device)
        return _run(lambda pictures: self.model(ready(pictures)), images, batch, f"{self.name}: images")


def load_extractor(spec: str, *, device: Any = "cpu", local_files_only: bool = False, allow_pickle: bool = False) -> Extractor:
    """The extractor that `spec` names.

    Args:
        spec: "emoji"; "clip:NAME" or "dinov2:NAME", a folder or an id on the hub; "inception:FILE", or, with consent, "inception"
            alone for the published weights, which are downloaded.
        device: where it runs.
        local_files_only: whether to refuse downloads.
        allow_pickle: consent to unpickle Inception's published weights; everything else is safetensors.

    Raises:
        ValueError: an unknown spec, or weights of another network. FileNotFoundError, NotImplementedError: as the extractors.
        RuntimeError: it cannot be loaded, or a pickle without consent.
    """
    kind, colon, name = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if colon and not name:
        raise ValueError(f"load_extractor: {spec!r} names no model after the colon; known are {KNOWN}")
    if spec == "emoji":
        return EmojiFeatures(device)
    if kind == "clip" and name:
        return ClipFeatures(name, device, local_files_only)
    if kind == "dinov2" and name:
        return DinoFeatures(name, device, local_files_only)
    if kind == "inception":
        if not name and local_files_only and allow_pickle:
            raise RuntimeError("load_extractor: local_files_only rules out a download of Inception's weights; give inception:FILE")
        return InceptionFeatures(name or None, device, allow_pickle)
    raise ValueError(f"load_extractor: unknown extractor {spec!r}; known are {KNOWN}")


def distance_name(kind: str, extractor: Extractor) -> str:
    """What a distance may be called: "FID" and "KID" belong to Inception's published weights and preparation alone.

    Args:
        kind: "frechet", "kernel" or "cmmd", by the function of `sage.evaluation.distances`.
        extractor: of the features.

    Raises:
        ValueError: an unknown kind.
    """
    names = {"frechet": "Fréchet distance", "kernel": "kernel distance", "cmmd": "Gaussian-kernel MMD² × 1000"}
    if kind not in names:
        raise ValueError(f"distance_name: kind must be one of {', '.join(names)}, got {kind!r}")
    if isinstance(extractor, InceptionFeatures) and extractor.is_published and extractor.dim == inception.DIM and kind != "cmmd":
        return {"frechet": "FID", "kernel": "KID"}[kind]
    if kind == "cmmd" and isinstance(extractor, ClipFeatures) and extractor.is_cmmds:
        return f"CMMD ({extractor.name})"
    return f"{names[kind]} ({extractor.name})"


@torch.no_grad()
def _run(function: Callable[[list[torch.Tensor]], torch.Tensor], images: Any, batch: int, name: str) -> torch.Tensor:
    """Features of all pictures, float32 on the CPU."""
    return torch.cat([function(pictures).float().cpu() for pictures in batches(images, batch, name)])


def _pooled(output: Any) -> torch.Tensor:
    """transformers 4 gives the features themselves, 5 an output that holds them."""
    return output if torch.is_tensor(output) else output.pooler_output


def _from_hub(factory: Any, kind: str, source: str, local_files_only: bool, **options: Any) -> Any:
    """`factory.from_pretrained`, never with code from the model's folder; a folder never downloads."""
    local = Path(source).expanduser().is_dir()
    if not local and (source[0] in "./~" or "\\" in source or source.count("/") > 1):
        raise FileNotFoundError(f"{kind}: folder {source!r} does not exist")
    source = str(Path(source).expanduser()) if local else source
    try:
        return factory.from_pretrained(source, local_files_only=local or local_files_only, trust_remote_code=False, **options)
    except ImportError as error:
        raise RuntimeError(f"{kind}: {source!r} needs a package that is missing ({error}); {EXTRA}") from error
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{kind}: cannot load {source!r} (wanted a model of transformers with safetensors weights, in a folder or "
                           f"on the hub): {error}") from error


def _pretrained(kind: str, source: str, device: Any, local_files_only: bool) -> tuple[Any, Callable, str]:
    """The model in float32, what turns its pictures into its input, and its name without a path."""
    import transformers

    from sage.encoders import _without_loading_bar

    # The other backend, torchvision's, resizes otherwise; figures must not depend on whether that is installed.
    backend = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    processor = _from_hub(transformers.AutoImageProcessor, kind, source, local_files_only, **backend)
    # Fresh weights of unused heads must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]), _without_loading_bar():
        model = _from_hub(transformers.AutoModel, kind, source, local_files_only, use_safetensors=True)
    model = model.to(device, torch.float32).eval().requires_grad_(False)
    prepare = lambda pictures: processor(images=[to_pil(x) for x in pictures], return_tensors="pt")["pixel_values"].to(device)
    return model, prepare, Path(source).expanduser().resolve().name if Path(source).expanduser().is_dir() else source
