"""The prompts that quality is measured on, and real pictures of them, composed anew whenever they are asked for.

`benchmark.jsonl` holds scenes (see `sage.emoji.scenes`): whole groups of captions of emoji that the generator was trained on, and of
emoji that it never saw ("held_out"). The emoji themselves are in `sprites.webp` beside the weights, so neither font nor names have to
be installed. Written by: python -m sage.emoji.benchmark_scenes
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from . import scenes as _scenes
from .scenes import Scene

FILE = Path(__file__).parent / "benchmark.jsonl"
SEED, CANDIDATES, PROMPTS, HELD_OUT_PROMPTS = 101, 600, 320, 40
COLUMNS = 16  # sprites in a row of sprites.webp


def benchmark(held_out: bool = False) -> list[Scene]:
    """The scenes to measure on, captions all distinct: those of trained emoji, or those that show an emoji never trained on."""
    scenes = []
    for line in FILE.read_text(encoding="utf8").splitlines():
        row = json.loads(line)
        if row["held_out"] == held_out:
            scenes.append(Scene(tuple(row["names"]), row["relation"], row["ground"]))
    return scenes


def real_pictures(scenes: Sequence[Scene], images_per_prompt: int = 1, seed: int = 0) -> torch.Tensor:
    """Real pictures: uint8 [N · images_per_prompt, 3, 32, 32], the images of a scene together; another seed, other pictures.

    Raises: RuntimeError where the sprites are missing.
    """
    from . import load_composer

    generator = torch.Generator().manual_seed(seed)
    repeated = [scene for scene in scenes for _ in range(images_per_prompt)]
    pictures = load_composer()(repeated, generator)
    return ((pictures + 1) * 127.5).round().to(torch.uint8)


def save_sprites(rgba: torch.Tensor, path: Path) -> None:
    """Writes [N, 4, 64, 64] uint8 as one PNG, `COLUMNS` to a row; colours that nobody sees are zeroed, as they only cost bytes."""
    from PIL import Image

    rgba = torch.where(rgba[:, 3:] > 0, rgba, torch.zeros_like(rgba))
    side, lines = rgba.shape[2], -(-len(rgba) // COLUMNS)
    sheet = np.zeros((lines * side, COLUMNS * side, 4), np.uint8)
    for k, sprite in enumerate(rgba.permute(0, 2, 3, 1).numpy()):
        y, x = (k // COLUMNS) * side, (k % COLUMNS) * side
        sheet[y:y + side, x:x + side] = sprite
    Image.fromarray(sheet).save(path, "WEBP", lossless=True, exact=True, quality=100, method=6)


def load_sprites(path: Path, count: int) -> torch.Tensor:
    """[count, 4, 64, 64] uint8, straight alpha."""
    from PIL import Image

    side = _scenes.SPRITE
    sheet = np.array(Image.open(path).convert("RGBA"))
    lines = len(sheet) // side
    tiles = sheet.reshape(lines, side, COLUMNS, side, 4).swapaxes(1, 2).reshape(-1, side, side, 4)
    if len(tiles) < count:
        raise RuntimeError(f"sprites: wanted {count} in {path}, found {len(tiles)}; reinstall the package")
    return torch.from_numpy(tiles[:count].copy()).permute(0, 3, 1, 2).contiguous()


def draw_benchmark(names: Sequence[str], held_out: set[str]) -> list[tuple[Scene, bool]]:
    """(scene, held out): whole groups of captions, drawn at random until the numbers above are reached."""
    trained = [name for name in names if name not in held_out]
    chosen = [(scene, False) for scene in _whole_groups(_scenes.draw_scenes(trained, CANDIDATES, SEED), PROMPTS)]
    rare = [scene for scene in _scenes.draw_scenes(names, 20 * CANDIDATES, SEED + 1, distinct=False) if held_out & set(scene.names)]
    rare = list({scene.caption: scene for scene in rare}.values())[:CANDIDATES // 8]
    return chosen + [(scene, True) for scene in _whole_groups(rare, HELD_OUT_PROMPTS)]


def _whole_groups(scenes: list[Scene], most: int) -> list[Scene]:
    from sage.embed import embed_prompts
    from sage.grouping import group

    captions = [scene.caption for scene in scenes]
    groups = group(embed_prompts(captions).vectors, captions)
    chosen: list[int] = []
    for index in np.random.default_rng(SEED).permutation(len(groups)):
        if len(chosen) + len(groups[index]) <= most:
            chosen += groups[index]
    return [scenes[i] for i in chosen]


def main() -> None:
    names = _scenes.names()
    rows = [{"prompt": scene.caption, "names": scene.names, "relation": scene.relation, "ground": scene.ground, "held_out": rare}
            for scene, rare in draw_benchmark(names, _scenes.held_out_names())]
    FILE.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")
    print(f"{FILE}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
