"""Options to plans: what `sage plan` refuses, says and writes, with vectors that come from files."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sage.budget import budget_plan, expected_loss
from sage.cli import cli
from sage.embed_files import save_embeddings
from sage.loss import LossTable
from sage.plan import SharingPlan
from sage.planning import Grouping, Planner, parse_share
from sage.plans import plan_prompts
from sage.prompts import InputError, parse_prompts

PROMPTS = [f"a {colour} {animal}" for animal in ("cat", "dog", "horse", "whale") for colour in ("red", "blue", "grey", "white", "black")]
LONER = "the theory of numbers"


def vectors_of(prompts) -> np.ndarray:
    """A direction for each last word, and a little of one for each word before it: animals of a kind are about 0.85 alike."""
    rows = np.zeros((len(prompts), 64))
    for row, prompt in enumerate(prompts):
        *others, last = prompt.split()
        for word in others:
            rows[row, sum(map(ord, word)) % 31] += 0.3
        rows[row, 31 + sum(map(ord, last)) % 33] = 1
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """prompts.txt and vectors.npy; the working folder is theirs, and so is the embedding cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_CACHE_DIR", str(tmp_path / "cache"))
    write([*PROMPTS, LONER])
    return tmp_path


def write(prompts):
    Path("prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    np.save("vectors.npy", vectors_of(prompts))


def sage(*arguments, **options):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], **options)


def plan(*options):
    return sage("plan", "prompts.txt", "--embeddings", "vectors.npy", *options)


def summary(*options) -> dict:
    result = plan("--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(result, *wanted) -> None:
    """Exit code 2, one paragraph that says all of `wanted`, and nothing on standard output."""
    text = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert "Error: " in text and "Traceback" not in text
    assert not result.stdout
    for words in wanted:
        assert words in text


@pytest.mark.parametrize(("text", "share"), [(None, None), ("0.4", 0.4), ("0.2:0.6", (0.2, 0.6)), (" 1 ", 1.0), ("0", 0.0)])
def test_shares_are_parsed(text, share):
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["", "a", "0.2:", ":", "0.1:0.2:0.3", "40%"])
def test_other_shares_are_refused(text):
    with pytest.raises(InputError, match="--share must be a fraction such as 0.4, or LOW:HIGH"):
        parse_share(text)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--share", 0.3, "--budget", 0.6), "--share and --budget exclude each other"),
        (("--share", 0, "--quality", "high"), "--share and --quality exclude each other"),
        (("--tree", "--budget", 0.6), "--tree and --budget exclude each other"),
        (("--share", 0.4, "--tree", "--budget", 0.6), "--share and --tree and --budget exclude each other"),
        (("--budget", 0), "--budget must lie in (0, 1]"),
        (("--budget", 1.1), "--budget must lie in (0, 1]"),
        (("--budget", "nan"), "--budget must lie in (0, 1]"),
        (("--budget", 0.05), "--budget 0.05: budget must be at least"),
        (("--quality", "best"), "'best' is not one of"),
        (("--share", "0.6:0.2"), "--share must be LOW:HIGH with LOW at most HIGH, got 0.6:0.2"),
        (("--share", "0.2:1.2"), "--share must lie in [0, 1], got 1.2"),
        (("--similarity", -1), "--similarity must lie in (-1, 1], got -1"),
        (("--similarity", 1.5), "--similarity must lie in (-1, 1], got 1.5"),
        (("--similarity", "nan"), "--similarity must lie in (-1, 1], got nan"),
        (("--max-group-size", 0), "--max-group-size must be at least 1, got 0"),
        (("--images-per-prompt", 0), "--images-per-prompt must be at least 1, got 0"),
        (("--steps", 0), "--steps must be at least 1, got 0"),
        (("--encoder", "auto"), "--embeddings and --encoder exclude each other"),
        (("--cache", "c", "--no-cache"), "--cache and --no-cache exclude each other"),
        (("--loss", "none.json"), "--loss none.json: no such file"),
        (("--loss", "prompts.txt"), "--loss prompts.txt: LossTable.load: prompts.txt must be JSON"),
        (("--rate", 0), "--rate must be above 0"),
        (("--rate", "nan"), "--rate must be above 0"),
        (("--rate", "none.json"), "--rate none.json: neither a number nor a file that can be read"),
        (("--rate", "prompts.txt"), "--rate prompts.txt: no report.json of a finished"),
        (("--fail-below", 10), "--fail-below must be a fraction"),
        (("--html", "none/plan.html"), "none/plan.html: the folder none does not exist"),
        (("--html", "."), "this is a folder"),
        (("--save-embeddings", "v.txt"), "v.txt: the name must end in one of .npy, .parquet"),
        (("--model", "/no/where"), "--model /no/where: no such folder"),
    ],
)
def test_options_that_cannot_be_used(files, options, wanted):
    refused(plan(*options), wanted)


