"""Scenes: one to three emoji at random place and size on a coloured ground, and what one says of them.

A caption says what is there and mostly not where, so many pictures fit it: layout is open, as in photographs. Sizes are two, and places
lie on the grid of the denoiser's coarsest features, so that a small network learns to draw sharply in an hour. The names alone ("fox")
stay captions of still pictures, centred on white.

  fox                                      a still
  scene with a fox                         any ground
  a fox and a rose on a blue background    side by side, one above the other, or across
  a fox left of a rose, a fox above a rose
  two foxes, three roses; a fox, a rose and a key
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 32  # [px]
SPRITE = 64  # side of the sprites that scenes are composed of [px]
NAMES = Path(__file__).parent / "captions.txt"
HELD_OUT = Path(__file__).parent / "held_out.txt"
GROUNDS = {  # RGB, each scene's a little off
    "red": (235, 115, 110), "orange": (245, 175, 105), "yellow": (250, 230, 130), "green": (150, 205, 140),
    "blue": (135, 180, 235), "purple": (185, 150, 225), "pink": (245, 180, 210), "gray": (175, 175, 180)}
RELATIONS = ("alone", "and", "left of", "above", "count")
# How scenes are drawn: (relation, number of emoji, weight).
KINDS = (("alone", 1, 0.60), ("and", 2, 0.14), ("left of", 2, 0.06), ("above", 2, 0.06), ("count", 2, 0.08),
         ("and", 3, 0.03), ("count", 3, 0.03))
GROUND_NAMED = 0.6  # the share of scenes whose caption names the ground
GRID = 8  # corners of emoji lie on multiples of this, which is a cell of 2 x 2 latents [px]
SIZES = {1: (16, 24, 24), 2: (16,), 3: (16,)}  # by the number of emoji, each as likely [px]
NO_ARTICLE = {"cherries", "grapes", "french fries", "popcorn", "sushi", "bread", "sunglasses", "broccoli", "scissors", "fire"}
PLURALS = {"wolf": "wolves", "snowman": "snowmen", "tropical fish": "tropical fish", "volcano": "volcanoes", "tomato": "tomatoes",
           "maple leaf": "maple leaves"}


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a caption says.

    names: one to three.  relation: one of RELATIONS ("count": all the same).  ground: one of GROUNDS or "" (any).
    still: a single emoji, centred on white, captioned by its name alone.
    """

    names: tuple[str, ...]
    relation: str = "alone"
    ground: str = ""
    still: bool = False

    @property
    def caption(self) -> str:
        if self.still:
            return self.names[0]
        things = [with_article(name) for name in self.names]
        if self.relation == "count":
            what = f"{('two', 'three')[len(self.names) - 2]} {plural(self.names[0])}"
        elif self.relation in ("left of", "above"):
            what = f"{things[0]} {self.relation} {things[1]}"
        else:
            what = ", ".join(things[:-1]) + " and " + things[-1] if len(things) > 1 else things[0]
        return f"{what} on a {self.ground} background".replace("a orange", "an orange") if self.ground else f"scene with {what}"


def with_article(name: str) -> str:
    if name in NO_ARTICLE:
        return name
    return ("an " if name[0] in "aeiou" and not name.startswith("uni") else "a ") + name


def plural(name: str) -> str:
    """Of a name as emoji-test.txt has it; the head of "flag of France" is "flag"."""
    if name in PLURALS:
        return PLURALS[name]
    for joint in (" of ", " with "):
        if joint in name:
            head, _, rest = name.partition(joint)
            return plural(head) + joint + rest
    if name in NO_ARTICLE:
        return name
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def names() -> list[str]:
    """Of all emoji that scenes are made of."""
    return NAMES.read_text(encoding="utf8").splitlines()


def held_out_names() -> set[str]:
    """Those of them that no training picture of the generator shows: some whole groups of alike names."""
    return set(HELD_OUT.read_text(encoding="utf8").splitlines())


def draw_scenes(names: Sequence[str], count: int, seed: int, stills: float = 0.0, distinct: bool = True) -> list[Scene]:
    """Scenes at random, of `names` alone.

    Args: stills (float): share of stills among them.  distinct (bool): no caption twice.
    """
    rng = np.random.default_rng(seed)
    countable = [name for name in names if name not in NO_ARTICLE]
    weights = np.array([weight for *_, weight in KINDS])
    found: dict[str, Scene] = {}
    scenes: list[Scene] = []
    for _ in range(50 * count):
        if len(scenes) == count:
            break
        scene = _draw_scene(rng, names, countable, weights / weights.sum(), stills)
        if distinct and scene.caption in found:
            continue
        found[scene.caption] = scene
        scenes.append(scene)
    if len(scenes) < count:
        raise ValueError(f"draw_scenes: count: wanted {count} distinct captions of {len(names)} names, found {len(scenes)}; ask for fewer")
    return scenes


