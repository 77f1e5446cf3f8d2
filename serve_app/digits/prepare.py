"""Makes the embedded demo once and keeps it: trains the model, writes spec, weights and data sets.

Called by `heal demo` and by `serve_app:app` without a model. The folder's name is a checksum of this package's code,
so a newer version never meets an older version's files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from orchestrator.datasets import write_dataset
from orchestrator.keys import heal_home
from serve_app.digits.digits_resnet import build
from serve_app.digits.images import Split, jitter, load_images, threads, traffic, transformed

EPOCHS = 8  # ~30 s on 2 cores; 0.99 on the reference (3 seeds)
BATCH = 50
LEARNING_RATE = 0.05  # SGD, one cycle
SEED = 0

_HERE = Path(__file__).parent
_CODE = ("digits_resnet.py", "images.py", "prepare.py")


@dataclass(frozen=True)
class Demo:
    """Where the demo's files are.

    `folder` holds model.yaml, digits_resnet.py, weights.safetensors, reference.parquet (labelled, not trained on),
    clean.parquet, drifted.parquet, eval_clean.parquet and eval_drifted.parquet.
    """

    folder: Path

    def path(self, name: str) -> Path:
        """A data set by name: reference, clean, drifted, eval_clean, eval_drifted."""
        return self.folder / f"{name}.parquet"

    @property
    def model(self) -> Path:
        """The model spec."""
        return self.folder / "model.yaml"


def prepare(home: Path | None = None) -> Demo:
    """The demo's files; made at first use (half a minute on 2 cores, with a progress bar on stderr).

    Args:
        home: HEAL_HOME when None. Two processes may call at once: the first to finish wins, both get whole files.
    """
    target = (home or heal_home()) / "demo" / _version()
    if not (target / "model.yaml").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
        try:
            _make(scratch)
            _publish(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Demo(target)


def _publish(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        if not (target / "model.yaml").exists():  # not a race that another process won
            raise


def _version() -> str:
    digest = hashlib.sha256()
    for name in _CODE:
        digest.update((_HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def _make(folder: Path) -> None:
    parts = load_images()
    module = train(parts["train"])
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / "weights.safetensors")
    shutil.copyfile(_HERE / "digits_resnet.py", folder / "digits_resnet.py")
    write_dataset(folder / "reference.parquet", parts["reference"].inputs, parts["reference"].labels)
    for name, split in traffic(parts).items():
        write_dataset(folder / f"{name}.parquet", split.inputs, split.labels)
    spec = {
        "spec_version": 1,
        "name": "digits",
        "task": "classification",
        "factory": "digits_resnet:build",
        "weights": "weights.safetensors",
        "input": {"shape": [32, 32, 3], "dtype": "UINT8", "layout": "HWC"},
        "classes": [str(digit) for digit in range(10)],
        "reference": "reference.parquet",
        "metric": "accuracy",
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))


def train(split: Split) -> nn.Module:
    """ResNet-18 trained from scratch with stochastic gradient descent and a one-cycle schedule.

    Args:
        split: training images and labels.

    Returns:
        The module in eval mode.
    """
    steps = len(split.labels) // BATCH
    with (
        threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)),
        torch.random.fork_rng(devices=[]),
        _bar("training the demo model", EPOCHS * steps) as tick,
    ):
        torch.manual_seed(SEED)
        module = build().train()
        optimizer = torch.optim.SGD(module.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, EPOCHS * steps, pct_start=0.25)
        for epoch in range(EPOCHS):
            shown = transformed(split, jitter(), len(split.labels), SEED + epoch)
            order = np.random.default_rng(SEED + epoch).permutation(len(split.labels))
            for rows in order[: steps * BATCH].reshape(steps, BATCH):
                logits_NK = module(torch.from_numpy(shown.inputs[rows]))
                loss = cross_entropy(logits_NK, torch.from_numpy(shown.labels[rows]), label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                tick()
    return module.eval()


@contextmanager
def _bar(text: str, total: int) -> Iterator[Callable[[], None]]:
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(text, total=total)
        yield lambda: progress.advance(task)
