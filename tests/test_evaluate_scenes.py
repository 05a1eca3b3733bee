"""How the embedded model is judged: whole groups are resampled, and one emoji is no other than several of it."""

import numpy as np
import pytest
import torch

from sage.emoji import evaluate
from sage.emoji.scenes import Scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def two_groups(monkeypatch):
    """Captions 0, 1 and 2, 3 share a group; 4 is alone."""
    monkeypatch.setattr(evaluate, "embed_prompts", lambda captions: type("Embedded", (), {"vectors": np.eye(5)}))
    monkeypatch.setattr(evaluate, "group", lambda vectors, captions, similarity: [[0, 1], [2, 3], [4]])


class Scorer:
    """Embeds pictures and texts as what their first pixel, and their first letter, say."""

    def embed_images(self, pictures):
        return torch.nn.functional.one_hot(pictures[:, 0, 0, 0].long(), 5).double()

    def image_features(self, pictures):
        return pictures.flatten(1).double()


def test_images_of_a_prompt_are_no_independent_groups(two_groups):
    clusters, sets = evaluate.picture_groups(["a"] * 5, 3)
    assert clusters == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert sets == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    captions = [str(row) for row in range(5) for _ in range(3)]
    pictures = torch.tensor([int(caption) for caption in captions], dtype=torch.uint8)[:, None, None, None].expand(15, 3, 8, 8).clone()
    pictures[0] = 1  # one of caption 0 shows caption 1
    texts = torch.nn.functional.one_hot(torch.tensor([int(caption) for caption in captions]), 5).double()
    found = evaluate._figures(Scorer(), pictures, texts, captions, (clusters, sets))
    assert found["identification"]["value"] == pytest.approx(11 / 12, abs=1e-4) and found["chance"] == 0.5
    assert {found[name]["groups"] for name in ("identification", "score", "diversity", "layout")} == {2}
    assert found["identification"]["n"] == found["score"]["n"] == 12 and found["diversity"]["n"] == 6


def test_several_of_an_emoji_are_no_other_emoji():
    content = evaluate._content
    assert content(Scene(("mushroom", "mushroom"), "count")) == content(Scene(("mushroom",)))
    assert content(Scene(("rose", "fox"), "and")) == content(Scene(("fox", "rose"), "left of")) != content(Scene(("fox",)))
