"""What a pipeline's call asks for: how many pictures, of which prompts, beginning from which images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sage.embed import Embeddings
from sage.families import CONDITIONS, IMAGES_PER_PROMPT, INIT_IMAGES
from sage.grouping import plan_prompts
from sage.plan import Node, SharingPlan


class Request:
    """The pictures that a call asks for, read off its arguments.

    Attributes:
        prompts: n texts; None when the call gives embeddings.
        images: pictures of each prompt.
        pictures: [n] what identifies the images that a prompt's pictures begin from; all equal when there are none.
    """

    def __init__(self, pipe, given: Mapping[str, Any]):
        prompts = given.get("prompt")
        self.prompts = [prompts] if isinstance(prompts, str) else None if prompts is None else list(prompts)
        self.images = next((given[name] for name in IMAGES_PER_PROMPT if given.get(name)), 1)
        self.count = len(self.prompts) if self.prompts is not None else _rows(given)  # n; None when nothing tells
        multi = hasattr(getattr(pipe, "controlnet", None), "nets")  # several ControlNets: a list of images is one for each of them
        names = [] if multi or self.count is None else INIT_IMAGES
        keys = [_identities(given.get(name), self.count) for name in names]
        self.pictures = list(zip(*keys)) if keys else []

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
        for members in (root.members for root in plan.roots if self.pictures and root.until > 0):
            first = self.pictures[members[0] // self.images]
            for member in members:
                differing = [n for n, a, b in zip(INIT_IMAGES, first, self.pictures[member // self.images]) if a != b]
                if differing:
                    raise ValueError(
                        f"{differing[0]} differs between pictures {members[0]} and {member}, which the plan puts into one group: "
                        "sharing would begin both from one of them; group only pictures that have the same"
                    )

    def plan(self, embeddings: Embeddings, options: dict) -> SharingPlan:
        """The flat plan of this call; only prompts that begin from the same image share."""
        options = dict(images_per_prompt=self.images, **options)
        kinds = sorted(set(self.pictures), key=self.pictures.index)
        if len(kinds) <= 1:
            return plan_prompts(self.prompts, embeddings, **options)
        whole = plan_prompts(self.prompts, embeddings, **{**options, "share": 0.0})
        roots: list[Node] = []
        for kind in kinds:
            of_kind = [i for i, picture in enumerate(self.pictures) if picture == kind]
            part = plan_prompts([self.prompts[i] for i in of_kind], _some(embeddings, of_kind), **options)
            leaves = [i * self.images + k for i in of_kind for k in range(self.images)]
            roots += [_moved(root, leaves) for root in part.roots]
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


def _moved(node: Node, leaves: Sequence[int]) -> Node:
    """The node with leaf i renamed to leaves[i]."""
    members = tuple(leaves[member] for member in node.members)
    return Node(members, leaves[node.representative], node.until, tuple(_moved(child, leaves) for child in node.children))


def _identities(value: Any, count: int) -> list[str]:
    """[n]: a text for each prompt's image, equal where the images are; all "" where there is one image for all, or none."""
    rows = torch.is_tensor(value) or isinstance(value, np.ndarray)
    per_prompt = isinstance(value, (list, tuple)) or (rows and value.ndim >= 4)
    if not per_prompt or len(value) != count:
        return [""] * count
    return [_identity(item) for item in value]


def _identity(image: Any) -> str:
    """A digest of an image's content, whether PIL, array, tensor or a list of them."""
    if isinstance(image, (list, tuple)):
        return "/".join(map(_identity, image))
    if torch.is_tensor(image):
        image = image.detach().float().cpu().numpy()
    array = np.ascontiguousarray(image)
    return f"{array.shape}{array.dtype}{hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()}"
