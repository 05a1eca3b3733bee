"""The page of a plan: complete, self-contained, and safe whatever a prompt says."""

import base64
import hashlib
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sage.plan import SharingPlan
from sage.plan_page import page_data, plan_page
from sage.plan_report import plan_summary
from sage.planning import Grouping, Planner
from sage.prompts import PromptSet

HOSTILE = [
    "</script><script>alert(1)</script>", "<!-- <script>", '" onload="alert(2)', "a 'quoted' & <b>bold</b> fox", "{braces} $data ${x}",
    "🦊 \u2028 \u2029", "\u202eright to left", "x" * 300, "long words " * 30,
]  # fmt: skip
VOID = {"meta", "input", "br", "rect", "img"}


class Page(HTMLParser):
    """Collects tags with their attributes and the text of scripts, and checks that every tag that opens is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.scripts, self.text = [], [], [], []
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)


def planner(tmp_path, prompts, vectors, **options) -> Planner:
    np.save(tmp_path / "vectors.npy", vectors.astype(np.float32))
    grouping = Grouping(embeddings=str(tmp_path / "vectors.npy"), **options)
    return Planner(PromptSet("test", tuple(prompts)), grouping, 20)


@pytest.fixture
def made(tmp_path) -> Planner:
    """Hostile prompts in one tree, and a loner."""
    spread = 0.35 * np.random.default_rng(3).standard_normal((len(HOSTILE), 16)) / 4 + np.eye(16)[0]
    return planner(tmp_path, [*HOSTILE, "alone"], np.concatenate([spread, np.eye(16)[5:6]]), budget=0.7)


def test_prompts_are_data_and_nothing_else(made):
    page = Page(text := plan_page(plan_summary(made), made.plan))
    data, script = page.scripts
    assert json.loads(data)["prompts"] == [" ".join(prompt.split()) for prompt in [*HOSTILE, "alone"]]
    assert "alert" not in text.replace(data, "") and "<" not in data and "\u2028" not in data
    assert script == (Path(__file__).parent.parent / "sage" / "templates" / "plan.js").read_text(encoding="utf-8")
    assert "innerHTML" not in script and "document.write" not in script


def test_the_page_needs_nothing_from_anywhere_and_allows_only_its_own_script(made):
    text = plan_page(plan_summary(made), made.plan)
    page = Page(text)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    [policy] = [tag["content"] for name, tag in page.tags if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not any({"src", "href", "action"} & tag.keys() for _, tag in page.tags)
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text.replace(page.scripts[0], ""))
    assert not any(name.startswith("on") for _, tag in page.tags for name in tag)


def test_controls_have_names(made):
    page = Page(plan_page(plan_summary(made), made.plan))
    labelled = {tag["for"] for name, tag in page.tags if name == "label" and "for" in tag}
    for name, tag in page.tags:
        if name == "input" and tag["type"] in ("search", "range"):
            assert "aria-label" in tag or tag["id"] in labelled
    assert any(name == "html" and tag["lang"] == "en" for name, tag in page.tags)
    assert any(name == "svg" and tag.get("aria-label") for name, tag in page.tags)


def test_every_id_the_script_asks_for_is_there_once(made):
    page = Page(plan_page(plan_summary(made), made.plan))
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    asked = set(re.findall(r'at\("([a-z-]+)"\)', page.scripts[1])) | set(re.findall(r'getElementById\("([a-z-]+)"\)', page.scripts[1]))
    assert len(ids) == len(set(ids)) and asked <= set(ids)


@pytest.mark.parametrize(
    "options", [{}, {"tree": True}, {"budget": 0.5}, {"share": 0.0}, {"share": 1.0}, {"budget": 0.6, "images_per_prompt": 3}]
)
def test_lanes_are_the_rows_of_the_plan(tmp_path, options):
    """Every picture of a group is on exactly one row at each call, and the lanes of a node lie side by side."""
    rng = np.random.default_rng(1)
    vectors = np.repeat(np.eye(12)[:4], 6, axis=0) + 0.15 * rng.standard_normal((24, 12))
    made = planner(tmp_path, [f"prompt {i}" for i in range(24)], vectors, **options)
    plan, data = made.plan, page_data(plan_summary(made), made.plan)
    resolved = plan.resolve(20)
    assert sorted([leaf for group in data["groups"] for leaf in group["members"]] + data["alone"]) == list(range(len(plan.leaves)))
    rows = np.zeros(20, dtype=int) + len(data["alone"])
    for group in data["groups"]:
        taken = np.zeros((len(group["members"]), 20), dtype=int)
        for first, last, start, end, trunk, similarity in group["nodes"]:
            taken[first : last + 1, start:end] += 1
            rows[start:end] += 1
            assert first <= trunk <= last and -1 <= similarity <= 1
            for call in range(start, end):
                lanes = tuple(sorted(group["members"][first : last + 1]))
                at = resolved.members[call].index(lanes)
                assert resolved.node_representatives[call][at] == group["members"][trunk]
        assert (taken == 1).all()
    assert rows.tolist() == resolved.rows


def test_numbers_of_the_summary_are_on_the_page(made):
    summary = plan_summary(made, rate=50.0)
    text = " ".join(Page(plan_page(summary, made.plan)).text)
    for row in summary["comparison"]:
        assert f"{row['nfe']:,}" in text and f"{row['saving']:.1%}" in text and f"{row['expected_loss']:.5f}" in text
        assert f"{row['fewer_steps']:.1f} steps" in text
    assert "at 50 rows per second" in text and "Similarity in groups" in text and "this plan: tree, budget 0.7" in text


def test_a_plan_without_groups(tmp_path):
    made = planner(tmp_path, ["one"], np.ones((1, 3)))
    data = page_data(plan_summary(made), made.plan)
    assert data["groups"] == [] and data["alone"] == [0]
    assert "No two prompts are alike enough" in " ".join(Page(plan_page(plan_summary(made), made.plan)).text)


def test_five_thousand_prompts(tmp_path):
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.standard_normal((1250, 48)), 4, axis=0) + 0.3 * rng.standard_normal((5000, 48))
    prompts = [f"prompt number {i} with a few more words in it, as people write them" for i in range(5000)]
    made = planner(tmp_path, prompts, vectors)
    summary = plan_summary(made)
    begin = time.process_time()
    text = plan_page(summary, made.plan)
    assert time.process_time() - begin < 2 and len(text) < 1_500_000
    assert len(page_data(summary, made.plan)["groups"]) == len(summary["groups"]) > 1000
    assert isinstance(made.plan, SharingPlan)