def _draw_scene(rng, names: Sequence[str], countable: Sequence[str], weights: np.ndarray, stills: float) -> Scene:
    if rng.random() < stills:
        return Scene((str(rng.choice(names)),), still=True)
    relation, number, _ = KINDS[rng.choice(len(KINDS), p=weights)]
    if relation == "count":
        picked = (str(rng.choice(countable)),) * number
    else:
        picked = tuple(map(str, rng.choice(names, number, replace=False)))
    ground = str(rng.choice(list(GROUNDS))) if rng.random() < GROUND_NAMED else ""
    return Scene(picked, relation, ground)


class Composer:
    """Draws pictures of scenes.

    Args:
        names: of the emoji, each once.
        rgba: [N, 4, 64, 64] uint8, straight alpha, in the order of the names.
    """

    def __init__(self, names: Sequence[str], rgba: torch.Tensor):
        values = rgba.float() / 255
        premultiplied = torch.cat([values[:, :3] * values[:, 3:], values[:, 3:]], 1)
        sides = {SIDE}.union(*SIZES.values())
        self._sprites = {side: F.interpolate(premultiplied, (side, side), mode="bilinear", antialias=True) for side in sides}
        self._row = {name: row for row, name in enumerate(names)}

    def __call__(self, scenes: Sequence[Scene], generator: torch.Generator) -> torch.Tensor:
        """[N, 3, 32, 32] float32 in [-1, 1], one picture a scene."""
        pictures = _grounds(scenes, generator)
        for picture, scene in zip(pictures, scenes):
            if scene.still:
                self._paste(picture.fill_(1), scene.names[0], SIDE, (0, 0))
                continue
            size = _choose(SIZES[len(scene.names)], generator)
            for name, corner in zip(scene.names, _corners(scene, size, generator)):
                self._paste(picture, name, size, corner)
        return (pictures * 2 - 1).clamp(-1, 1)

    def _paste(self, picture: torch.Tensor, name: str, size: int, corner: tuple[int, int]) -> None:
        """Puts an emoji onto picture [3, 32, 32], values in [0, 1], in place."""
        x, y = corner
        sprite, under = self._sprites[size][self._row[name]], picture[:, y:y + size, x:x + size]
        under.mul_(1 - sprite[3:]).add_(sprite[:3])


def _choose(values: Sequence[int], generator: torch.Generator) -> int:
    return values[int(torch.randint(0, len(values), (1,), generator=generator))]


def _corners(scene: Scene, size: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """For each emoji the (x, y) of its corner [px]: anywhere for one, a half for each of two, a quarter for each of three."""
    free = range(0, SIDE - size + 1, GRID)
    number, far = len(scene.names), SIDE - size
    if number == 1:
        return [(_choose(free, generator), _choose(free, generator))]
    if number == 3:
        return [((0, far)[k % 2], (0, far)[k // 2]) for k in torch.randperm(4, generator=generator)[:3].tolist()]
    across = {"left of": True, "above": False}.get(scene.relation, bool(_choose((0, 1), generator)))
    ends = [0, far] if scene.relation in ("left of", "above") or _choose((0, 1), generator) else [far, 0]
    return [(end, _choose(free, generator)) if across else (_choose(free, generator), end) for end in ends]


def _grounds(scenes: Sequence[Scene], generator: torch.Generator) -> torch.Tensor:
    """[N, 3, 32, 32] in [0, 1]: the ground's colour, a little off, brighter to one side."""
    n, colours = len(scenes), list(GROUNDS)
    any_colour = torch.randint(0, len(colours), (n,), generator=generator).tolist()
    base = torch.tensor([GROUNDS[scene.ground or colours[pick]] for scene, pick in zip(scenes, any_colour)]) / 255
    base = base + (torch.rand(n, 3, generator=generator) * 2 - 1) * 0.045
    angle, strength = torch.rand(2, n, generator=generator).unbind()
    axis = torch.linspace(-1, 1, SIDE)
    x, y = (torch.stack([f(angle * 2 * math.pi) for f in (torch.cos, torch.sin)]) * (strength * 0.1))[:, :, None, None]
    slope = x * axis[None, None, :] + y * axis[None, :, None]  # [N, 32, 32]
    return (base[:, :, None, None] * (1 + slope[:, None])).clamp(0, 1)
