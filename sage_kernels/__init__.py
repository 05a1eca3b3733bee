"""Fused solver steps with copy-on-branch for diffusion sampling: tensors in, tensors out. Importing compiles nothing."""

from sage_kernels import backends
from sage_kernels.coefficients import COLUMNS, CoefficientTable
from sage_kernels.ops import BranchStepOut, GroupMeanOut, branch_step, group_mean, normals
from sage_kernels.version import __version__

__all__ = [
    "COLUMNS",
    "BranchStepOut",
    "CoefficientTable",
    "GroupMeanOut",
    "__version__",
    "backends",
    "branch_step",
    "group_mean",
    "normals",
]