def test_files_of_embeddings_that_cannot_be_used(files):
    good = np.load("vectors.npy")
    cases = {
        "must be [21, d], one row per prompt in their order, got [20, 64]": good[1:],
        "must be [21, d], one row per prompt in their order, got [21]": good[:, 0],
        "hold NaN or infinity (the first: 'a grey cat')": np.where(np.arange(21)[:, None] == 2, np.nan, good),
        "are zero, which is no direction (the first: 'a red cat')": np.where(np.arange(21)[:, None] == 0, 0, good),
        "must hold float16, float32 or float64, got dtype int64": good.astype(np.int64),
    }
    for wanted, vectors in cases.items():
        np.save("vectors.npy", vectors)
        refused(plan(), "--embeddings vectors.npy", wanted)
    Path("vectors.npy").write_bytes(b"\x93NUMPY garbage")
    refused(plan(), "--embeddings vectors.npy: cannot be read as a .npy file")
    Path("vectors.npy").unlink()
    refused(plan(), "--embeddings vectors.npy: no such file")
    Path("vectors.txt").touch()
    refused(sage("plan", "prompts.txt", "--embeddings", "vectors.txt"), "--embeddings vectors.txt: path must end in .npy or .parquet")


def test_equal_prompts_need_equal_vectors(files):
    write(["a red cat", "a red cat"])
    np.save("vectors.npy", np.eye(2, dtype=np.float32))
    refused(plan(), "--embeddings vectors.npy: rows 0 and 1 are of one prompt, 'a red cat', but differ")


def test_no_prompts(files):
    Path("prompts.txt").write_text("\n \n")
    refused(plan(), "prompts.txt: no prompts in it (2 blank lines)")


@pytest.mark.parametrize("options", [(), ("--tree",), ("--budget", 1), ("--quality", "fast"), ("--share", "0.2:0.6")])
def test_one_prompt(files, options):
    write(["a red cat"])
    found = summary(*options)
    assert found["groups"] == [] and found["alone"] == [0] and found["saving"] == found["expected_loss"] == 0
    assert found["similarities"] is None and found["alone_examples"][0]["nearest"] is None
    text = plan(*options).stdout
    assert "No two prompts are alike enough" in text and "1 picture, 20 denoiser calls each" in text


@pytest.mark.parametrize("options", [(), ("--tree",), ("--quality", "fast")])
def test_equal_prompts_do_not_share(files, options):
    write(["a red cat"] * 7)
    found = summary(*options)
    assert (found["prompts"], found["pictures"], found["groups"]) == (1, 7, [])
    assert "7 pictures of 1 prompt" in plan(*options).stdout


@pytest.mark.parametrize("options", [(), ("--tree",), ("--quality", "fast"), ("--budget", 0.5)])
def test_equal_vectors(files, options):
    np.save("vectors.npy", np.ones((21, 3), dtype=np.float32))
    found = summary(*options)
    assert found["expected_loss"] == 0 and found["saving"] > 0.3
    assert found["similarities"]["min"] == found["similarities"]["max"] == 1


def planner(*, num_calls=20, **options) -> Planner:
    grouping = Grouping(embeddings="vectors.npy", **options)
    grouping.check()
    return Planner(parse_prompts(Path("prompts.txt").read_text(), "prompts.txt", jsonl=False), grouping, num_calls)


