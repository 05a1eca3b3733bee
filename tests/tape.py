"""A stand-in for CUDA graphs on the CPU: a tape of the ops that a function ran, with the memory they wrote.

As with a real graph, Python runs at the capture only, a capture computes nothing, a replay reads and writes the same memory as
every other replay, and no graph's results outlive the replay of another, since all share one pool.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty"}


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(tensor):
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Records ops while it is on; `end` undoes what they wrote, `replay` runs them again on the same memory."""

    def __init__(self):
        super().__init__()
        self.ops, self.pool, self._overwritten = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = list(zip(func._schema.arguments, args)) + [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._overwritten += [(t, t.clone()) for t in _tensors(value)]
        results = func(*args, **kwargs)
        known = {_memory(t) for t in _tensors((args, kwargs))}
        fresh = [_memory(t) not in known for t in _tensors(results)]
        self.pool += [t for t, new in zip(_tensors(results), fresh) if new]
        self.ops.append((func, args, kwargs, [t if new else None for t, new in zip(_tensors(results), fresh)]))
        return results

    @torch.inference_mode()  # under which what it recorded may have been made
    def end(self):
        for tensor, before in reversed(self._overwritten):
            tensor.copy_(before)
        self._overwritten.clear()
        self.poison()

    @torch.inference_mode()
    def poison(self):
        """Nobody may read what an earlier replay left."""
        for tensor in self.pool:
            tensor.fill_(float("nan") if tensor.is_floating_point() else True)

    @torch.inference_mode()
    def replay(self):
        for func, args, kwargs, results in self.ops:
            if func.overloadpacket.__name__ in UNINITIALISED:
                continue
            for target, value in zip(results, _tensors(func(*args, **kwargs))):
                if target is not None:
                    target.copy_(value)


class TapeGraphs:
    """Stands in for `sage.graphs.CudaGraphs`, and counts."""

    def __init__(self, device):
        self.tapes, self.replays = [], 0

    @property
    def captures(self):
        return len(self.tapes)

    def follow(self):
        pass

    def warm_up(self, call):
        call()
        call()

    def capture(self, call):
        tape = Tape()
        with tape:
            output = call()
        tape.end()
        self.tapes.append(tape)
        return (lambda: self.replay(tape)), output

    def replay(self, tape):
        self.replays += 1
        for other in self.tapes:
            other.poison()
        tape.replay()
