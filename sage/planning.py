"""Prompts and options to a sharing plan: what `sage plan` shows and `sage generate` follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sage.encoder_identity import file_sha256
from sage.plan import Leaf, SharingPlan
from sage.prompts import InputError, PromptSet, count

if TYPE_CHECKING:
    from sage.embed import Embeddings
    from sage.grouping import Groups
    from sage.loss import LossTable

SHARE, SIMILARITY, MAX_GROUP_SIZE = 0.4, 0.6, 8  # of flat plans; those of trees are `sage.budget.budget_plan`'s own
QUALITIES = ("high", "balanced", "fast")
SEARCHES = ("auto", "exact", "approximate")


@dataclass(frozen=True)
class Grouping:
    """How prompts become a plan: the options that `sage plan` and `sage generate` have in common.

    Args:
        share: fraction of the calls that a group shares, or two of them (low, high); None: `SHARE`. With `tree`, that of the
            flat plan whose expected loss the tree has.
        tree, budget, quality: instead of a flat plan, `sage.budget.budget_plan` with one of its three aims; at most one is given.
        similarity, max_group_size: None: what is usual for the kind of plan.
        images_per_prompt: pictures of each prompt.
        encoder: as for `sage.embed_prompts`; None: "auto".
        embeddings: a file to read instead of embedding, see `sage.embed_files`.
        loss: file of a `sage.loss.LossTable`; None: the one that ships.
        search: as for `sage.grouping.find_groups`; "auto" here, where the functions that plan look at all pairs by themselves.
        cache: as for `sage.embed_prompts`.
    """

    share: float | tuple[float, float] | None = None
    tree: bool = False
    budget: float | None = None
    quality: str | None = None
    similarity: float | None = None
    max_group_size: int | None = None
    images_per_prompt: int = 1
    encoder: str | None = None
    embeddings: str | None = None
    loss: str | None = None
    search: str = "auto"
    cache: str | bool = True

    @classmethod
    def from_options(cls, *, share: str | None, cache: str | None, no_cache: bool, **options) -> Grouping:
        """From options as they are typed. Raises InputError when they do not fit together or are out of range."""
        if cache is not None and no_cache:
            raise InputError("--cache and --no-cache exclude each other: one names a folder, the other wants none.")
        grouping = cls(share=parse_share(share), cache=False if no_cache else cache or True, **options)
        grouping.check()
        return grouping

    @property
    def aim(self) -> str:
        """What decides how much is shared: "share", "tree", "budget" or "quality"."""
        given = (name for name in ("tree", "budget", "quality") if getattr(self, name))
        return next(given, "share" if self.budget is None else "budget")

    @property
    def flat_options(self) -> dict[str, Any]:
        """Arguments of `plan_prompts`, defaults filled in."""
        return {
            "share": SHARE if self.share is None else self.share,
            "similarity": SIMILARITY if self.similarity is None else self.similarity,
            "max_group_size": MAX_GROUP_SIZE if self.max_group_size is None else self.max_group_size,
            "images_per_prompt": self.images_per_prompt,
        }

    @property
    def given(self) -> list[str]:
        """Options that say how a plan is to be made, as far as they were given."""
        names = ("share", "tree", "budget", "quality", "similarity", "max_group_size", "encoder", "embeddings", "loss")
        return self._named(*names)

    def _named(self, *names: str) -> list[str]:
        """Those of some options that were given."""
        return [_option(name) for name in names if getattr(self, name) is not None and getattr(self, name) is not False]

    def check(self) -> None:
        """Refuse what is out of range or does not fit together."""
        aims = self._named("share", "tree", "budget", "quality")
        if len(aims) > 1 and aims != ["--share", "--tree"]:
            raise InputError(f"{' and '.join(aims)} exclude each other: each says how much is shared; give one of them "
                             "(--share beside --tree is fine: the tree then loses as much as that flat plan).")
        for share in self.share if isinstance(self.share, tuple) else (self.share,):
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"--share must lie in [0, 1], got {share:g}.")
        if isinstance(self.share, tuple) and self.share[0] > self.share[1]:
            raise InputError(f"--share must be LOW:HIGH with LOW at most HIGH, got {self.share[0]:g}:{self.share[1]:g}.")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise InputError(f"--budget must lie in (0, 1], a fraction of the rows without sharing, got {self.budget:g}.")
        if self.quality is not None and self.quality not in QUALITIES:
            raise InputError(f"--quality must be one of {', '.join(QUALITIES)}, got {self.quality}.")
        if self.similarity is not None and not -1 < self.similarity <= 1:
            raise InputError(f"--similarity must lie in (-1, 1], got {self.similarity:g}.")
        for name in ("max_group_size", "images_per_prompt"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{_option(name)} must be at least 1, got {getattr(self, name)}.")
        if self.embeddings is not None and self.encoder is not None:
            raise InputError("--embeddings and --encoder exclude each other: one reads vectors, the other makes them.")
        for name in ("embeddings", "loss"):
            if getattr(self, name) is not None and not Path(getattr(self, name)).is_file():
                raise InputError(f"{_option(name)} {getattr(self, name)}: no such file.")

    def settings(self) -> dict[str, Any]:
        """What decides the plan, for the record; files by digest, None for what has no say."""
        kept = {"share": self.share, "similarity": self.similarity, "max_group_size": self.max_group_size}
        return {
            **(self.flat_options if self.aim == "share" else kept),
            "images_per_prompt": self.images_per_prompt,
            "encoder": "auto" if self.encoder is None and self.embeddings is None else self.encoder,
            "tree": self.tree or None,
            "budget": self.budget,
            "quality": self.quality,
            "search": None if self.search == "auto" else self.search,
            "embeddings": _file_digest(self.embeddings),
            "loss": None if self.aim == "share" else _file_digest(self.loss),
        }


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _file_digest(path: str | None) -> str | None:
    return None if path is None else file_sha256(Path(path))


def parse_share(text: str | None) -> float | tuple[float, float] | None:
    """--share as it is typed: a number, or LOW:HIGH. Ranges are left to `Grouping.check`."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(":"))
    except ValueError:
        values = ()
    if len(values) not in (1, 2):
        raise InputError(f"--share must be a fraction such as 0.4, or LOW:HIGH such as 0.2:0.6, got {text!r}.")
    return values if len(values) == 2 else values[0]


