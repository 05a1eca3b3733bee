"""A dispatch spy: which ops touched tensors of at least a given size."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Views and allocations move no data.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided",
    "expand", "lift_fresh", "new_empty", "permute", "reshape", "select", "slice", "split", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view",
}  # fmt: skip


class FullSizeOps(TorchDispatchMode):
    """Records the name of every op, views and allocations apart, that reads or writes a tensor of `numel` or more."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.seen = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if name not in FREE and any(t.numel() >= self.numel for t in tensors):
            self.seen.append(name)
        return out
