"""Pictures → measurements: features are made once per method and extractor and kept, metrics are those of `sage.evaluation`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sage.evaluation.asked import Asked
from sage.evaluation.distances import FrechetTo, KernelTo, floor, frechet_distance, kernel_distance
from sage.evaluation.diversity import distance_to, pairwise_distance, vendi_within
from sage.evaluation.features import distance_name
from sage.evaluation.folder import EvaluationFolder
from sage.evaluation.knee import Measurement
from sage.evaluation.matching import clip_scores, identification
from sage.evaluation.methods import Method
from sage.evaluation.references import References
from sage.evaluation.runner import file_names, sha256s
from sage.output import digest, slug, whole_or_nothing
from sage.prompts import InputError

__all__ = ["GUARDED", "Judge", "check_extractors"]

GUARDED = ("identification", "score", "frechet")  # of the knee; verdicts also guard diversity
# Of bootstraps, by kind of figure; Fréchet distances cost the most, and are resampled for the judging extractor alone.
RESAMPLES = {"means": 2000, "frechet": 400, "kernel": 2000}
QUICK_RESAMPLES = {"means": 1000, "frechet": 100, "kernel": 1000}
BATCH = 256  # pictures that are held at once


def check_extractors(specs: Sequence[str], device: Any) -> list[tuple[str, Any]]:
    """(spec, extractor) of each. Raises InputError for one that is unknown or cannot be loaded, or if the first knows no texts."""
    from sage.evaluation.features import load_extractor

    found = []
    for spec in specs:
        try:
            found.append((spec, load_extractor(spec, device=device)))
        except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
            raise InputError(f"--extractor {spec}: {error}") from error
    if not hasattr(found[0][1], "embed_texts"):
        raise InputError(f"--extractor {specs[0]}: the first extractor judges how prompts fit, and this one knows no texts; "
                         "name emoji or clip:NAME first.")
    return found


class Judge:
    """Measures methods.

    Args:
        asked: what was drawn.
        extractors: as `check_extractors` gives them; the first is what verdicts go by.
        references: None: no distances to real pictures.
        folder: of the run.
        resamples: of bootstraps, by kind of figure.
    """

    def __init__(self, asked: Asked, extractors: Sequence[tuple[str, Any]], references: References | None, folder: EvaluationFolder,
                 resamples: dict[str, int]):
        self.asked, self.extractors, self.references, self.folder, self.resamples = asked, extractors, references, folder, resamples
        knowing = [(spec, extractor) for spec, extractor in extractors if hasattr(extractor, "embed_texts")]
        self._texts = {spec: extractor.embed_texts(list(asked.prompts)) for spec, extractor in knowing}  # [n, C]
        self._measured: dict[tuple[str, str], dict[str, Measurement]] = {}
        self._real: dict[str, dict[str, Measurement] | None] = {}
        self._distances: dict[str, tuple[FrechetTo, KernelTo]] = {}

    def look_at_references(self) -> None:
        """Make the features of the real pictures now, so that a bad file is found before hours of drawing. Raises InputError."""
        for spec in self.names if self.references is not None else ():
            self._reference(spec)

    @property
    def names(self) -> list[str]:
        """The extractors, the judging one first."""
        return [spec for spec, _ in self.extractors]

    def titles(self) -> dict[str, dict[str, str]]:
        """Extractor → metric → what it is called."""
        return {
            spec: {
                "identification": "identification",
                "score": f"picture–caption score ({extractor.name})",
                "diversity": f"diversity in a group ({extractor.name})",
                "vendi": f"Vendi score in a group ({extractor.name})",
                "frechet": distance_name("frechet", extractor),
                "kernel": distance_name("kernel", extractor),
                "moved": f"distance to the unshared picture ({extractor.name})",
            }
            for spec, extractor in self.extractors
        }

    def measure(self, method: Method, spec: str) -> dict[str, Measurement]:
        """Metric → measurement of a method by one extractor."""
        key = (method.key, spec)
        if key not in self._measured:
            self._measured[key] = self._metrics(self._features_of(method, spec), self.asked, spec)
        return self._measured[key]

    def guards(self, method: Method) -> dict[str, Measurement]:
        """What the knee goes by."""
        measured = self.measure(method, self.names[0])
        return {name: measured[name] for name in GUARDED if name in measured}

    def real(self, spec: str) -> dict[str, Measurement] | None:
        """The real pictures as if they had been drawn; None where they are not those of the prompts, or too few groups are left."""
        if spec not in self._real:
            self._real[spec] = self._measure_real(spec)
        return self._real[spec]

    def real_groups(self) -> list[int]:
        """Numbers of the groups whose prompts all have pictures of their own: of two captions of one photograph none is the wrong one."""
        references = self.references
        if references is None or not references.images:
            return []
        numbers = range(len(self.asked.groups))
        if references.places is None:
            return list(numbers)
        return [k for k in numbers if len({references.places[row] for row in self.asked.groups[k]}) == len(self.asked.groups[k])]

    def _measure_real(self, spec: str) -> dict[str, Measurement] | None:
        kept, references = self.real_groups(), self.references
        if sum(len(self.asked.groups[k]) > 1 for k in kept) < 2:
            return None
        asked = self.asked if references.images == self.asked.images else self.asked.single()
        asked = replace(asked, groups=tuple(asked.groups[k] for k in kept), medoids=tuple(asked.medoids[k] for k in kept))
        if references.places is None:
            return self._metrics(self._features("real", references.identity, references.real, spec), asked, spec)
        return self._metrics(self._reference(spec)[list(references.places)], asked, spec, distances=False)

    def floor(self, spec: str) -> dict[str, Any] | None:
        """What real pictures have as distance from real pictures, by metric; None where too few are there to say.

        "comparable" says whether it is between sets of the sizes that methods are compared at; a Fréchet distance falls with them.
        """
        if self.references is None:
            return None
        if self.references.places is None:
            real = self.real(spec)
            about = {"what": "two draws of real pictures, as many as drawn ones", "comparable": True}
            return {name: {**about, **real[name].estimate().as_json()} for name in ("frechet", "kernel")}
        features = self._reference(spec)
        size = min(self.asked.pictures, len(features) // 2)
        if size < 2:
            return None
        what, found = f"two halves of the reference pictures, {size} in each, 10 times", {}
        for name, distance in (("frechet", frechet_distance), ("kernel", kernel_distance)):
            spread = floor(features, distance, size=size).as_json()
            found[name] = {"what": what, "comparable": False, "value": spread["mean"], "sd": spread["sd"], "n": size}
        return found

    def moved(self, method: Method, other: Method, spec: str) -> Measurement:
        """How far each picture is from that of another method with the same prompt and seed, in features."""
        ours, theirs = (self._features_of(one, spec).double() for one in (method, other))
        return Measurement((ours - theirs).norm(dim=1), self.asked.clusters(), None, self.resamples["means"])

    def moved_pixels(self, method: Method, other: Method) -> Measurement:
        """The same in pixels: root mean square difference, in levels of 0 to 255."""
        ours, theirs = _pictures(file_names(self.folder, method)), _pictures(file_names(self.folder, other))
        parts = []
        while batch := list(islice(ours, BATCH)):
            parts.append(distance_to(batch, list(islice(theirs, BATCH))).rmse)
        return Measurement(torch.cat(parts), self.asked.clusters(), None, self.resamples["means"])

    def _metrics(self, features: torch.Tensor, asked: Asked, spec: str, distances: bool = True) -> dict[str, Measurement]:
        clusters, x, means = asked.clusters(), features.double(), self.resamples["means"]
        found = {}
        if spec in self._texts:
            embeds = dict(self.extractors)[spec].embed_features(features)
            texts = self._texts[spec].repeat_interleave(asked.images, 0)
            right = identification(embeds, texts, clusters, captions=asked.picture_prompts)
            found["identification"] = Measurement(right.right.double(), right.groups, True, means)
            found["score"] = Measurement(clip_scores(embeds, texts), clusters, True, means)
        sets = asked.sets()  # counted group after group, one for each image number
        for name, figure in (("diversity", pairwise_distance), ("vendi", vendi_within)):
            per_set = figure(x, sets)
            found[name] = Measurement(per_set.values, per_set.joined(asked.images), True, means)
        if self.references is not None and distances:
            frechet, kernel = self._distances_of(spec)
            resamples = self.resamples["frechet"] if spec == self.names[0] else 0
            found["frechet"] = Measurement(lambda rows: frechet(x[rows]), clusters, False, resamples)
            found["kernel"] = Measurement(kernel.of_groups(x, clusters), clusters, False, self.resamples["kernel"])
        return found

    def _distances_of(self, spec: str) -> tuple[FrechetTo, KernelTo]:
        """Distances to the reference pictures."""
        if spec not in self._distances:
            reference = self._reference(spec).double()
            self._distances[spec] = FrechetTo(reference), KernelTo(reference)
        return self._distances[spec]

    def _reference(self, spec: str) -> torch.Tensor:
        return self._features("reference", self.references.identity, self.references.pictures, spec)

    def _features_of(self, method: Method, spec: str) -> torch.Tensor:
        files = file_names(self.folder, method)
        return self._features(method.key, digest(sha256s(self.folder, method)), lambda: _pictures(files), spec)

    def _features(self, key: str, identity: str, pictures: Any, spec: str) -> torch.Tensor:
        """float32 [N, C], from the file, if it is of these pictures and weights; else made, and written there."""
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file

        extractor = dict(self.extractors)[spec]
        about = {"pictures": identity, "extractor": extractor.identity}
        path = self.folder.path / "features" / f"{key}--{slug(spec)}-{digest(spec)[:8]}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                if file.metadata() == about:
                    return file.get_tensor("features")
        except (OSError, SafetensorError):
            pass
        features = extractor.image_features(pictures()).contiguous()
        path.parent.mkdir(exist_ok=True)
        with whole_or_nothing(path) as temporary:
            save_file({"features": features}, temporary, metadata=about)
        return features


def _pictures(files: Sequence[Path]) -> Iterator[Any]:
    from PIL import Image

    for file in files:
        with Image.open(file) as image:
            yield image.convert("RGB")

