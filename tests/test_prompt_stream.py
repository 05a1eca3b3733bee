"""Prompt files read by place: the same prompts and the same complaints as sage.prompts, in little memory."""

import json
import string
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage.prompt_stream import PromptFile
from sage.prompts import InputError, read_prompts

TEXT_FILES = [
    "a fox\n\n  ein Fuchs 🦊 \r\na fox\n".encode(),
    b"\xef\xbb\xbfa fox\n\xef\xbb\xbfa hare",
    b"a\r\rb\r",
    b"a\r\n\r\nb\r\n\r\n",
    "a\u2028b\x0cc\u0085d\n\u3000e\u3000\n".encode(),
    b"# not a comment\n../../etc/passwd\n{red|blue} car",
    b"a\n \t\n   ",
]
JSON_FILES = [
    b'{"prompt": " a fox ", "seed": 3}\n\n{"prompt": "a hare", "negative_prompt": "blurry", "seed": 0}\n',
    b'\xef\xbb\xbf{"prompt": "\\u00e4\\ud83e\\udd8a"}\r{"prompt": "b"}',
]
BAD_TEXT = [b"", b"\n \n\t\n", b"\xef\xbb\xbf", b"fine\nalso f\xedne\n", b"\xef\xbb\xbfok\n\xff\n", b"\xef\xbb\xbf\xff\n",
            "a fox\n".encode("utf-16"), b"a\nb\0c\n"]
BAD_JSON = [b'{"prompt": "a"', b"a fox", b'["a"]', b'{"text": "a"}', b'{"seed": 1}', b'{"prompt": 7}', b'{"prompt": "  "}',
            b'{"prompt": "a", "seed": -1}', b'{"prompt": "a\\ud800"}', b'{"prompt": "a", "seed": 1}']


def write(tmp_path, data: bytes, name: str = "prompts.txt"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("data", "name"), [(data, "p.txt") for data in TEXT_FILES]
                         + [(data, name) for data in JSON_FILES for name in ("p.jsonl", "p.NDJSON")])
def test_reads_what_read_prompts_reads(tmp_path, data, name):
    path = write(tmp_path, data, name)
    whole, found = read_prompts(path), PromptFile(path)
    assert tuple(found) == whole.prompts and found.blank == whole.blank and len(found) == len(whole)
    assert found.offsets.dtype == np.int64


@pytest.mark.parametrize(("data", "name"), [(data, "p.txt") for data in BAD_TEXT]
                         + [(b'{"prompt": "first"}\n\n' + data + b"\n", "p.jsonl") for data in BAD_JSON])
def test_says_of_mistakes_what_read_prompts_says(tmp_path, data, name):
    path = write(tmp_path, data, name)
    with pytest.raises(InputError) as wanted:
        read_prompts(path)
    with pytest.raises(InputError) as said:
        PromptFile(path)
    assert str(said.value) == str(wanted.value)


def test_missing_files_folders_and_standard_input(tmp_path):
    for path, message in ((tmp_path / "none", "no such file"), (tmp_path, "this is a folder"), ("-", "write the prompts to a file")):
        with pytest.raises(InputError, match=message):
            PromptFile(path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(string.printable + "äß🦊\u2028\ufeff", max_size=8), max_size=12), st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_text_file(tmp_path, lines, ending):
    path = write(tmp_path, ending.join(lines).encode())
    try:
        whole = read_prompts(path)
    except InputError as error:
        with pytest.raises(InputError) as said:
            PromptFile(path)
        assert str(said.value) == str(error)
        return
    found = PromptFile(path)
    assert tuple(found) == whole.prompts and found.blank == whole.blank
    check_orders(found)


def check_orders(found: PromptFile) -> None:
    """Against Python's own sorting and searching."""
    texts = list(found)
    wanted = sorted(range(len(texts)), key=lambda place: (texts[place], place))
    for run_bytes in (1, 7, 1 << 20):
        order = found.canonical_order(run_bytes)
        assert order.dtype == np.int64 and order.tolist() == wanted
    first = found.first_positions()
    assert first.dtype == np.int64 and first.tolist() == [texts.index(text) for text in texts]


def test_it_is_a_sequence(tmp_path):
    with PromptFile(write(tmp_path, b"a\nb\nc\nd\n")) as found:
        assert found[-1] == "d" and found[np.int64(1)] == "b" and found[1:3] == ["b", "c"] and found[::-2] == ["d", "b"]
        assert "c" in found and found.index("c") == 2 and list(reversed(found)) == ["d", "c", "b", "a"]
        assert list(found.chunks(3)) == [["a", "b", "c"], ["d"]]
        for place in (4, -5):
            with pytest.raises(IndexError, match="prompt -?[45] of 4"):
                found[place]
        with pytest.raises(TypeError):
            found["a"]
        with pytest.raises(ValueError, match="size must be at least 1"):
            found.chunks(0)
    with pytest.raises(ValueError, match="the prompt file was closed"):
        found[0]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_orders_of_repeated_prompts(tmp_path, kind):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("aäz🦊\uffff"), rng.integers(1, 4))) for _ in range(500)]
    data = "\n".join(texts if kind == "txt" else [json.dumps({"prompt": text}) for text in texts])
    check_orders(PromptFile(write(tmp_path, data.encode(), f"p.{kind}")))


def test_the_digest_is_that_of_the_bytes(tmp_path):
    import hashlib

    data = b"a fox\n" * 300_000
    assert PromptFile(write(tmp_path, data)).sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_memory_is_a_fraction_of_the_file(tmp_path, kind):
    rng = np.random.default_rng(0)
    path = tmp_path / f"prompts.{kind}"
    with open(path, "w") as file:
        for number in rng.integers(0, 4_000, 6_000):
            text = f"{number * 7919 % 100_003} " + "a red fox in the snow at night " * 40
            file.write((json.dumps({"prompt": text}) if kind == "jsonl" else text) + "\n")
    size = path.stat().st_size
    assert size > 7e6
    tracemalloc.start()
    try:
        found = PromptFile(path)
        order = found.canonical_order(run_bytes=200_000)
        found.first_positions()
        list(map(len, found.chunks(128)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 4, f"{peak / 1e6:.1f} MB for a file of {size / 1e6:.1f} MB"
    some = [found[int(place)] for place in order[::10]]
    assert some == sorted(some)
