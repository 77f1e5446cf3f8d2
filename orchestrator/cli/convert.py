"""`heal convert`: an image folder, an .npz or a .csv becomes the Parquet that everything else reads."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from orchestrator.cli.console import Json, out, show_json
from orchestrator.datasets import NO_LABEL, write_dataset
from orchestrator.errors import DataError, SpecError
from orchestrator.spec import ModelSpec, load_spec

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(convert)


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of images (one sub-folder per class), .npz or .csv.")],
    target: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    model: Annotated[Path | None, typer.Option(help="Model spec: gives shape, dtype, classes and columns.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the square images in pixels.")] = None,
    label_column: Annotated[str, typer.Option(help="Column of a .csv that holds the label.")] = "label",
    as_json: Json = False,
) -> None:
    """Write a dataset. Labels are optional: unlabelled rows get null."""
    spec = load_spec(model) if model else None
    if source.is_dir():
        inputs, labels = read_images(source, spec, size)
    elif source.suffix == ".npz":
        inputs, labels = read_npz(source, spec)
    elif source.suffix == ".csv":
        inputs, labels = read_csv(source, spec, label_column)
    else:
        raise SpecError(f"source must be a folder, an .npz or a .csv; got {source}")
    if spec is not None:
        inputs = _fitted(inputs, spec)
    write_dataset(target, inputs, labels)
    known = int((labels != NO_LABEL).sum())
    if as_json:
        show_json({"rows": len(inputs), "labelled": known, "shape": list(inputs.shape[1:]), "dtype": str(inputs.dtype)})
    else:
        out.print(f"{target}: {len(inputs)} rows of {inputs.dtype} {list(inputs.shape[1:])}, {known} labelled")


def read_images(folder: Path, spec: ModelSpec | None, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, 3) (or CHW, as the spec says); sub-folders name the classes, images beside them have none.

    Raises:
        DataError: no images, one that cannot be read, differing sizes without `size`, or a folder that is no class.
    """
    from PIL import Image, UnidentifiedImageError

    first = spec is not None and spec.layout == "CHW"
    if spec is not None and len(spec.input_shape) == 3:
        height, width = spec.input_shape[1:] if first else spec.input_shape[:2]
    else:
        height = width = size or 0
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    found = sorted({path.parent.name for path in files if path.parent != folder})
    classes = list(spec.classes) if spec is not None else found
    images, labels = [], []
    for path in files:
        try:
            with Image.open(path) as picture:
                shown = picture.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path} must be a readable image: {error}") from error
        images.append(np.asarray(shown.resize((width, height)) if height else shown))
        labels.append(NO_LABEL if path.parent == folder else _class(path.parent.name, classes))
    if not images:
        raise DataError(f"a folder must hold images ({', '.join(IMAGES)}); {folder} has none")
    if len({image.shape for image in images}) > 1:
        raise DataError(f"images must have one size; {folder} has several; give --size or --model")
    stacked = np.stack(images)
    return (stacked.transpose(0, 3, 1, 2) if first else stacked), np.array(labels, dtype=np.int64)


def read_npz(path: Path, spec: ModelSpec | None) -> tuple[np.ndarray, np.ndarray]:
    """Arrays `input` (or `x`, `images`) and optionally `label` (or `y`, `labels`).

    Raises:
        DataError: no such array, or the file cannot be read without unpickling.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            inputs = next((file[name] for name in ("input", "inputs", "x", "images") if name in file), None)
            labels = next((file[name] for name in ("label", "labels", "y") if name in file), None)
            names = ", ".join(file.files)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be an .npz of plain arrays: {error}") from error
    if inputs is None:
        raise DataError(f"{path} must hold an array named input; it holds {names or 'none'}")
    if inputs.ndim < 2 or inputs.dtype.kind not in "biuf":
        got = f"{inputs.dtype} {list(inputs.shape)}"
        raise DataError(f"{path}: input must be numbers of shape [N, ...], one instance a row; got {got}")
    if labels is None:
        return inputs, np.full(len(inputs), NO_LABEL, dtype=np.int64)
    flat = labels.reshape(-1)
    if flat.dtype.kind in "US":
        classes = list(spec.classes) if spec is not None else sorted(set(flat.tolist()))
        flat = np.array([_class(name, classes) for name in flat.tolist()])
    return inputs, flat


def read_csv(path: Path, spec: ModelSpec | None, label_column: str) -> tuple[np.ndarray, np.ndarray]:
    """A table with a header: float32 (N, columns); the label column may be absent, its cells may be empty.

    Raises:
        DataError: a column is missing, a cell is no number, or there are no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} must be a readable CSV file: {error}") from error
    if not rows:
        raise DataError(f"{path} must have a header and at least one row")
    columns = list(spec.columns) if spec is not None and spec.columns else [c for c in rows[0] if c != label_column]
    for column in columns:
        if column not in rows[0]:
            raise DataError(f"{path} must have a column {column!r}; it has {', '.join(rows[0])}")
    try:
        inputs = np.array([[float(row[column]) for column in columns] for row in rows], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: every cell but the label must be a number; {error}") from error
    names = [(row.get(label_column) or "").strip() for row in rows]
    if spec is not None:
        classes = list(spec.classes)
    else:
        known = {name for name in names if name}
        classes = [] if all(name.isdecimal() for name in known) else sorted(known)
    return inputs, np.array([_class(name, classes) for name in names], dtype=np.int64)


def _class(name: str, classes: list[str]) -> int:
    """Index of a class by name, or by number where it is no name; -1 for an empty text."""
    if not name:
        return NO_LABEL
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and (not classes or int(name) < len(classes)):
        return int(name)
    raise DataError(f"a label must be one of {', '.join(classes)}; got {name!r}")


def _fitted(inputs: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """The inputs in the spec's dtype; DataError where the shape differs or values would change."""
    if inputs.shape[1:] != spec.input_shape:
        raise DataError(f"inputs must have shape {list(spec.input_shape)} each; got {list(inputs.shape[1:])}")
    cast = inputs.astype(spec.numpy_dtype)
    if inputs.dtype.kind == "f" and cast.dtype.kind in "iu" and not np.array_equal(cast, inputs):
        raise DataError(f"inputs must be {spec.input_dtype}; the values are not whole numbers in its range")
    return cast
