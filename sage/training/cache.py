"""Latents and text embeddings kept on disk, so that an epoch after the first needs neither VAE nor text encoder.

    latents = LatentCache("cache", pictures, Transform(512, center_crop=True, random_flip=True), identity="sd-vae-ft-mse float32")
    latents.fill(lambda pixels: vae.encode(pixels).latent_dist.mode())
    x = latents.read(batch.rows, seed=0, epoch=batch.epoch)                            # [n, C, h, w]

    conditions = TextCache("cache", identity="clip-vit-l 77")
    conditions.fill(pictures.captions, encode_prompts)
    c = conditions.read(captions)["prompt_embeds"]                                     # [n, 77, 768]

    FOLDER/latents/3f/3f0c….safetensors        one entry; safetensors only, nothing in a cache is ever executed

An entry's name is a sha256 of what decides it: the bytes of the picture and the settings of the transform, or the caption; and the
identity of the encoder, which the caller gives and changes whenever the encoder would give something else (other weights, dtype, scaling,
samples instead of modes; `sage.encoder_identity` makes one of a text encoder). Entries are written whole or not at all, by any number of
processes, and carry a checksum: one that is damaged or was put there by something else is made again, with a warning. Nothing is kept in
memory beyond the batch in hand and 32 bytes per picture.

A mirrored picture has other latents, so with `random_flip` both are kept (twice the disk). Random crops have too many variants: refused.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from sage.output import write_atomic
from sage.plan_checks import integer, texts
from sage.training.data import TrainingSet, Transform

__all__ = ["LatentCache", "TensorStore", "TextCache"]

FORMAT = "sage-diffusion training cache 1"  # raise it whenever the same names would stand for other tensors

Tensors = dict[str, torch.Tensor]


class TensorStore:
    """Named tensors in files that are found by content.

    Args:
        folder: where entries are kept; made when the first is written.
        kind: subfolder of this kind of entry.
        identity: of the encoder that makes the tensors.

    Attributes:
        written: entries that this object has written.
    """

    def __init__(self, folder: str | Path, kind: str, identity: str):
        if not isinstance(identity, str) or not identity.strip():
            raise ValueError(f"cache of {kind}: identity must be a text that tells the encoder from others, got {identity!r}")
        self.folder, self.kind, self.identity, self.written = Path(folder).expanduser() / kind, kind, identity, 0

    def key(self, *parts: str) -> str:
        """sha256 (hex) of what decides an entry."""
        return hashlib.sha256(json.dumps([FORMAT, self.kind, self.identity, *parts]).encode()).hexdigest()

    def path(self, key: str) -> Path:
        """The file of an entry."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> Tensors | None:
        """An entry, on the CPU; None if it is not there, or, with a warning, if it is damaged."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            return self._damaged(path, str(error))
        if about.get("format") != FORMAT or about.get("key") != key:
            return self._damaged(path, "it is not an entry of this name")
        if about.get("sha256") != _checksum(tensors):
            return self._damaged(path, "its checksum differs")
        return tensors

    def _damaged(self, path: Path, why: str) -> None:
        warnings.warn(f"cache of {self.kind}: {path} is damaged ({why}) and is made again", stacklevel=2)

    def write(self, key: str, tensors: Tensors) -> None:
        """Keep an entry of contiguous CPU tensors. Raises RuntimeError if the disk does not take it."""
        path = self.path(key)
        about = {"format": FORMAT, "key": key, "sha256": _checksum(tensors)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save(tensors, about))
        except OSError as error:
            raise RuntimeError(f"cache of {self.kind}: {path} cannot be written ({error.strerror or error}); make room, or train without a "
                               "cache") from error  # fmt: skip
        self.written += 1

    def read_all(self, keys: Sequence[str], names: Sequence[str], make: Callable[[list[int]], Tensors] | None) -> Tensors:
        """Entries stacked, those that are missing made first.

        Args:
            keys: of n entries; they may repeat.
            names: what messages call each of them.
            make: positions of m missing entries → their tensors, each [m, …]; None: they are refused.

        Returns:
            Each named tensor [n, …].
        """
        found = {key: self.read(key) for key in dict.fromkeys(keys)}
        missing = [keys.index(key) for key, tensors in found.items() if tensors is None]
        if missing and make is None:
            raise RuntimeError(f"cache of {self.kind}: {len(missing)} of {len(found)} entries are missing or damaged, the first of "
                               f"{names[missing[0]]}; fill the cache again, or give encode")  # fmt: skip
        if missing:
            for position, tensors in zip(missing, self._checked(make(missing), [names[position] for position in missing]), strict=True):
                self.write(keys[position], tensors)
                found[keys[position]] = tensors
        facts = {key: {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} for key, tensors in found.items()}
        odd = next((key for key in keys if facts[key] != facts[keys[0]]), None)
        if odd is not None:
            raise RuntimeError(f"cache of {self.kind}: entries differ, {facts[keys[0]]} for {names[0]} but {facts[odd]} for "
                               f"{names[keys.index(odd)]}; different encoders had the identity {self.identity!r}: use another")  # fmt: skip
        return {name: torch.stack([found[key][name] for key in keys]) for name in facts[keys[0]]}

    def _checked(self, made: Tensors, names: list[str]) -> list[Tensors]:
        """What an encoder made, one entry after the other."""
        if not isinstance(made, dict) or not made or not all(isinstance(tensor, torch.Tensor) for tensor in made.values()):
            raise TypeError(f"cache of {self.kind}: encode must return tensors by name, got {type(made).__name__}")
        for name, tensor in made.items():
            if tensor.ndim == 0 or len(tensor) != len(names):
                raise ValueError(f"cache of {self.kind}: encode must return {name} as [{len(names)}, …], got {list(tensor.shape)}")
        rows = [{name: tensor[i].detach().cpu().contiguous().clone() for name, tensor in made.items()} for i in range(len(names))]
        for tensors, entry in zip(rows, names):
            bad = next((name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()), None)
            if bad is not None:
                raise RuntimeError(f"cache of {self.kind}: encode gave {bad} that are not finite for {entry}; it may need float32")
        return rows


class LatentCache:
    """Latents of a training set.

    Args:
        folder: may be shared by any number of training sets and encoders.
        training_set: the pictures.
        transform: with `center_crop`; with `random_flip` the latents of both sides are kept.
        identity: tells the VAE, and what is taken from it, from others.

    Raises:
        ValueError: the transform crops at random, or the identity is empty.
    """

    def __init__(self, folder: str | Path, training_set: TrainingSet, transform: Transform, identity: str):
        if not transform.center_crop:
            raise ValueError("LatentCache: transform crops at random, so that no two epochs see the same picture; use center_crop=True, or "
                             "train without a cache of latents")  # fmt: skip
        self.store = TensorStore(folder, "latents", identity)
        self.training_set, self.transform = training_set, transform
        self._digests: dict[int, bytes] = {}

    def fill(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        batch_size: int = 8,
        rows: Iterable[int] | None = None,
        progress: bool = True,
    ) -> int:
        """Make what is missing, a batch at a time.

        Args:
            encode: float32 [n, 3, R, R] in [-1, 1] on the CPU → [n, …] of any dtype, on any device; called without gradients.
            batch_size: most pictures at once.
            rows: which pictures; None: all. Give each process its part.
            progress: show a bar, if standard error is a terminal.

        Returns:
            How many entries were made.
        """
        batch_size = integer(batch_size, "LatentCache.fill: batch_size", 1)
        rows = list(range(len(self.training_set)) if rows is None else rows)
        before = self.store.written
        for first in tqdm(range(0, len(rows), batch_size), desc="encoding pictures", unit="batch", disable=None if progress else True):
            for flip in (False, True) if self.transform.random_flip else (False,):
                self._read([(row, flip) for row in rows[first : first + batch_size]], encode)
        return self.store.written - before

    def read(
        self, rows: Sequence[int], seed: int, epoch: int, encode: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The latents of some pictures as the transform has them in an epoch.

        Args:
            rows: n pictures.
            seed, epoch: decide who is mirrored, as in `Transform`.
            encode: makes latents that are missing or damaged; None: they are refused with RuntimeError.

        Returns:
            [n, …] on the CPU.
        """
        return self._read([(row, self.transform.flipped(seed, epoch, row)) for row in rows], encode)

    def _read(self, wanted: list[tuple[int, bool]], encode: Callable | None) -> torch.Tensor:
        @torch.no_grad()
        def make(positions: list[int]) -> Tensors:
            pictures = ((self.training_set.picture(row), flip) for row, flip in (wanted[position] for position in positions))
            return {"latents": encode(torch.stack([self.transform.centred(picture, flip) for picture, flip in pictures]))}

        keys = [self._key(row, flip) for row, flip in wanted]
        names = [self.training_set.where(row) for row, _ in wanted]
        return self.store.read_all(keys, names, None if encode is None else make)["latents"]

    def _key(self, row: int, flip: bool) -> str:
        if row not in self._digests:  # pictures are read once for their names
            self._digests[row] = bytes.fromhex(self.training_set.digest(row))
        settings = f"{self.transform.resolution} {self.transform.image_interpolation_mode} centre {'mirrored' if flip else 'plain'}"
        return self.store.key(self._digests[row].hex(), settings)


