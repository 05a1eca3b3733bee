"""Rows under a partition: each rule, by hand, and the walk through arguments and outputs."""

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from sage.denoiser import Pieces
from sage.families import RULES
from sage.rows import Rows, map_outputs, map_rows

MEMBERS, REPRESENTATIVES = ((0, 2), (1,), (3, 4)), np.array([2, 1, 3])
B, R = 5, 3


@pytest.fixture
def rows():
    return Rows(MEMBERS, REPRESENTATIVES, B)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_every_rule(rows, copies):
    x = draw(copies * B, 4, 6)
    mask = (draw(copies * B, 4, seed=1) > 0).long()
    mask[0, 1] = mask[2, 1] = 0  # a token that counts for no member of the first node
    for c in range(copies):
        for node, members in enumerate(MEMBERS):
            at, leaves = c * R + node, [c * B + leaf for leaf in members]
            assert torch.equal(rows.reduce(x, "representative", copies)[at], x[c * B + REPRESENTATIVES[node]])
            assert torch.allclose(rows.reduce(x, "mean", copies)[at], x[leaves].mean(0), atol=1e-6)
            assert torch.equal(rows.reduce(mask, "union", copies)[at], mask[leaves].amax(0))
            for token in range(4):
                on = [leaf for leaf in leaves if mask[leaf, token]] or leaves
                got = rows.reduce(x, "masked mean", copies, mask)[at, token]
                assert torch.allclose(got, x[on, token].mean(0), atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "masked mean"])
def test_the_mean_of_equal_rows_is_that_row_exactly(rows, how):
    x = draw(1, 3, 50).expand(B, 3, 50).contiguous()
    mask = torch.tensor([[1, 1, 0]] * 2 + [[1, 0, 0]] * 3)
    assert torch.equal(rows.reduce(x, how, 1, mask), x[:R])


def test_ragged_lists_are_averaged_over_those_that_reach_so_far(rows):
    lists = [draw(length, 2, seed=length) for length in (3, 1, 5, 2, 2)]
    got = rows.reduce(lists, "masked mean", 1)
    assert [len(row) for row in got] == [5, 1, 2]
    assert torch.allclose(got[0][:3], (lists[0] + lists[2][:3]) / 2) and torch.equal(got[0][3:], lists[2][3:])
    assert got[1] is lists[1] and torch.allclose(got[2], (lists[3] + lists[4]) / 2)


def test_expanding_gives_every_leaf_its_nodes_row(rows):
    x = draw(2 * R, 3)
    assert torch.equal(rows.expand(x, 2), x[[0, 1, 0, 2, 2, 3, 4, 3, 5, 5]])
    assert rows.expand(list(x), 2)[7].equal(x[3])


def test_alike_names_two_leaves_that_differ(rows):
    x = torch.tensor([1.0, 2.0, 1.0, 3.0, 3.0])
    assert rows.alike(x, 1) is None
    assert rows.alike(torch.cat([x, torch.arange(5.0)]), 2) == (0, 2)


def test_arguments_are_walked_by_name(rows):
    x, mask = draw(B, 4, 6), torch.ones(B, 4)
    seen = []
    given = {
        "encoder_hidden_states": x,
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"text_embeds": draw(B, 3), "image_embeds": [draw(B, 1, 2), draw(B, 2, 2)]},
        "controlnet_block_samples": {0: draw(B, 2), 4: draw(B, 2)},  # by place in the network
        "img_ids": draw(B, 3),
        "encoder_hidden_states_llama3": draw(2, B, 3),
        "timestep": torch.tensor(3.0),
        "guidance": torch.ones(1),
        "scale": 0.5,
    }
    got = map_rows(given, B, RULES, lambda name, value, how, given_mask: seen.append((name, how, given_mask is mask)) or value[:R])
    assert seen == [
        ("encoder_hidden_states", "masked mean", True),
        ("encoder_attention_mask", "union", False),
        ("text_embeds", "mean", False),
        ("image_embeds", "mean", False),
        ("image_embeds", "mean", False),
        ("controlnet_block_samples", "alike", False),
        ("controlnet_block_samples", "alike", False),
        ("encoder_hidden_states_llama3", "mean", False),
    ]
    assert got["encoder_hidden_states_llama3"].shape == (2, R, 3) and got["controlnet_block_samples"][4].shape == (R, 2)
    assert got["img_ids"] is given["img_ids"] and got["timestep"] is given["timestep"] and got["guidance"] is given["guidance"]


def test_sizes_that_are_no_rows_are_passed_on(rows):
    """Qwen-Image: a list of a size per prompt, or per latent."""
    sizes = [[(1, 4, 4)]] * B
    apply = lambda name, value, how, mask: rows.reduce(value, how, 1)  # noqa: E731
    assert map_rows({"img_shapes": sizes}, B, RULES, apply)["img_shapes"] == sizes[:R]
    assert map_rows({"img_shapes": sizes[:2]}, B, RULES, apply)["img_shapes"] == sizes[:2]


def test_lists_of_other_things_are_rows_too(rows):
    """Captions, say: an entry per latent needs a rule, and one that does not calculate."""
    given = {"captions": list("abcde")}
    with pytest.raises(ValueError, match="argument 'captions' has 5 rows, one per latent, and no rule"):
        map_rows(given, B, RULES, None)
    with pytest.raises(ValueError, match="argument 'numbers' has 5 rows, one per latent, and no rule"):
        map_rows({"numbers": np.arange(5)}, B, RULES, None)
    apply = lambda name, value, how, mask: rows.reduce(value, how, 1)  # noqa: E731
    assert map_rows(given, B, RULES | {"captions": "representative"}, apply) == {"captions": ["c", "b", "d"]}
    with pytest.raises(ValueError, match='a list of str cannot be reduced by "mean"; use "alike" or "representative"'):
        map_rows(given, B, RULES | {"captions": "mean"}, apply)
    with pytest.raises(ValueError, match="'numbers' must be a torch tensor"):
        map_rows({"numbers": np.arange(5)}, B, RULES | {"numbers": "mean"}, apply)
    assert map_rows({"names": ["x", "y"], "nothing": [None] * B}, B, RULES, apply) == {"names": ["x", "y"], "nothing": [None] * B}


def test_outputs_of_every_kind_are_mapped():
    x = draw(4, 2)
    for output in (x, (x,), [x, [x]], {3: x}, Transformer2DModelOutput(sample=x)):
        mapped = map_outputs([output, output], torch.cat)
        assert type(mapped) is type(output)
    assert map_outputs([([x, x],)], lambda parts: parts[0][::-1], row_lists=True)[0][0] is x


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 9])
def test_pieces_give_what_the_whole_gives(most, copies, padded):
    """A denoiser that looks at whole blocks of guidance copies cannot tell pieces from the whole."""
    nodes = 7
    x = draw(copies * nodes, 3)

    def denoise(x):
        blocks = x.unflatten(0, (copies, -1))
        return (blocks - blocks.mean(0, keepdim=True)).flatten(0, 1)

    pieces = Pieces(nodes, copies, most, padded)
    cut = [pieces.cut(number, {"sample": x, "guidance": torch.ones(1)}, RULES) for number in range(len(pieces.sizes))]
    assert all(piece["guidance"].shape == (1,) for piece in cut)
    outputs = [denoise(piece["sample"]) for piece in cut]
    assert max(len(output) for output in outputs) <= copies * most
    assert torch.allclose(pieces.join(outputs, row_lists=False), denoise(x), atol=1e-6)
