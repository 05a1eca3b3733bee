"""What `sage evaluate` is told, as it is typed, and all that can be refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage.adapters import FILE, adapter_file
from sage.encoder_identity import file_sha256
from sage.output import slug
from sage.prompts import InputError, check_seed

__all__ = ["MAY_CHANGE", "METHODS", "Adapter", "Request", "numbers"]

# What --method knows; independent sampling is always there.
METHODS = ("fewer-steps", "shared-noise", "share", "step-back", "tree", "cache")
STEPS = (30, 25, 20, 15, 12, 10, 8, 6, 5, 4)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
BACK_SHARES = (0.3, 0.5)  # those of the shares that are also drawn with a step back, if they are among them
BUDGETS = (0.9, 0.8, 0.7)
QUICK = {"steps": (10, 6, 4, 3), "shares": (0.2, 0.4), "budgets": (0.8,), "images": 2, "limit": 20}
# Settings that decide what is drawn and how it is judged, but not what a method's pictures look like: --resume may change them.
MAY_CHANGE = ("adapter", "budget", "comfortable", "extractor", "images", "margin", "method", "quick", "share", "solver", "steps")
PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Adapter:
    """A LoRA. Args: name: what tables call it, from the name of its file or folder.  path: of the .safetensors file."""

    name: str
    path: Path

    @classmethod
    def at(cls, given: str) -> Adapter:
        """The LoRA in a file, or in the folder of a `sage train`. Raises InputError."""
        try:
            file = adapter_file(given)
        except InputError as error:
            raise InputError(f"--adapter {error}") from None
        return cls(file.resolve().parent.name if file.name == FILE else file.stem, file)


@dataclass(frozen=True)
class Request:
    """Everything `sage evaluate` is told, apart from the prompts; None: the usual.

    Args:
        out: folder.
        model, device, dtype: as for `sage generate`.
        adapters: LoRAs, files or folders.
        images: folder of pictures to compare with.
        solvers: names; empty: the model's own scheduler.
        steps, shares, budgets: what to try.
        comfortable: step counts at which all methods are drawn too; (0,): at none.
        images_per_prompt: seeds of each prompt.
        similarity, max_group_size: of the groups.
        margin: relative to the best value.
        extractors: see `sage.evaluation.load_extractor`; the first one judges.
        guidance_scale, seed, max_rows: as for `sage generate`.
        methods: of METHODS; empty: all.
        limit: most prompts, whole groups.
        everyone: prompts without a neighbour too.
        held_out: of the benchmark, what the embedded model was not trained on.
        quick: see QUICK.
    """

    out: str
    model: str | None = None
    adapters: Sequence[str] = ()
    images: str | None = None
    solvers: Sequence[str] = ()
    steps: Sequence[int] | None = None
    shares: Sequence[float] | None = None
    budgets: Sequence[float] | None = None
    comfortable: Sequence[int] | None = None
    images_per_prompt: int | None = None
    similarity: float = 0.6
    max_group_size: int = 8
    margin: float = 0.05
    extractors: Sequence[str] = ()
    guidance_scale: float | None = None
    seed: int = 0
    max_rows: int = 64
    device: str | None = None
    dtype: str | None = None
    methods: Sequence[str] = ()
    limit: int | None = None
    everyone: bool = False
    held_out: bool = False
    quick: bool = False
    resume: bool = False
    overwrite: bool = False

    @property
    def grid(self) -> tuple[int, ...]:
        """Step counts, largest first, each once."""
        return tuple(sorted(set(self.steps or (QUICK["steps"] if self.quick else STEPS)), reverse=True))

    @property
    def all_shares(self) -> tuple[float, ...]:
        return tuple(sorted(set(self._usual(self.shares, "shares", SHARES))))

    @property
    def all_budgets(self) -> tuple[float, ...]:
        return tuple(sorted(set(self._usual(self.budgets, "budgets", BUDGETS)), reverse=True))

    @property
    def seeds_per_prompt(self) -> int:
        return self._usual(self.images_per_prompt, "images", 4)

    @property
    def most_prompts(self) -> int | None:
        return self._usual(self.limit, "limit", None)

    @property
    def more_counts(self) -> tuple[int, ...]:
        """The comfortable step counts, largest first; empty: all methods are drawn at the knee only."""
        usual = () if self.quick else (max(self.grid),)
        given = usual if self.comfortable is None else self.comfortable
        return tuple(sorted(set(given) - {0}, reverse=True))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.methods) or METHODS

    def _usual(self, given: Any, name: str, usual: Any) -> Any:
        return given if given is not None else QUICK[name] if self.quick else usual

    def check(self) -> None:
        """Refuse what is out of range or unknown, before anything is loaded. Raises InputError."""
        for name, low, values in (("--steps", 1, self.steps or ()), ("--images-per-prompt", 1, [self.images_per_prompt]),
                                  ("--max-rows", 1, [self.max_rows]), ("--limit", 2, [self.limit]),
                                  ("--comfortable", 0, self.comfortable or ()), ("--max-group-size", 2, [self.max_group_size])):
            for value in values:
                if value is not None and value < low:
                    raise InputError(f"{name} must be at least {low}, got {value}.")
        for name, values, fits, wanted in (
            ("--share", self.shares or (), lambda x: 0 < x < 1, "in (0, 1), a fraction of the calls"),
            ("--budget", self.budgets or (), lambda x: 0 < x < 1, "in (0, 1), a fraction of the rows without sharing"),
            ("--margin", [self.margin], lambda x: 0 < x < 1, "in (0, 1), relative to the best value"),
            ("--similarity", [self.similarity], lambda x: -1 < x <= 1, "in (-1, 1]"),
            ("--guidance-scale", [self.guidance_scale], lambda x: x is None or 0 <= x < float("inf"), "a number of at least 0"),
        ):
            for value in values:
                if not fits(value):
                    raise InputError(f"{name} must be {wanted}, got {value:g}.")
        check_seed(self.seed, "--seed")
        self._check_names()
        if self.images is not None:
            _check_images(self.images)
        self.load_adapters()

    def _check_names(self) -> None:
        from sage.commands import check_solver

        for solver in self.solvers:
            check_solver(solver)
        for method in self.methods:
            if method not in METHODS:
                raise InputError(f"--method {method}: unknown; known methods: {', '.join(METHODS)} (independent is always drawn).")
        for spec in self.extractors:
            kind, _, name = spec.partition(":")
            if kind == "inception" and not name.endswith(".safetensors"):
                raise InputError(f"--extractor {spec}: wanted inception:FILE with a .safetensors file. The published weights are a pickle; "
                                 "convert them once: from sage.evaluation import convert_inception; "
                                 'convert_inception(None, "inception.safetensors", allow_pickle=True).')
        for name, values in (("--solver", self.solvers), ("--method", self.methods), ("--extractor", self.extractors)):
            if len(set(values)) < len(values):
                raise InputError(f"{name}: {', '.join(values)} names one of them twice.")

    def load_adapters(self) -> list[Adapter]:
        """The LoRAs. Raises InputError for those that are missing, or of one name."""
        found = [Adapter.at(given) for given in self.adapters]
        names = [slug(adapter.name) for adapter in found]
        if len(set(names)) < len(names):
            raise InputError(f"--adapter: two files have the name {next(n for n in names if names.count(n) > 1)}; rename one.")
        return found

    def settings(self) -> dict[str, Any]:
        """What decides pictures and figures, for the record and for --resume (see MAY_CHANGE); files by digest."""
        return {
            "adapter": {adapter.name: file_sha256(adapter.path) for adapter in self.load_adapters()},
            "images": self.images,
            "solver": list(self.solvers),
            "steps": list(self.grid),
            "share": list(self.all_shares),
            "budget": list(self.all_budgets),
            "comfortable": list(self.more_counts),
            "images_per_prompt": self.seeds_per_prompt,
            "similarity": self.similarity,
            "max_group_size": self.max_group_size,
            "margin": self.margin,
            "extractor": list(self.extractors),
            "seed": self.seed,
            "max_rows": self.max_rows,
            "method": list(self.kinds),
            "limit": self.most_prompts,
            "all": self.everyone,
            "quick": self.quick,
        }


def numbers(text: str | None, option: str, kind: Callable[[str], Any]) -> tuple | None:
    """A list as it is typed, "30,20,10"; None stays None. Raises InputError."""
    if text is None:
        return None
    try:
        values = tuple(kind(part) for part in text.replace(" ", "").split(","))
    except ValueError:
        what = "whole numbers such as 20,10,5" if kind is int else "numbers such as 0.1,0.3"
        raise InputError(f"{option} must be {what}, got {text!r}.") from None
    return values


def _check_images(given: str) -> None:
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise InputError(f"--images {given}: no such folder.")
    found = len(picture_files(folder))
    if found < 2:
        raise InputError(f"--images {given}: {'one picture' if found else 'no pictures'} in it; wanted two at the least, files ending in "
                         f"{', '.join(PICTURE_FILES)}.")


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder and those below it, by name."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_FILES and file.is_file())