class Planner:
    """The plans of some prompts under some options, each made when it is first asked for.

    Args:
        prompts: what was read.
        grouping: checked options.
        num_calls: S, denoiser calls planned for.
        pipe: the pipeline, needed for the encoder "pipeline".
        progress: show a bar while prompts are embedded.

    Attributes:
        embeddings: of the prompts, in their order.
        searches: the `sage.grouping.Groups` found so far, in order.

    Raises:
        InputError: the encoder, a file of embeddings or of losses, or the budget cannot be used; the option is named.
    """

    def __init__(self, prompts: PromptSet, grouping: Grouping, num_calls: int, pipe=None, progress: bool = False):
        self.prompts, self.grouping, self.num_calls = prompts, grouping, num_calls
        self.searches: list[Groups] = []
        if grouping.aim != "share" or grouping.loss is not None:
            _ = self.loss  # a file that cannot be read is refused before the prompts are embedded
        self.embeddings = read_embeddings(prompts, grouping) if grouping.embeddings else embed(prompts, grouping, pipe, progress)

    @cached_property
    def loss(self) -> LossTable:
        """What sharing costs, by --loss or by the table that ships."""
        from sage.loss import LossTable

        path = self.grouping.loss
        if path is None:
            return LossTable.default()
        try:
            return LossTable.load(path)
        except OSError as error:
            raise InputError(f"--loss {path}: cannot be read ({error.strerror or error}).") from None
        except (ValueError, TypeError) as error:
            raise InputError(f"--loss {path}: {error}") from None

    @cached_property
    def plan(self) -> SharingPlan:
        """The plan that was asked for."""
        grouping = self.grouping
        if grouping.aim == "share":
            return self.flat
        if grouping.aim == "tree":
            return self.tree_losing_as(self.flat)
        return self._aimed(**{grouping.aim: getattr(grouping, grouping.aim)})

    @cached_property
    def flat(self) -> SharingPlan:
        """The flat plan of --share."""
        from sage.plans import plan_prompts

        return self._made(plan_prompts, **self.grouping.flat_options)

    def flat_at(self, share: float) -> SharingPlan:
        """The groups of `flat` under another share."""
        if self.grouping.flat_options["share"] == share:
            return self.flat
        roots = [root for root in self.flat.roots if len(root.members) > 1]
        groups, chosen = [root.members for root in roots], [root.representative for root in roots]
        return SharingPlan.flat(self.flat.leaves, groups, share, chosen, encoder=self.flat.encoder, similarity=self.flat.similarity)

    @cached_property
    def tree(self) -> SharingPlan:
        """The tree that is expected to lose as much as the flat plan of share `SHARE`."""
        return self.plan if self.tree_is_plan else self.tree_losing_as(self.flat_at(SHARE))

    @property
    def tree_is_plan(self) -> bool:
        """Whether `tree` is what was asked for."""
        return self.grouping.aim == "tree" and self.grouping.flat_options["share"] == SHARE

    def tree_losing_as(self, plan: SharingPlan) -> SharingPlan:
        """The cheapest tree that is expected to lose no more than another plan does."""
        return self._aimed(at_loss=float(self.expected_loss(plan).mean()))

    def expected_loss(self, plan: SharingPlan):
        """float64 [B]: what each picture of a plan is expected to lose."""
        from sage.budget import expected_loss

        return expected_loss(plan, self.embeddings, self.loss, self.num_calls, self.grouping.images_per_prompt)

    def _aimed(self, **aim) -> SharingPlan:
        from sage.budget import budget_plan

        grouping = self.grouping
        wider = {name: getattr(grouping, name) for name in ("similarity", "max_group_size") if getattr(grouping, name) is not None}
        shared = {"num_calls": self.num_calls, "loss": self.loss, "images_per_prompt": grouping.images_per_prompt}
        try:
            return self._made(budget_plan, **aim, **wider, **shared)
        except ValueError as error:
            if "budget" not in aim:
                raise
            raise InputError(f"--budget {grouping.budget:g}: {_without_op(error)}") from None

    def _made(self, plan_function, **options) -> SharingPlan:
        searching = {"search": self.grouping.search, "on_groups": self.searches.append}
        try:
            return plan_function(self.prompts.prompts, self.embeddings, **options, **searching)
        except ModuleNotFoundError as error:
            raise InputError(f"--search {self.grouping.search}: {_without_op(error)}") from None