def test_each_way_to_say_how_much_is_shared(files):
    prompts, vectors = [*PROMPTS, LONER], np.load("vectors.npy")
    name = planner().embeddings.encoder
    assert planner().plan == plan_prompts(prompts, vectors, encoder_name=name)
    assert planner(share=(0.2, 0.6)).plan == plan_prompts(prompts, vectors, share=(0.2, 0.6), encoder_name=name)
    assert planner(budget=0.7).plan == budget_plan(prompts, vectors, budget=0.7, encoder_name=name)
    high = budget_plan(prompts, vectors, quality="high", num_calls=30, encoder_name=name)
    assert planner(quality="high", num_calls=30).plan == high
    tight = budget_plan(prompts, vectors, budget=0.9, similarity=0.9, max_group_size=3, encoder_name=name)
    assert planner(budget=0.9, similarity=0.9, max_group_size=3).plan == tight


@pytest.mark.parametrize("share", [0.3, 0.4, (0.2, 0.6)])
def test_a_tree_loses_what_the_flat_plan_does_and_saves_more(files, share):
    made = planner(tree=True, share=share)
    flat, vectors = plan_prompts([*PROMPTS, LONER], np.load("vectors.npy"), share=share), made.embeddings
    assert expected_loss(made.plan, vectors).mean() <= expected_loss(flat, vectors).mean() + 1e-9
    assert made.plan.cost(20).saving >= flat.cost(20).saving
    assert (made.tree is made.plan) == (share == 0.4)


def test_flat_plans_at_other_shares_are_those_of_their_share(files):
    made = planner(share=0.4)
    for share in (0.0, 0.2, 0.4, 0.6, 1.0):
        assert made.flat_at(share).roots == planner(share=share).plan.roots


def test_a_loss_table_of_ones_own(files):
    LossTable.power(2.0, 1.0, 2.0, {"mine": True}).save("loss.json")
    ours, shipped = summary("--loss", "loss.json"), summary()
    assert ours["nfe"] == shipped["nfe"] and ours["expected_loss"] != shipped["expected_loss"]
    assert ours["loss_table"] == {"source": "loss.json", "fits_encoder": None}
    assert shipped["loss_table"] == {"source": "shipped", "fits_encoder": False}
    assert "was not made with this encoder" in " ".join(plan().stdout.split()) and "by loss.json" in plan("--loss", "loss.json").stdout


KEYS = {
    "format", "version", "prompts", "pictures", "num_calls", "aim", "encoder", "similarity", "search", "loss_table", "nfe",
    "nfe_independent", "saving", "expected_loss", "rows", "rate", "savings", "comparison", "flat", "sizes", "similarities", "groups",
    "alone", "alone_examples",
}  # fmt: skip


@pytest.mark.parametrize("options", [(), ("--tree",), ("--budget", 0.7), ("--quality", "fast", "--images-per-prompt", 2)])
def test_json_agrees_with_itself(files, options):
    found = summary("--rate", 10, *options)
    assert found.keys() == KEYS
    ours, none = found["comparison"][0], found["comparison"][-1]
    assert [row["name"] for row in found["comparison"]] == ["as planned", "20%", "40%", "60%", "tree", "no sharing"]
    assert (ours["nfe"], ours["saving"], ours["expected_loss"]) == (found["nfe"], found["saving"], found["expected_loss"])
    assert none["nfe"] == found["nfe_independent"] == found["pictures"] * 20 and none["expected_loss"] == none["saving"] == 0
    assert sum(found["rows"]) == found["nfe"] and ours["seconds"] == pytest.approx(found["nfe"] / 10)
    assert ours["fewer_steps"] == pytest.approx(found["nfe"] / found["pictures"], abs=1e-6)
    assert sum(int(size) * number for size, number in found["sizes"].items()) == found["pictures"]
    assert found["nfe_independent"] - found["nfe"] == sum(group["rows_saved"] for group in found["groups"])
    assert found["expected_loss"] * found["pictures"] == pytest.approx(
        sum(group["expected_loss"] * group["size"] for group in found["groups"]), abs=1e-4)  # fmt: skip
    for group in found["groups"]:
        spent = sum(node["end"] - node["start"] for node in group["nodes"])
        assert group["size"] * 20 - spent == group["rows_saved"] and group["similarity"] >= found["similarity"] - 1e-6
        assert min(node["similarity"] for node in group["nodes"]) == group["similarity"]
    members = [member for group in found["groups"] for member in group["members"]]
    assert sorted(members + found["alone"]) == list(range(found["pictures"]))


