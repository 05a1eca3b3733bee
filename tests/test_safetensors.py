"""Models are read from safetensors alone: a pickle file can run code."""

import ast
from pathlib import Path

import pytest
import torch

SAGE = Path(__file__).resolve().parent.parent / "sage"


def loads(tree):
    """Calls of from_pretrained that read weights."""
    for node in ast.walk(tree):
        called = getattr(node, "func", None)
        if getattr(called, "attr", None) == "from_pretrained" and ast.unparse(called.value).endswith(("Model", "Pipeline")):
            yield node


def test_every_load_asks_for_safetensors():
    seen = 0
    for path in SAGE.rglob("*.py"):
        for call in loads(ast.parse(path.read_text())):
            seen += 1
            asked = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert asked.get("use_safetensors") == "True", f"{path}:{call.lineno}"
    assert seen >= 6


def test_a_pickled_teacher_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    from sage.emoji.distill import load_teacher

    config = transformers.BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config.save_pretrained(tmp_path)
    torch.save(transformers.BertModel(config).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_teacher(tmp_path)
