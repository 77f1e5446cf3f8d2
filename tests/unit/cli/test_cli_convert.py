import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.cli.main import run
from orchestrator.datasets import read_dataset
from orchestrator.spec import load_spec


def picture(path: Path, value: int, side: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(path)


def test_a_folder_per_class_becomes_labelled_rows_in_the_specs_order(stripes: Path, tmp_path: Path) -> None:
    for value, name in enumerate(["vertical", "horizontal"]):
        picture(tmp_path / "images" / name / "a.png", value)
    picture(tmp_path / "images" / "loose.png", 9, side=20)  # resized; no class
    target = tmp_path / "out.parquet"
    model = str(stripes / "model.yaml")
    assert run(["convert", str(tmp_path / "images"), str(target), "--model", model]) == 0
    data = read_dataset(target, load_spec(model))
    found = {int(image[0, 0, 0]): int(label) for image, label in zip(data.inputs, data.labels, strict=True)}
    assert found == {0: 1, 1: 0, 9: -1}


def test_images_of_several_sizes_need_a_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "images" / "a" / "1.png", 1)
    picture(tmp_path / "images" / "b" / "1.png", 1, side=8)
    arguments = ["convert", str(tmp_path / "images"), str(tmp_path / "out.parquet")]
    assert run(arguments) == 2
    assert "--size" in capsys.readouterr().err
    assert run([*arguments, "--size", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [8, 8, 3]


def test_an_npz_keeps_its_dtype_and_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(6, dtype=np.int16).reshape(3, 2), y=np.array([0, 2, 1]))
    assert run(["convert", str(tmp_path / "a.npz"), str(tmp_path / "a.parquet")]) == 0
    data = read_dataset(tmp_path / "a.parquet")
    assert data.inputs.dtype == np.int16
    assert data.labels is not None
    assert data.labels.tolist() == [0, 2, 1]


def test_a_pickled_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object))
    assert run(["convert", str(tmp_path / "a.npz"), str(tmp_path / "a.parquet")]) == 2


def test_a_table_with_empty_labels_becomes_float_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age,label,sum\n1,no,2.5\n3,,4\n5,yes,6\n")
    assert run(["convert", str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")]) == 0
    data = read_dataset(tmp_path / "a.parquet")
    assert data.inputs.tolist() == [[1, 2.5], [3, 4], [5, 6]]
    assert data.labels is not None
    assert data.labels.tolist() == [0, -1, 1]


def test_a_cell_that_is_no_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("age,label\nold,1\n")
    assert run(["convert", str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")]) == 2
    assert "old" in capsys.readouterr().err


def test_doctor_measures_a_model_and_probes_a_storage(
    stripes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(stripes / "model.yaml")
    assert run(["doctor", "--model", model, "--storage", str(tmp_path / "records"), "--json"]) == 0
    found = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(found) == {"spec", "weights", "reference", "parts", "embedding", "accuracy", "storage"}
    assert "head" in found["embedding"]["message"]
    assert found["reference"]["status"] == "warn"  # 900 rows
    assert all(row["status"] != "error" for row in found.values())


def test_doctor_names_what_is_wrong_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--model", str(tmp_path / "absent.yaml")]) == 1
    assert "absent.yaml" in capsys.readouterr().out