def test_the_flat_curve_is_what_flat_plans_cost_and_lose(files):
    found, made = summary(), planner()
    curve = found["flat"]
    for call in (0, 3, 8, 19):
        other = made.flat_at(call / 20)
        assert curve["saving"][call] == pytest.approx(other.cost(20).saving, abs=1e-6)
        assert curve["expected_loss"][call] == pytest.approx(made.expected_loss(other).mean(), abs=1e-6)
    for row in found["comparison"][1:4]:
        assert row["saving"] == curve["saving"][round(20 * int(row["name"][:-1]) / 100)]


def test_text_says_cost_and_loss_together(files):
    text = plan("--rate", 100).stdout
    assert max(map(len, text.splitlines())) <= 110
    head = next(line for line in text.splitlines() if "loss: mean" in line)
    assert all(word in head for word in ("rows", "saved", "worst", "same cost", "seconds"))
    assert "→ this plan: share 0.4" in text and "tree at the loss of share 40%" in text and "no sharing" in text
    assert "flat, share 40%" not in text  # it is the plan
    assert "Size of groups" in text and "Similarity of two in a group: least" in text
    assert "Alone: 1 picture" in text and LONER in text and "nearest 0." in text
    assert "Groups that save most" in text


def test_no_tree_is_made_to_compare_with_when_prompts_are_many(files, monkeypatch):
    monkeypatch.setattr("sage.plan_report.TREE_MOST", 20)
    assert "tree" not in summary()["savings"] and "tree" not in summary("--budget", 0.7)["savings"]
    assert "--tree" in plan().stdout and "tree" in summary("--tree")["savings"]


def test_long_lists_are_cut_unless_all_is_asked_for(files):
    write([f"a {number} {animal}" for animal in ("cat", "dog", "fox", "cow", "ant") for number in range(100, 107)])
    short, whole = plan().stdout, plan("--all").stdout
    assert "--all lists all" in short and "--all" not in whole and len(whole) > len(short)
    assert all(prompt in whole for prompt in Path("prompts.txt").read_text().split("\n"))
    write([f"a {number} cat" for number in range(100, 120)])
    assert "… 8 more lines" in plan("--max-group-size", 20).stdout


def test_terminal_codes_in_prompts_do_not_reach_the_terminal(files):
    write(["a \x1b[31mred cat", "a \x1b[31mblue cat", "\x1b[0m alone indeed"])
    assert "\x1b" not in plan("--all").stdout


def test_too_little_saved_is_exit_code_3(files):
    enough, little = plan("--fail-below", 0.1), plan("--fail-below", 0.9, "--json")
    assert enough.exit_code == 0 and not enough.stderr
    assert little.exit_code == 3 and json.loads(little.stdout)["saving"] < 0.9
    assert little.stderr.count("\n") == 1 and "below the 90.0% of --fail-below" in little.stderr


def test_rate_from_a_report(files):
    Path("report.json").write_text(json.dumps({"stats": {"nfe": 300, "denoise_seconds": 2.0}}))
    found = summary("--rate", "report.json")
    assert found["rate"] == 150 and found["comparison"][0]["seconds"] == pytest.approx(found["nfe"] / 150)
    Path("report.json").write_text(json.dumps({"stats": {"pictures": 0, "kept": 5}}))
    refused(plan("--rate", "report.json"), "no report.json of a finished")