class TextCache:
    """Text embeddings by caption.

    Args:
        folder: may be shared with anything else that is cached here.
        identity: tells the text encoder, its tokenizer and its settings from others.

    Raises:
        ValueError: the identity is empty.
    """

    def __init__(self, folder: str | Path, identity: str):
        self.store = TensorStore(folder, "text", identity)

    def fill(
        self, captions: Sequence[str], encode: Callable[[list[str]], Tensors], batch_size: int = 32, progress: bool = True
    ) -> int:
        """Make what is missing, a batch at a time.

        Args:
            captions: may repeat; "" is a caption like others.
            encode: n distinct captions → tensors by name, each [n, …]; called without gradients.
            batch_size: most captions at once.
            progress: show a bar, if standard error is a terminal.

        Returns:
            How many entries were made.
        """
        batch_size = integer(batch_size, "TextCache.fill: batch_size", 1)
        distinct = list(dict.fromkeys(texts(captions, "TextCache.fill: captions")))
        before = self.store.written
        for first in tqdm(range(0, len(distinct), batch_size), desc="encoding captions", unit="batch", disable=None if progress else True):
            self.read(distinct[first : first + batch_size], encode)
        return self.store.written - before

    def read(self, captions: Sequence[str], encode: Callable[[list[str]], Tensors] | None = None) -> Tensors:
        """The embeddings of n captions, tensors by name, each [n, …] on the CPU.

        Args:
            captions: may repeat.
            encode: makes embeddings that are missing or damaged; None: they are refused with RuntimeError.
        """
        captions = texts(captions, "TextCache.read: captions")

        @torch.no_grad()
        def make(positions: list[int]) -> Tensors:
            return encode([captions[position] for position in positions])

        keys = [self.store.key(caption) for caption in captions]
        names = [f"the caption {caption!r:.80}" for caption in captions]
        return self.store.read_all(keys, names, None if encode is None else make)


def _checksum(tensors: Tensors) -> str:
    """sha256 (hex) of the names, kinds and bits of contiguous CPU tensors."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()
