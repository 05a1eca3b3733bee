"""The gallery page: complete, self-contained, and safe whatever a prompt says."""

import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from sage.gallery import _segments, _thumbnail_edge, gallery_html, thumbnail, tree_svg, write_gallery
from sage.output import PictureSeries, to_json, write_atomic
from sage.plan import Leaf, Node, SharingPlan

CALLS = 10
HOSTILE = ["<script>alert(1)</script>", '" onload="alert(2)', "a 'quoted' & <b>bold</b> fox", "</figcaption>", "{braces}", "🦊"]
VOID = {"meta", "img", "br", "path", "rect"}


class Page(HTMLParser):
    """Collects tags and attributes, and checks that every tag that opens is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            assert tag == "p", f"</{tag}> closes {self.open[-1:]}"

    def handle_data(self, data):
        self.text.append(data)


def make_run(folder, plan, *, compare=False, size=16, report=None):
    resolved, root_of = plan.resolve(CALLS), plan.root_of
    prompts = [leaf.prompt for leaf in plan.leaves]
    records = [
        {
            "index": index, "prompt": prompt, "negative_prompt": None, "image_index": plan.leaves[index].image_index,
            "seed": 1234567890123456789, "group": int(root_of[index]),
            "group_size": len(plan.roots[root_of[index]].members), "branch_call": resolved.branch_call(index),
            "num_calls": CALLS, "similarity_to_trunk": 0.75,
        }
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip
    for name in ("images", "unshared") if compare else ("images",):
        series = PictureSeries(folder, name, prompts, {})
        series.add(range(len(prompts)), [Image.new("RGB", (size, size), (i, 2, 3)) for i in range(len(prompts))], records)
    write_atomic(folder / "plan.json", plan.to_json())
    cost = plan.cost(CALLS)
    stats = {"pictures": len(prompts), "kept": 0, "nfe": cost.nfe, "nfe_independent": cost.nfe_independent}
    stats |= {"rows": resolved.rows, "seconds": 6.0, "images_per_second": 1.0, "solver": "ddim"}
    data = {"settings": {"model": "<m>", "seed": 0}, "stats": stats, "seconds": {"planning": 1.0}, "versions": {"torch": "2"}}
    if compare:
        data["unshared_stats"] = {**stats, "seconds": 10.0}
    write_atomic(folder / "report.json", to_json({**data, **(report or {})}))


def flat(groups=((0, 1, 2),), share=0.4, prompts=HOSTILE):
    return SharingPlan.flat([Leaf(prompt, 0, 5) for prompt in prompts], groups, share, encoder="<encoder>")


def test_page_is_well_formed_and_escaped(tmp_path):
    make_run(tmp_path, flat(), compare=True)
    text = gallery_html(tmp_path)
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "b onload", "iframe", "link", "object")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    shown = "".join(page.text)
    assert all(prompt in shown for prompt in HOSTILE)
    assert "<m>" in shown and "<encoder>" in shown


def test_page_asks_for_nothing_from_outside(tmp_path):
    make_run(tmp_path, flat(), compare=True)
    page = Page(gallery_html(tmp_path))
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    assert len(sources) == 6 + 3 and all(source.startswith("data:image/") for source in sources)
    assert all("//" not in link and not link.startswith(("/", "javascript")) for link in links)
    assert all((tmp_path / link).is_file() for link in links)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_numbers_of_the_run(tmp_path):
    make_run(tmp_path, flat(), compare=True)
    shown = "".join(Page(gallery_html(tmp_path)).text)
    assert "13.3%" in shown and "52 instead of 60" in shown  # 3 prompts share 4 of 10 calls: 8 rows of 60
    assert "22 rows instead of 30" in shown and "branched after call 4 of 10" in shown
    assert "30.0%" in shown and "7.0 s shared, 10.0 s unshared" in shown  # planning counts against sharing
    assert "3 of 6" in shown and "3 of 3 equal their unshared picture in every pixel" in shown


def test_slower_is_not_called_saved_time(tmp_path):
    make_run(tmp_path, flat(), report={"unshared_stats": {"seconds": 5.0}})
    text = gallery_html(tmp_path)
    assert "+40.0%" in text and "more time" in text and "time saved" not in text


def test_a_resumed_run_shows_the_whole_plan(tmp_path):
    make_run(tmp_path, flat(), report={"stats": {"pictures": 1, "kept": 5, "nfe": 10, "nfe_independent": 10, "rows": [1] * 10}})
    assert "52 instead of 60" in "".join(Page(gallery_html(tmp_path)).text)


def test_branches_are_drawn_where_the_solver_allowed_them(tmp_path):
    stages = [call % 2 == 0 for call in range(CALLS)]  # half-steps: a group may part after calls 0, 2, 4 …
    resolved = flat().resolve(CALLS, stages)
    stats = {"pictures": 6, "kept": 0, "nfe": resolved.nfe, "nfe_independent": 60, "rows": resolved.rows}
    make_run(tmp_path, flat(), report={"stats": {**stats, "boundaries": stages}})
    assert f"branched after call {resolved.branch_call(0)} of 10" in gallery_html(tmp_path)
    assert resolved.branch_call(0) != 4


@pytest.mark.parametrize(
    "plan",
    [
        flat(groups=()),
        flat(groups=[range(6)]),
        flat(groups=[range(6)], share=1.0),
        flat(groups=[range(6)], share=0.0),
        flat(prompts=["one"], groups=()),
    ],
)
def test_edges(tmp_path, plan):
    make_run(tmp_path, plan, compare=True)
    Page(write_gallery(tmp_path).read_text())


def test_tree_draws_every_node_once():
    inner = Node((0, 1), 0, 0.6, (Node.single(0), Node.single(1)))
    plan = SharingPlan.tree([Leaf(str(i)) for i in range(4)], [Node((0, 1, 2), 0, 0.2, (inner, Node.single(2)))])
    segments = _segments(plan, plan.resolve(CALLS))
    assert segments[0] == {(0, 1, 2): [0, 2], (0, 1): [2, 6], (2,): [2, 10], (0,): [6, 10], (1,): [6, 10]}
    assert segments[1] == {(3,): [0, 10]}
    svg = tree_svg([0, 1, 2], segments[0], CALLS)
    assert svg.count("<path") == 5 and "3 as one row, 2 calls" in svg and "2 as one row, 4 calls" in svg


def test_missing_pictures_and_foreign_rows_do_not_break_the_page(tmp_path):
    make_run(tmp_path, flat())
    (tmp_path / "images" / sorted(p.name for p in (tmp_path / "images").iterdir())[1]).unlink()
    with open(tmp_path / "manifest.jsonl", "a") as manifest:
        manifest.write(json.dumps({"index": 0, "file": "../../secret.png"}) + "\n")
    text = gallery_html(tmp_path)
    assert "not finished" in text and "secret" not in text


def test_thumbnails(tmp_path):
    for size, kind in ((64, "png"), (512, "jpeg")):
        path = tmp_path / f"{size}.png"
        Image.effect_noise((size, size), 80).save(path)
        source = thumbnail(path, 128)
        assert source.startswith(f"data:image/{kind};base64,") and len(source) < 20_000
    edges = [_thumbnail_edge(count) for count in (10, 250, 251, 1000, 5000)]
    assert edges == [264, 264, 176, 176, 128]
