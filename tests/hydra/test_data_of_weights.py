"""The data of a file of weights, before a configuration is composed."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from rld_lightning.hydra.data_of_weights import data_of


@pytest.mark.parametrize(
    ("dataset", "options", "found"),
    [
        ("digits", (), ("data=digits",)),
        ("digits", ("data=cifar100",), ()),
        ("photos", (), ()),  # a folder, which has to be named
        ("../digits", (), ()),
        (None, (), ()),
    ],
)
def test_an_export_says_what_it_was_trained_on(tmp_path, dataset, options, found):
    path = tmp_path / "seed=1" / "student.safetensors"
    path.parent.mkdir()
    save_file({"w": np.zeros(1)}, path, metadata={"dataset": dataset} if dataset else None)
    assert data_of([f"weights='{path}'", *options]) == found
    for weights in (path, path.parent, f"{path}::student", path.with_name("last.ckpt")):
        assert data_of([f"weights={weights}", *options]) == found
    path.rename(path.with_name("model.safetensors"))  # an export
    assert data_of([f"weights={path.parent}", *options]) == found


def test_what_is_no_export_is_left_to_the_script(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for weights in ("broken.safetensors", "missing.safetensors", "last.ckpt"):
        assert data_of([f"weights={tmp_path / weights}"]) == ()
    assert data_of([]) == ()