def embed(prompts: PromptSet, grouping: Grouping, pipe=None, progress: bool = False) -> Embeddings:
    """Embed prompts with --encoder. Raises InputError when the encoder is unknown or does not fit."""
    from sage.embed import embed_prompts

    encoder = grouping.encoder or "auto"
    try:
        return embed_prompts(prompts.prompts, encoder=encoder, pipe=pipe, cache=grouping.cache, progress=progress)
    except (ValueError, TypeError, NotImplementedError, FileNotFoundError) as error:
        raise InputError(f"--encoder {encoder}: {error}") from error
    except RuntimeError as error:
        if not str(error).startswith("embed_prompts:"):  # a failure of torch, not of the encoder that was named
            raise
        raise InputError(f"--encoder {encoder}: {error}") from error


def read_embeddings(prompts: PromptSet, grouping: Grouping) -> Embeddings:
    """Read --embeddings. Raises InputError when the file cannot be read or does not fit the prompts."""
    from sage.embed_files import load_embeddings

    path = grouping.embeddings
    try:
        found = load_embeddings(path, prompts.prompts)
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        text = _without_op(error).removeprefix(str(Path(path))).lstrip(": ")
        raise InputError(f"--embeddings {path}: {text}.") from error
    first: dict[str, int] = {}
    for row, prompt in enumerate(prompts.prompts):
        if abs(found.vectors[row] - found.vectors[first.setdefault(prompt, row)]).max() > 1e-3:
            raise InputError(f"--embeddings {path}: rows {first[prompt]} and {row} are of one prompt, {prompt[:60]!r}, but differ; "
                             "give equal prompts equal rows.")  # fmt: skip
    return found


def _without_op(error: Exception) -> str:
    """An error's text without the name of the function that raised it."""
    op, _, rest = str(error).partition(": ")
    return rest if op.isidentifier() else str(error)


def load_plan(path: str, leaves: Sequence[Leaf], name: str | None = None) -> SharingPlan:
    """Read a plan and refuse it when it is for other pictures than `leaves`; errors call it `name`."""
    name = name or f"--plan {path}"
    try:
        plan = SharingPlan.load(path)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {error}") from None
    if len(plan.leaves) != len(leaves):
        raise InputError(f"{name}: it is for {count(len(plan.leaves), 'picture')}, but {len(leaves)} are asked for.")
    for number, (planned, asked) in enumerate(zip(plan.leaves, leaves)):
        if planned.prompt != asked.prompt:
            raise InputError(
                f"{name}: picture {number} is planned for {planned.prompt[:60]!r}, but asked for {asked.prompt[:60]!r}."
            )
    return plan


def leaves_of(prompts: PromptSet, images: int) -> list[Leaf]:
    """The pictures that are asked for, in order, without seeds."""
    return [Leaf(prompt, k) for prompt in prompts.prompts for k in range(images)]
