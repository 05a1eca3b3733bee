"""What a pipeline's call asks for: how many pictures, of which prompts, beginning from which images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sage.embed import Embeddings
from sage.families import CONDITIONS, IMAGES_PER_PROMPT, INIT_IMAGES, INIT_VIDEOS, REFERENCES
from sage.plans import plan_prompts
from sage.plan import Node, SharingPlan


class Request:
    """The pictures that a call asks for, read off its arguments.

    Attributes:
        prompts: n texts; None when the call gives none.
        images: pictures of each prompt.
        pictures: [n · images] what identifies the images that a picture begins from; empty when all begin from the same.
    """

    def __init__(self, pipe, given: Mapping[str, Any]):
        prompts = given.get("prompt")
        self.prompts = [prompts] if isinstance(prompts, str) else None if prompts is None else list(prompts)
        self.images = next((given[name] for name in IMAGES_PER_PROMPT if given.get(name)), 1)
        self.count = len(self.prompts) if self.prompts is not None else _rows(given)  # n; None when nothing tells
        self._identities = {name: _identities(given[name]) for name in _init_images(pipe, given)}
        self.pictures = self._begin_from((self.count or 0) * self.images)

    def _begin_from(self, count: int) -> list[tuple]:
        """[count]: what identifies the images that each picture begins from; empty when all begin from the same."""
        pictures = list(zip(*(_of_pictures(identities, count) for identities in self._identities.values())))
        return pictures if len(set(pictures)) > 1 else []

    def check(self, plan: SharingPlan) -> None:
        """Refuse a plan that was not made for this call.

        Raises:
            ValueError: other prompts, another number of pictures, or a group whose members begin from different images.
        """
        planned = [leaf.prompt for leaf in plan.leaves]
        if self.prompts is not None:
            asked = [prompt for prompt in self.prompts for _ in range(self.images)]
            if asked != planned:
                raise ValueError(mismatch(asked, planned))
        elif self.count is not None and self.count * self.images != len(planned):
            raise ValueError(f"plan is for {len(planned)} pictures, but the call asks for {self.count * self.images}")
        pictures = self._begin_from(len(planned))
        for members in (node.members for node in plan.trunks() if pictures):
            for member in members:
                pairs = zip(self._identities, pictures[members[0]], pictures[member])
                differing = [name for name, a, b in pairs if a != b]
                if differing:
                    raise ValueError(
                        f"{differing[0]} differs between pictures {members[0]} and {member}, which the plan puts into one group: "
                        "sharing would begin both from one of them; group only pictures that have the same"
                    )

    def plan(self, embeddings: Embeddings, options: dict) -> SharingPlan:
        """The flat plan of this call; only prompts that begin from the same image share."""
        options = dict(images_per_prompt=self.images, **options)
        of_prompts = [tuple(self.pictures[i * self.images : (i + 1) * self.images]) for i in range(len(self.prompts))]
        kinds = list(dict.fromkeys(of_prompts))
        if len(kinds) <= 1:
            return plan_prompts(self.prompts, embeddings, **options)
        whole = plan_prompts(self.prompts, embeddings, **{**options, "share": 0.0})
        roots: list[Node] = []
        for kind in kinds:
            of_kind = [i for i, pictures in enumerate(of_prompts) if pictures == kind]
            part = plan_prompts([self.prompts[i] for i in of_kind], _some(embeddings, of_kind), **options)
            leaves = [i * self.images + k for i in of_kind for k in range(self.images)]
            roots += [root.renamed(leaves) for root in part.roots]
        return replace(whole, roots=tuple(roots))


def mismatch(asked: list[str], planned: list[str]) -> str:
    """How the prompts of a call differ from those that a plan was made for."""
    if len(asked) != len(planned):
        return f"plan is for {len(planned)} pictures, but the call asks for {len(asked)} (prompts × images per prompt)"
    i = next(i for i, (a, p) in enumerate(zip(asked, planned)) if a != p)
    return f"plan was made for other prompts: picture {i} is planned as {planned[i]!r}, but the call asks for {asked[i]!r}"


def _rows(given: Mapping[str, Any]) -> int | None:
    """Rows of the call's embeddings."""
    value = next((given[name] for name in CONDITIONS if given.get(name) is not None), None)
    return None if value is None else len(value)


def _some(embeddings: Embeddings, chosen: Sequence[int]) -> Embeddings:
    return replace(embeddings, vectors=embeddings.vectors[list(chosen)], unknown=embeddings.unknown[list(chosen)])


def _init_images(pipe, given: Mapping[str, Any]) -> list[str]:
    """The arguments of this call that pictures begin from and that may hold one image for each."""
    names = [name for name in (*INIT_IMAGES, *INIT_VIDEOS) if given.get(name) is not None]
    if type(pipe).__name__.startswith(REFERENCES):
        names = []  # several images for all pictures together
    elif hasattr(getattr(pipe, "controlnet", None), "nets"):  # several ControlNets: a list has an image for each of them
        names = [name for name in names if name != ("control_image" if "control_image" in given else "image")]
    return [name for name in names if _is_batch(given[name], name in INIT_VIDEOS)]


def _is_batch(value: Any, video: bool) -> bool:
    """Whether an argument holds several images (or videos), rather than one."""
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return value.ndim >= (5 if video else 4) and len(value) > 1
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        return False
    return not video or isinstance(value[0], (list, tuple)) or getattr(value[0], "ndim", 0) >= 4


def _of_pictures(identities: list[str], count: int) -> list[tuple[str, ...]]:
    """[count]: which image each picture begins from, where pipelines either repeat the list or repeat its items.

    Two pictures are alike only if they are in both layouts; where the numbers do not fit, none are.
    """
    images = len(identities)
    if count % images:
        return [(str(picture),) for picture in range(count)]
    return [(identities[picture % images], identities[picture * images // count]) for picture in range(count)]


def _identities(images: Any) -> list[str]:
    """A text for each image, equal where the images are."""
    return [_identity(image) for image in images]


def _identity(image: Any) -> str:
    """A digest of an image's content, whether PIL, array, tensor or a list of them."""
    if isinstance(image, (list, tuple)):
        return "/".join(map(_identity, image))
    if torch.is_tensor(image):
        image = image.detach().float().cpu().numpy()
    array = np.ascontiguousarray(image)
    return f"{array.shape}{array.dtype}{hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()}"
