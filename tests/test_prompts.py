"""Reading prompts: what is accepted, and that every mistake is named with its place."""

import io
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.prompts import InputError, PromptSet, count, parse_prompts, read_prompts


def write(tmp_path, data: bytes, name: str = "prompts.txt"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_text_file_keeps_order_duplicates_and_unicode(tmp_path):
    got = read_prompts(write(tmp_path, "a fox\n\n  ein Fuchs 🦊 \r\na fox\n".encode()))
    assert got.prompts == ("a fox", "ein Fuchs 🦊", "a fox")
    assert (got.blank, got.repeated) == (1, 1)
    assert got.negative_prompts is None and got.seeds is None
    assert [word in " ".join(got.remarks()) for word in ("1 blank line", "1 prompt repeated")] == [True, True]


def test_nothing_to_remark_on_a_plain_file(tmp_path):
    assert read_prompts(write(tmp_path, b"a\nb\n")).remarks() == []


def test_byte_order_mark_is_dropped(tmp_path):
    assert read_prompts(write(tmp_path, b"\xef\xbb\xbfa fox\n")).prompts == ("a fox",)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_every_line_ending(ending):
    assert parse_prompts(ending.join(["a", "", "b"]) + ending, "x", jsonl=False) == PromptSet("x", ("a", "b"), blank=1)


def test_line_separator_inside_a_prompt_does_not_split_it():
    assert parse_prompts("a\u2028b\x0cc\n", "x", jsonl=False).prompts == ("a\u2028b\x0cc",)


def test_paths_and_braces_are_only_prompts(tmp_path):
    lines = ["../../etc/passwd", "/dev/null", "{red|blue} car", "# not a comment", "<script>alert(1)</script>"]
    assert read_prompts(write(tmp_path, "\n".join(lines).encode())).prompts == tuple(lines)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", "no prompts in it;"),
        (b"\n \n\t\n", "3 blank lines"),
        (b"fine\nalso f\xedne\n", "line 2, byte 7 (0xed) is not UTF-8"),
        (b"\xef\xbb\xbfok\n\xff\n", "line 2, byte 1 (0xff)"),
        (b"\xef\xbb\xbf\xff\n", "line 1, byte 4 (0xff)"),
        ("a fox\n".encode("utf-16"), "UTF-16"),
        (b"a\nb\0c\n", "line 2 holds a zero byte"),
    ],
)
def test_unusable_text(tmp_path, data, wanted):
    with pytest.raises(InputError) as caught:
        read_prompts(write(tmp_path, data))
    assert wanted in str(caught.value) and "prompts.txt" in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "nothing.txt")
    with pytest.raises(InputError, match="this is a folder"):
        read_prompts(tmp_path)


def test_jsonl_reads_all_keys(tmp_path):
    rows = [{"prompt": " a fox ", "seed": 3}, {"prompt": "a hare", "negative_prompt": "blurry", "seed": 0}]
    got = read_prompts(write(tmp_path, "\n\n".join(map(json.dumps, rows)).encode(), "p.jsonl"))
    assert got.prompts == ("a fox", "a hare")
    assert got.negative_prompts == (None, "blurry")
    assert (got.seeds, got.blank) == ((3, 0), 1)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ("a fox", "not valid JSON"),
        ('["a"]', "got list"),
        ('{"text": "a"}', 'unknown key "text"; known keys: prompt, negative_prompt, seed'),
        ('{"seed": 1}', '"prompt" is missing'),
        ('{"prompt": 7}', "prompt must be a string, got int"),
        ('{"prompt": "  "}', "the prompt is empty"),
        ('{"prompt": "a", "negative_prompt": null}', "negative_prompt must be a string, got NoneType"),
        ('{"prompt": "a", "seed": -1}', "seed must be a whole number"),
        ('{"prompt": "a", "seed": 1.5}', "got 1.5"),
        ('{"prompt": "a", "seed": true}', "got true"),
        ('{"prompt": "a", "seed": 9223372036854775808}', "seed must be"),
        ('{"prompt": "a\\ud800"}', "surrogate"),
        ('{"prompt": "a\\u0000"}', "zero character"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_malformed_jsonl_names_the_line(tmp_path, line, wanted):
    path = write(tmp_path, b'{"prompt": "first"}\n\n' + line.encode() + b"\n", "p.jsonl")
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert "line 3" in str(caught.value) and wanted in str(caught.value)


def test_seeds_on_some_lines_only(tmp_path):
    path = write(tmp_path, b'{"prompt": "a", "seed": 1}\n{"prompt": "b"}\n', "p.jsonl")
    with pytest.raises(InputError, match="1 of 2 lines give a seed"):
        read_prompts(path)


@pytest.mark.parametrize(("data", "wanted"), [(b"a fox\n{b}\n", 2), (b'\n{"prompt": "a fox"}\n', 1)])
def test_standard_input_of_both_kinds(monkeypatch, data, wanted):
    class Stdin:
        buffer = io.BytesIO(data)

        @staticmethod
        def isatty():
            return False

    monkeypatch.setattr("sys.stdin", Stdin)
    got = read_prompts("-")
    assert len(got) == wanted and got.prompts[0] == "a fox" and got.source == "standard input"


@given(st.lists(st.text(string.printable + "äß🦊", min_size=1), min_size=1, max_size=8))
def test_any_prompt_survives_a_jsonl_round_trip(texts):
    wanted = tuple(text.strip() for text in texts)
    lines = "\n".join(json.dumps({"prompt": text}) for text in texts)
    if all(wanted):
        assert parse_prompts(lines, "x", jsonl=True).prompts == wanted
    else:
        with pytest.raises(InputError, match="empty"):
            parse_prompts(lines, "x", jsonl=True)


def test_count():
    assert [count(n, "line") for n in (0, 1, 2000)] == ["0 lines", "1 line", "2,000 lines"]
