"""Resumable training in safetensors: modules, optimizer moments, random state, step.

No pickle is written or read: the optimizer's state is flattened to named tensors, everything that is not a tensor
travels as JSON in the file's header.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm


class Run:
    """The steps of one training, started or taken up where the checkpoint left it.

    Iterating yields step numbers, shows progress and saves every `save_every` steps and at the end; the body trains
    and calls `log`. All randomness of the body must come from `generator`, whose state is part of the checkpoint.

    Example:
        run = Run(path, "unet", recipe, {"model": model}, optimizer, generator)
        for step in run:
            run.set_lr(...)
            run.log(loss)
    """

    def __init__(self, path: Path, name: str, recipe, modules: dict[str, torch.nn.Module],
                 optimizer: torch.optim.Optimizer, generator: torch.Generator, save_every: int = 200):
        self.path, self.name, self.recipe = path, name, json.loads(json.dumps(dataclasses.asdict(recipe)))
        self.modules, self.optimizer, self.generator, self.save_every = modules, optimizer, generator, save_every
        self.step, self.history, self.seconds = 0, [], 0.0
        self._load()

    def __iter__(self) -> Iterator[int]:
        total, started, before = self.recipe["steps"], time.monotonic(), self.seconds
        self._bar = tqdm(initial=self.step, total=total, desc=self.name, unit="step")
        with self._bar:
            while self.step < total:
                yield self.step
                self.step += 1
                self._bar.update()
                self.seconds = before + time.monotonic() - started
                if self.step % self.save_every == 0 or self.step == total:
                    self._save()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def log(self, loss: torch.Tensor, **shown: torch.Tensor) -> None:
        """Records the loss; every 50th step its running mean and whatever else is given are displayed."""
        self.history.append(round(loss.item(), 6))
        if self.step % 50 == 49:
            recent = self.history[-200:]
            values = {name: f"{float(value):.4f}" for name, value in shown.items()}
            self._bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", **values)

    def _save(self) -> None:
        """Atomic: an interrupted save leaves the previous checkpoint in place."""
        tensors = {f"module/{name}/{key}": value.detach().contiguous().clone()
                   for name, module in self.modules.items() for key, value in module.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                tensors[f"optimizer/{index}/{key}"] = torch.as_tensor(value).contiguous().clone()
        tensors["generator"] = self.generator.get_state()
        header = {name: json.dumps(getattr(self, name)) for name in ("step", "recipe", "history", "seconds")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial, metadata=header)
        os.replace(partial, self.path)

    def _load(self) -> None:
        if not self.path.is_file():
            return
        with safe_open(self.path, "pt") as file:
            header = {key: json.loads(value) for key, value in file.metadata().items()}
            if header["recipe"] != self.recipe:
                changed = {k: (header["recipe"].get(k), v) for k, v in self.recipe.items() if header["recipe"].get(k) != v}
                raise ValueError(f"checkpoint {self.path}: made by another recipe (then, now): {changed}; delete the file "
                                 "to start over, or pass another --work folder")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        for name, module in self.modules.items():
            prefix = f"module/{name}/"
            module.load_state_dict({k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)})
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.generator.set_state(tensors["generator"])
        self.step, self.history = header["step"], header["history"]
        self.seconds = header.get("seconds", 0.0)


def summary(path: Path) -> dict:
    """What a finished run has to say for the model card: steps, seconds, mean loss of the last 200 steps, recipe."""
    with safe_open(path, "pt") as file:
        header = {key: json.loads(value) for key, value in file.metadata().items()}
    tail = header["history"][-200:]
    return {"steps": header["step"], "seconds": round(header.get("seconds", 0.0)),
            "final_loss": round(sum(tail) / max(len(tail), 1), 4), "recipe": header["recipe"]}