@pytest.mark.parametrize("name", ["kept.npy", "kept.parquet"])
def test_embeddings_are_saved_and_read_back(files, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    assert plan("--save-embeddings", name, "--out", "one.json").exit_code == 0
    assert sage("plan", "prompts.txt", "--embeddings", name, "--out", "two.json").exit_code == 0
    assert SharingPlan.load("one.json").roots == SharingPlan.load("two.json").roots


def test_embeddings_that_cannot_be_written(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(plan("--save-embeddings", "kept.parquet"), "--save-embeddings kept.parquet:", "needs pyarrow")
    assert not Path("kept.parquet").exists()


def test_parquet_files_must_hold_every_prompt(files):
    pytest.importorskip("pyarrow")
    save_embeddings("some.parquet", PROMPTS, vectors_of(PROMPTS))
    refused(sage("plan", "prompts.txt", "--embeddings", "some.parquet"), "--embeddings some.parquet: lacks 1 of 21 distinct prompts")


def test_every_file_is_written(files):
    result = plan("--out", "plan.json", "--plot", "plan.png", "--html", "plan.html", "--save-embeddings", "kept.npy")
    assert result.exit_code == 0, result.output
    assert all(Path(name).stat().st_size for name in ("plan.json", "plan.png", "plan.html", "kept.npy"))


def test_the_cache_is_used_shown_mended_and_cleared(files):
    write(["a red cat", "a blue cat", LONER])
    first = sage("plan", "prompts.txt", "--json")
    assert first.exit_code == 0, first.output
    shown = sage("cache").stdout
    assert "3 vectors of 1 encoder" in shown and str(files / "cache" / "embeddings") in shown
    assert shown.strip() in sage("info").stdout and "sage cache --clear" in sage("info").stdout
    [file] = (files / "cache" / "embeddings").glob("*.sqlite")
    file.write_bytes(b"SQLite format 3\0" + b"garbage" * 500)
    with pytest.warns(UserWarning, match="embedding cache: .* it is built anew"):
        again = sage("plan", "prompts.txt", "--json")
    assert again.exit_code == 0 and again.stdout == first.stdout
    assert "Removed" in sage("cache", "--clear").stdout and "0 vectors" in sage("cache").stdout
    assert sage("plan", "prompts.txt", "--no-cache", "--json").stdout == first.stdout and "0 vectors" in sage("cache").stdout
    assert sage("plan", "prompts.txt", "--cache", "mine", "--json").stdout == first.stdout
    assert "3 vectors" in sage("cache", "--folder", "mine").stdout and "0 vectors" in sage("cache").stdout


@pytest.mark.parametrize("options", [(), ("--share", "0.2:0.6"), ("--tree",), ("--budget", 0.8)])
def test_the_way_groups_are_searched_is_said(files, options):
    exact = {"asked": "exact", "method": "exact", "recall": 1.0}
    assert summary("--search", "exact", *options)["search"] == exact
    assert summary(*options)["search"] == exact | {"asked": "auto"} and "approximate search" not in plan(*options).stdout
    if importlib.util.find_spec("faiss") is None:
        refused(plan("--search", "approximate", *options), "--search approximate:", "needs faiss")
        return
    write([f"a {number} {animal}" for animal in ("cat", "dog", "horse") for number in range(100, 200)])
    found = summary("--search", "approximate", *options)["search"]
    assert (found["asked"], found["method"]) == ("approximate", "approximate") and 0 < found["recall"] <= 1
    assert "approximate search: about" in plan("--search", "approximate", *options).stdout


def test_settings_say_what_decides_the_plan(files):
    flat = Grouping(embeddings="vectors.npy").settings()
    assert (flat["share"], flat["similarity"], flat["max_group_size"]) == (0.4, 0.6, 8) and len(flat["embeddings"]) == 64
    assert Grouping().settings() | {"cache": False} == Grouping(cache=False).settings() | {"cache": False}
    tree = Grouping(budget=0.5).settings()
    assert tree["budget"] == 0.5 and tree["share"] is None and tree["similarity"] is None and tree["encoder"] == "auto"
