"""Scenes: what captions say, what pictures show, and the prompts that quality is measured on."""

import numpy as np
import pytest
import torch

import sage
import sage.emoji
from sage.emoji import benchmark_scenes, scenes
from sage.emoji.scenes import GROUNDS, RELATIONS, Scene


@pytest.fixture(scope="module")
def composer():
    return sage.emoji.load_composer()


def picture(composer, scene, seed=0):
    """[3, 32, 32] in [0, 1]."""
    return (composer([scene], torch.Generator().manual_seed(seed))[0] + 1) / 2


@pytest.mark.parametrize(("scene", "caption"), [
    (Scene(("fox",), still=True), "fox"),
    (Scene(("fox",)), "scene with a fox"),
    (Scene(("unicorn",), ground="orange"), "a unicorn on an orange background"),
    (Scene(("owl", "rose"), "left of", "blue"), "an owl left of a rose on a blue background"),
    (Scene(("fox", "rose"), "above"), "scene with a fox above a rose"),
    (Scene(("fox", "rose", "key"), "and"), "scene with a fox, a rose and a key"),
    (Scene(("fox", "french fries"), "and", "red"), "a fox and french fries on a red background"),
    (Scene(("fox", "fox"), "count", "pink"), "two foxes on a pink background"),
    (Scene(("wolf",) * 3, "count"), "scene with three wolves"),
])
def test_captions_say_what_a_scene_holds(scene, caption):
    assert scene.caption == caption


@pytest.mark.parametrize(("name", "several"), [
    ("fox", "foxes"), ("cat face", "cat faces"), ("strawberry", "strawberries"), ("key", "keys"), ("snowman", "snowmen"),
    ("flag of France", "flags of France"), ("face with tears of joy", "faces with tears of joy"), ("ear of corn", "ears of corn"),
    ("birthday cake", "birthday cakes"), ("bus", "buses"), ("volcano", "volcanoes"), ("octopus", "octopuses"),
])
def test_plurals(name, several):
    assert scenes.plural(name) == several


def test_scenes_are_reproducible_and_captions_distinct():
    names = scenes.names()
    first, again, other = (scenes.draw_scenes(names, 200, seed) for seed in (3, 3, 4))
    assert first == again != other
    assert len({scene.caption for scene in first}) == 200
    assert {scene.relation for scene in scenes.draw_scenes(names, 400, 0)} == set(RELATIONS)
    assert any(scene.still for scene in scenes.draw_scenes(names, 100, 0, stills=0.5))


def test_more_captions_than_there_are_is_refused():
    with pytest.raises(ValueError, match="found .*ask for fewer"):
        scenes.draw_scenes(["fox"], 50, 0, stills=1.0)


def test_no_caption_is_cut_by_the_pipeline():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sage.emoji.model_path() / "tokenizer", local_files_only=True)
    captions = [scene.caption for scene in scenes.draw_scenes(scenes.names(), 3000, 1)]
    assert max(len(ids) for ids in tokenizer(captions)["input_ids"]) <= tokenizer.model_max_length == 24


def test_pictures_are_of_their_seed_and_layout_is_open(composer):
    scene = Scene(("red apple",), ground="blue")
    first, again, other = (picture(composer, scene, seed) for seed in (0, 0, 1))
    assert first.shape == (3, 32, 32) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    # Where the apple is: the pixels that are redder than the ground is blue.
    centres = []
    for seed in range(40):
        red = picture(composer, scene, seed)
        weight = (red[0] - red[2]).clamp(min=0.2) - 0.2
        centres.append((weight.sum(0) * torch.arange(32)).sum() / weight.sum())
    assert torch.stack(centres).std() > 2  # [px]


def test_a_still_is_centred_on_white_whatever_the_seed(composer):
    still = Scene(("fox",), still=True)
    assert torch.equal(picture(composer, still, 0), picture(composer, still, 1))
    assert torch.equal(picture(composer, still)[:, 0, 0], torch.ones(3))


