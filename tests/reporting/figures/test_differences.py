"""Heat maps of students and teachers, compared with a loop over the samples."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rld_lightning.models import create_model
from rld_lightning.models.weights.read import read_weights
from rld_lightning.models.weights.save import save_weights
from rld_lightning.reporting.figures.differences import (
    DifferenceMap,
    difference_maps,
    draw_differences,
    logit_differences,
    write_differences,
)
from rld_lightning.reporting.figures.explain import choose_sample, write_explanation
from rld_lightning.reporting.figures.refine import default_rld, rld_of
from rld_lightning.reporting.frame import read_frame
from rld_lightning.reporting.logits import RunLogits
from rld_lightning.reporting.tables import sections
from rld_lightning.tasks.logit_reader import LogitReader


def test_differences_equal_the_published_loop():
    student, teacher, label = torch.randn(40, 5), torch.randn(40, 5), torch.arange(40) % 5
    expected = np.zeros((2, 5, 5))
    for logits, matrix in zip((student, teacher), expected, strict=True):
        for row, true in zip(logits.numpy(), label.tolist(), strict=True):
            matrix[true] += row / 8
    expected = np.abs(expected[0] - expected[1])
    cells = logit_differences(student, teacher, label)
    off = ~torch.eye(5, dtype=torch.bool)
    np.testing.assert_allclose(cells[off], expected[off.numpy()], rtol=1e-5, atol=1e-7)
    assert cells.diagonal().isnan().all()
    assert DifferenceMap("rld", 1, cells, list("abcde")).mean == pytest.approx(expected[off.numpy()].mean(), rel=1e-5)


def test_standardized_differences_ignore_scale_and_offset():
    student, teacher, label = torch.randn(40, 5), torch.randn(40, 5), torch.arange(40) % 5
    one = logit_differences(student, teacher, label, standardized=True)
    other = logit_differences(3 * student + 1, teacher, label, standardized=True)
    torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_class_without_samples_is_ignored():
    cells = logit_differences(torch.ones(3, 3), torch.zeros(3, 3), torch.tensor([0, 0, 2]))
    assert cells[1].isnan().all()
    assert DifferenceMap("rld", 1, cells, list("abc")).mean == 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_panels_share_a_scale_and_two_maps_have_a_difference(count):
    maps = [
        DifferenceMap(f"m{i}", 1, (i + 1) * torch.rand(4, 4).fill_diagonal_(torch.nan), list("abcd"))
        for i in range(count)
    ]
    figure = draw_differences(maps, "title")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == (3 if count == 2 else count)
    for one, image in zip(maps, images, strict=False):
        np.testing.assert_array_equal(image.get_array().filled(np.nan), one.cells.numpy())
        assert image.get_clim() == (0, pytest.approx(max(np.nanquantile(m.cells.numpy(), 0.995) for m in maps)))
    if count == 2:
        np.testing.assert_allclose(images[2].get_array().filled(np.nan), (maps[1].cells - maps[0].cells).numpy())
        assert images[2].get_clim()[0] == -images[2].get_clim()[1]


def test_networks_run_once_and_maps_are_averaged_over_seeds(make_run, save_networks, tmp_path, capsys):
    for method, seed in (("dkd", 0), ("rld", 0), ("rld", 1)):
        save_networks(make_run(method, seed=seed), seed)
    runs = read_frame([tmp_path / "runs"])[0]
    reader = LogitReader()
    section = sections(runs)[0][0]
    maps = difference_maps(section, ["dkd", "rld"], reader)
    assert capsys.readouterr().out.count("validation images") == 4  # three students and one teacher
    assert [(one.name, one.n) for one in maps] == [("dkd", 1), ("rld", 2)]
    read = [reader.read(run) for run in runs.query("method == 'rld'")["run"]]
    cells = [logit_differences(one.student, one.teacher, one.label) for one in read]
    torch.testing.assert_close(maps[1].cells, (cells[0] + cells[1]) / 2, equal_nan=True)
    with pytest.raises(ValueError, match=r"no finished run of resnet14 . resnet8 with loss=kd; choose among dkd, rld"):
        write_differences(tmp_path, runs, methods=["kd"], reader=reader)


def test_the_page_explains_an_image_of_a_run(make_run, save_networks, tmp_path):
    run, reader = make_run("rld"), LogitReader()
    save_networks(run)
    logits = reader.read(run)
    assert len(logits.label) == reader.data(run).val_size
    image = reader.image(run, 7)
    data = reader.data(run)
    split = data.splits[data.val_split]
    torch.testing.assert_close(image, split.images[7].float() / 255, atol=1e-5, rtol=0)
    page = write_explanation(tmp_path, run=run.folder, index=7, reader=reader)[-1].read_text()
    assert "RLD on validation image 7 of digits" in page
    assert "without RLD" not in page
    with pytest.raises(ValueError, match="no validation image --index 9999; choose 0 to"):
        write_explanation(tmp_path, run=run.folder, index=9999, reader=reader)


def test_the_page_mentions_another_loss_of_the_run(make_run, save_networks, tmp_path):
    run = make_run("kd")
    save_networks(run)
    page = write_explanation(tmp_path, run=run.folder, index=7, reader=LogitReader())[-1].read_text()
    assert "What RLD would pass on of validation image 7 of digits" in page
    assert "These networks were trained without RLD: shown is what loss=rld would pass on." in page


def test_the_default_rld_has_the_pairs_tuned_values(make_run):
    run = make_run("kd")
    assert rld_of(run) is None
    assert (default_rld(run).beta, default_rld(run).temperature) == (8, 4)
    run.config["model"]["tuned"] = {"lr": 0.1, "rld": {"beta": 0.5, "temperature": 1.0}}
    assert (default_rld(run).beta, default_rld(run).temperature) == (0.5, 1)
    run.config["model"]["tuned"] = {"rld": "${oc.env:HOME}"}
    with pytest.raises(ValueError, match=r"model\.tuned\.rld=\$\{oc\.env:HOME\}, which are no options"):
        default_rld(run)
    assert rld_of(make_run("rld", loss={"alpha": 3.0})).alpha == 3


def test_the_chosen_sample_distinguishes_the_methods():
    def logits(student, teacher):
        to_logits = lambda classes: torch.eye(3)[torch.tensor(classes)] * 5  # noqa: E731
        return RunLogits(to_logits(student), to_logits(teacher), torch.zeros(4).long(), torch.arange(4), list("abc"))

    assert choose_sample(logits([0, 1, 0, 0], [0, 1, 1, 0]))[0] == 2
    assert choose_sample(logits([0, 1, 1, 0], [0, 1, 1, 0]))[0] == 1
    assert "gets none wrong" in choose_sample(logits([0, 1, 1, 0], [0, 0, 0, 0]))[1]


def test_a_published_checkpoint_can_be_the_teacher(make_run, save_networks, tmp_path):
    run = make_run("rld")
    save_networks(run)
    weights = {"model": read_weights(tmp_path / "resnet14.safetensors").state_dict}  # without its name
    torch.save(weights, tmp_path / "ckpt_epoch_240.pth")
    moved = LogitReader(teacher=tmp_path / "ckpt_epoch_240.pth").read(run)
    torch.testing.assert_close(moved.teacher, LogitReader().read(run).teacher)


def test_a_teacher_gets_images_and_classes_as_in_training(make_run, save_networks, tmp_path):
    run, file = make_run("rld"), tmp_path / "resnet14.safetensors"
    save_networks(run)
    network = create_model("resnet14", 10)
    network.load_state_dict(read_weights(file).state_dict)
    names = list("9876543210")
    facts = {"name": "resnet14", "num_classes": 10, "class_names": names, "image_shape": [3, 16, 16]}
    save_weights(network, file, facts)  # its own order and size
    run.config["model"]["teacher"] |= {"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": "auto"}
    reader = LogitReader()
    found = reader.read(run)
    pixels = reader.data(run).splits["test"].images[:8].permute(0, 3, 1, 2) / 255
    images = F.interpolate((pixels - 0.5) / 0.25, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = network.eval()(images).flip(1)
    torch.testing.assert_close(found.teacher[:8], expected, rtol=1e-4, atol=1e-4)


def test_missing_weights_are_named(make_run):
    run = make_run("rld")
    with pytest.raises(FileNotFoundError, match=r"weights are not at .*resnet14\.safetensors"):
        LogitReader().read(run)
    with pytest.raises(ValueError, match="trained without a teacher"):
        LogitReader().read(make_run("ce"))
