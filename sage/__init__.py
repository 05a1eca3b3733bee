"""sage-diffusion: similar prompts share their early denoising steps.

    with sage.enable(pipe, share=0.4) as sharing:      # any later call of the pipeline
        images = pipe(prompts).images

    result = sage.generate(pipe, prompts)              # many prompts: planned, packed, with a record per picture
    x = sage.sample(denoise, plan, table, x_init, conditions, seeds=seeds)   # a denoiser of your own

    trunk = sage.generate(pipe, prompts, keep_trunks=True).trunks[0]         # a group where it parts
    later = sage.generate(pipe, others, trunk=trunk)                         # joins it: the calls before are not run again

    sage.load_adapter(pipe, "tuned")                   # a LoRA of `sage train`: sharing then uses the share it was trained for
"""

import importlib

from sage_kernels.version import __version__

_HOME = {  # public name → the module it lives in, imported when first asked for
    "CapturedDenoiser": "sage.graphs",
    "GenerationResult": "sage.generation",
    "Leaf": "sage.plan",
    "LossTable": "sage.loss",
    "Node": "sage.plan",
    "Probe": "sage.probe",
    "ResolvedPlan": "sage.plan",
    "SageScheduler": "sage.scheduler",
    "Sharing": "sage.sharing",
    "SharingPlan": "sage.plan",
    "Trunk": "sage.trunk",
    "budget_plan": "sage.budget",
    "disable": "sage.sharing",
    "embed_file": "sage.embed_stream",
    "embed_prompts": "sage.embed",
    "enable": "sage.sharing",
    "expected_loss": "sage.budget",
    "generate": "sage.generation",
    "group": "sage.grouping",
    "group_file": "sage.group_stream",
    "load_adapter": "sage.adapters",
    "load_embeddings": "sage.embed_files",
    "plan_prompts": "sage.plans",
    "sample": "sage.sampling",
    "save_embeddings": "sage.embed_files",
    "table_for": "sage.solvers",
    "tree_plan": "sage.plans",
    "unload_adapter": "sage.adapters",
}
_PACKAGES = ("emoji", "evaluation")  # as `sage.emoji`, without an import of their own
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f"sage.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'sage' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