@pytest.mark.parametrize("ground", GROUNDS)
def test_the_ground_has_the_colour_that_is_named(composer, ground):
    def distance(other):
        corners = torch.stack([picture(composer, Scene(("key",), ground=ground), seed)[:, 0, 0] for seed in range(20)])
        return (corners - torch.tensor(GROUNDS[other]) / 255).square().sum(1).mean()

    assert min(GROUNDS, key=distance) == ground


@pytest.mark.parametrize(("relation", "axis"), [("left of", 2), ("above", 1)])
def test_relations_hold_in_every_picture(composer, relation, axis):
    """A red heart and a green one, told apart by colour."""
    scene = Scene(("red heart", "green heart"), relation, "gray")
    place = torch.arange(32).reshape([-1 if dim == axis else 1 for dim in (1, 2)])
    for seed in range(30):
        shown = picture(composer, scene, seed)
        centre = lambda weight: (weight * place).sum() / weight.sum()
        red, green = (shown[0] - shown[1]).clamp(min=0.3) - 0.3, (shown[1] - shown[0]).clamp(min=0.2) - 0.2
        assert centre(red) < centre(green) - 6  # [px]


def test_two_look_like_two(composer):
    """The share of the picture that two take is more than half of one alone, and nothing of them is missing."""
    area = lambda scene: torch.stack([(picture(composer, scene, k) - picture(composer, scene, k)[:, :1, :1]).abs().amax(0) > 0.3
                                      for k in range(40)]).float().mean()
    one, two = area(Scene(("skull",), ground="purple")), area(Scene(("skull", "skull"), "count", "purple"))
    assert 0.4 * one < two < 1.2 * one


def test_benchmark_holds_whole_groups_of_what_was_trained_on_and_of_what_was_not():
    held_out = scenes.held_out_names()
    trained, unknown = sage.emoji.benchmark(), sage.emoji.benchmark(held_out=True)
    assert len(trained) == 320 and len(unknown) >= 30
    assert not any(held_out & set(scene.names) for scene in trained)
    assert all(held_out & set(scene.names) for scene in unknown)
    captions = [scene.caption for scene in trained]
    assert len(set(captions)) == len(captions)
    sizes = [len(group) for group in sage.group(sage.embed_prompts(captions).vectors, captions)]
    assert np.mean(sizes) > 2.3 and sizes.count(1) < 0.1 * len(captions)


def test_held_out_names_are_whole_groups_of_alike_names():
    names, held_out = scenes.names(), scenes.held_out_names()
    groups = [{names[i] for i in members} for members in sage.group(sage.embed_prompts(names).vectors, names) if len(members) > 1]
    touched = [group for group in groups if group & held_out]
    assert held_out <= set(names) and set().union(*touched) == held_out
    assert len(touched) >= 0.1 * len(groups)


def test_benchmark_file_is_what_the_command_writes():
    rows = benchmark_scenes.draw_benchmark(scenes.names(), scenes.held_out_names())
    assert [scene for scene, rare in rows if not rare] == sage.emoji.benchmark()
    assert [scene for scene, rare in rows if rare] == sage.emoji.benchmark(held_out=True)


def test_real_pictures_keep_the_images_of_a_scene_together():
    some = sage.emoji.benchmark()[:3]
    pictures = sage.emoji.real_pictures(some, images_per_prompt=2, seed=5)
    assert pictures.shape == (6, 3, 32, 32) and pictures.dtype == torch.uint8
    assert torch.equal(pictures, sage.emoji.real_pictures(some, images_per_prompt=2, seed=5))
    assert not torch.equal(pictures, sage.emoji.real_pictures(some, images_per_prompt=2, seed=6))


def test_sprites_survive_the_file(tmp_path):
    rgba = torch.randint(0, 256, (2, 4, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    benchmark_scenes.save_sprites(rgba, tmp_path / "sprites.webp")
    again = benchmark_scenes.load_sprites(tmp_path / "sprites.webp", 2)
    seen = rgba[:, 3:] > 0
    assert torch.equal(again[:, 3], rgba[:, 3]) and torch.equal(again * seen, rgba * seen)
    with pytest.raises(RuntimeError, match="wanted 40"):
        benchmark_scenes.load_sprites(tmp_path / "sprites.webp", 40)
