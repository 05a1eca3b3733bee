"""The pictures the embedded model learns from: colour emoji and their Unicode names.

Artwork comes from the Noto Color Emoji font (bitmap strikes of 136 x 128 px), names and groups from Unicode's
`emoji-test.txt`. Joined sequences (families, flags, professions) need Pillow's raqm layout engine; without it they
fall apart into their pieces, so it is required rather than worked around.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
STRIKE = 109  # the only bitmap size in the font [px]
CANVAS = 136  # a strike is 136 x 128; it is centred on a square of this side [px]
_LINE = re.compile(r"^([0-9A-F ]+?)\s*; (\S+)\s*# (\S+) E([\d.]+) (.+)$")


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One emoji as `emoji-test.txt` lists it."""

    codepoints: tuple[int, ...]
    name: str
    group: str
    subgroup: str

    @property
    def text(self) -> str:
        return "".join(map(chr, self.codepoints))

    @property
    def caption(self) -> str:
        """The name as a phrase: "flag: Peru" becomes "flag of Peru", "man: beard" "man with beard"."""
        kind, _, rest = self.name.partition(": ")
        if not rest:
            return self.name
        if kind == "flag":
            return f"flag of {rest}"
        if kind == "keycap":
            return f"keycap {rest}"
        return f"{kind} with " + " and ".join(part.strip() for part in rest.split(","))


@dataclasses.dataclass
class Dataset:
    """Pictures and captions, row i of every member belonging together.

    rgba: [N, 4, 64, 64] uint8, straight alpha.
    """

    rgba: torch.Tensor
    captions: list[str]

    def named(self, names: Sequence[str]) -> "Dataset":
        """The emoji of these names, in their order."""
        row = {caption: i for i, caption in enumerate(self.captions)}
        return self._rows([row[name] for name in names])

    def _rows(self, rows: list[int]) -> "Dataset":
        return Dataset(self.rgba[rows], [self.captions[i] for i in rows])


def parse_names(path: Path = NAMES) -> list[Emoji]:
    """Fully-qualified emoji in file order."""
    if not path.is_file():
        raise RuntimeError(f"emoji names: wanted Unicode's emoji-test.txt, found nothing at {path}; "
                           "install it (Debian: apt-get install unicode-data) or pass --names FILE")
    rows, group, subgroup = [], "", ""
    for line in path.read_text(encoding="utf8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif (match := _LINE.match(line)) and match[2] == "fully-qualified":
            codepoints = tuple(int(x, 16) for x in match[1].split())
            rows.append(Emoji(codepoints, match[5].strip(), group, subgroup))
    return rows


def load_font(path: Path = FONT):
    """The font at its bitmap strike, laid out by raqm."""
    from PIL import ImageFont, features

    if not path.is_file():
        raise RuntimeError(f"emoji font: wanted Noto Color Emoji, found nothing at {path}; "
                           "install it (Debian: apt-get install fonts-noto-color-emoji) or pass --font FILE")
    if not features.check("raqm"):
        raise RuntimeError("emoji font: Pillow was built without raqm, which joins emoji sequences; "
                           "use Pillow's own wheel (pip install --force-reinstall pillow)")
    return ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.RAQM)


def draw(text: str, font, background: tuple[int, int, int, int] = (255, 255, 255, 255)):
    """One emoji centred on a square RGBA canvas of `CANVAS` px."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGBA", (CANVAS, CANVAS), background)
    ImageDraw.Draw(canvas).text((0, (CANVAS - 128) // 2), text, font=font, embedded_color=True)
    return canvas


def render(font_path: Path = FONT, names_path: Path = NAMES, only: Collection[str] | None = None) -> Dataset:
    """Renders every emoji once. Of pixel-equal ones (territories that fly another country's flag) the shortest name
    stands, which is the country's; blanks are dropped.

    Args: only: the captions to render (for quick runs); None: all.
    """
    from PIL import Image

    font, rows = load_font(font_path), parse_names(names_path)
    rows = [row for row in rows if only is None or row.caption in only]
    seen, kept, rgba = {}, [], []
    for row in tqdm(rows, desc="data: render", unit="emoji"):
        opaque = draw(row.text, font).convert("RGB")
        pixels = np.asarray(opaque)
        digest = hashlib.sha256(pixels.tobytes()).digest()
        if (pixels < 250).sum() < 200:
            continue
        if digest in seen:
            kept[seen[digest]] = min(kept[seen[digest]], row, key=lambda emoji: len(emoji.caption))
            continue
        seen[digest] = len(kept)
        kept.append(row)
        clear = draw(row.text, font, (0, 0, 0, 0))
        rgba.append(np.asarray(clear.resize((64, 64), Image.Resampling.LANCZOS)))
    pictures = torch.from_numpy(np.stack(rgba)).permute(0, 3, 1, 2).contiguous()
    return Dataset(pictures, [row.caption for row in kept])


def save(dataset: Dataset, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "captions.json").write_text(json.dumps(dataset.captions, ensure_ascii=False, indent=0), encoding="utf8")
    save_file({"rgba": dataset.rgba}, folder / "pictures.safetensors")


def load(folder: Path) -> Dataset:
    if not (folder / "pictures.safetensors").is_file():
        raise RuntimeError(f"emoji data: nothing in {folder}; run: python -m sage.emoji.build --stage data")
    tensors = load_file(folder / "pictures.safetensors")
    return Dataset(tensors["rgba"], json.loads((folder / "captions.json").read_text(encoding="utf8")))
