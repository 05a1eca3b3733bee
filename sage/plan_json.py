"""Sharing plans as JSON text: the format, strictly read.

    {"format": "sage-diffusion sharing plan", "version": 1, "encoder": "", "similarity": 0.6,
     "leaves": [{"prompt": "a red fox", "image_index": 0, "seed": null}, …],
     "roots": [NODE, …]}

NODE is the index of a leaf that runs alone from there on, or
{"members": [0, 1], "representative": 0, "until": 0.4, "children": [NODE, …]}.
"""

import json
from typing import Any

FORMAT = "sage-diffusion sharing plan"
VERSION = 1

PLAN_KEYS = ("format", "version", "encoder", "similarity", "leaves", "roots")
LEAF_KEYS = ("prompt", "image_index", "seed")
NODE_KEYS = ("members", "representative", "until", "children")


def write(plan) -> str:
    """The text of a SharingPlan: one line per leaf and per root, so that two plans can be compared by eye."""
    leaves = [dict(zip(LEAF_KEYS, (leaf.prompt, leaf.image_index, leaf.seed))) for leaf in plan.leaves]
    head = {"format": FORMAT, "version": VERSION, "encoder": plan.encoder, "similarity": plan.similarity}
    lines = [f" {_dump(key)}: {_dump(value)}" for key, value in head.items()]
    lines += [_list("leaves", leaves), _list("roots", [_node_data(root) for root in plan.roots])]
    return "{\n" + ",\n".join(lines) + "\n}"


def read(text: str):
    """The SharingPlan of a text that `write` made."""
    from sage.plan import SharingPlan  # plan.py imports this module

    if not isinstance(text, (str, bytes)):
        raise TypeError(f"SharingPlan.from_json: text must be a str, got {type(text).__name__}")
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("SharingPlan.from_json: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"SharingPlan.from_json: not JSON: {error}") from error
    _check_header(data)
    _check_keys(data, PLAN_KEYS, "the plan")
    leaves = tuple(_leaf(item, f"leaves[{number}]") for number, item in enumerate(_array(data["leaves"], "leaves")))
    roots = tuple(_node(item, f"roots[{number}]") for number, item in enumerate(_array(data["roots"], "roots")))
    return _build(SharingPlan, "the plan", leaves, roots, data["encoder"], data["similarity"])


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _list(name: str, items: list) -> str:
    return f' "{name}": [\n' + ",\n".join(f"  {_dump(item)}" for item in items) + "\n ]"


def _node_data(node) -> int | dict:
    if len(node.members) == 1:
        return node.members[0]
    children = [_node_data(child) for child in node.children]
    return dict(zip(NODE_KEYS, (list(node.members), node.representative, node.until, children)))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _check_header(data: Any) -> None:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'SharingPlan.from_json: not a sharing plan: wanted an object with "format": "{FORMAT}"')
    if data.get("version") != VERSION or isinstance(data["version"], bool):
        raise ValueError(f"SharingPlan.from_json: version must be {VERSION}, got {data.get('version')!r}; "
                         "the plan may come from a newer sage-diffusion")


def _check_keys(data: Any, keys: tuple[str, ...], place: str) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"SharingPlan.from_json: {place} must be an object, got {data!r:.80}")
    missing = [key for key in keys if key not in data]
    unknown = [key for key in data if key not in keys]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown keys {', '.join(unknown)}"
        raise ValueError(f"SharingPlan.from_json: {place} {what}; known keys: {', '.join(keys)}")


def _array(data: Any, place: str) -> list:
    if not isinstance(data, list):
        raise ValueError(f"SharingPlan.from_json: {place} must be a list, got {data!r:.80}")
    return data


def _leaf(data: Any, place: str):
    from sage.plan import Leaf

    _check_keys(data, LEAF_KEYS, place)
    return _build(Leaf, place, data["prompt"], data["image_index"], data["seed"])


def _node(data: Any, place: str):
    from sage.plan import Node

    if isinstance(data, int) and not isinstance(data, bool):
        return _build(Node.single, place, data)
    _check_keys(data, NODE_KEYS, place)
    children = _array(data["children"], f"{place}.children")
    nodes = tuple(_node(child, f"{place}.children[{number}]") for number, child in enumerate(children))
    return _build(Node, place, data["members"], data["representative"], data["until"], nodes)


def _build(make, place: str, *args):
    """make(*args), its errors with the place in the text they come from."""
    try:
        return make(*args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"SharingPlan.from_json: {place}: {error}") from error
