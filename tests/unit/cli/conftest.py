"""A trained tiny model and drifted traffic, made once."""

from pathlib import Path

import pytest

import tiny
from orchestrator.datasets import write_dataset


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with model.yaml, clean.parquet, drifted.parquet and eval.parquet (drifted)."""
    folder = tmp_path_factory.mktemp("stripes")
    tiny.prepare(folder)
    write_dataset(folder / "clean.parquet", *tiny.make(960, seed=11))
    write_dataset(folder / "drifted.parquet", *tiny.make(960, seed=12, drift=True))
    write_dataset(folder / "eval.parquet", *tiny.make(400, seed=13, drift=True))
    return folder
