"""scripts/export.py: exported files, each opened by the library that reads it."""

import json
from dataclasses import asdict
from functools import partial

import pytest
import torch
import yaml
from helpers.configs import compose
from helpers.data import ready, write_jpegs
from helpers.exports import digits_facts, digits_run
from safetensors.torch import load_file

from rld_lightning.data import ImageFolderDataModule
from rld_lightning.errors import UserError
from rld_lightning.models import create_model
from rld_lightning.models.onnx_file import OnnxNetwork
from rld_lightning.models.preprocessing import Preprocessing
from rld_lightning.models.student import load_student
from rld_lightning.models.weights.save import save_weights
from rld_lightning.reporting.networks import Network, read_networks, write_networks
from rld_lightning.tasks.export import _pictures, _sample, export, export_run

options = partial(compose, name="export", resolve=False)


def test_weights_with_their_card(tmp_path, capsys):
    network = digits_run(tmp_path / "run")
    found = export(options(f"run={tmp_path / 'run'}", "formats=[safetensors]", "val_images=100"))
    folder = tmp_path / "run" / "export"
    (file,) = found.files
    assert (file.images, file.agreement, file.max_difference, file.top1) == (100, 100, 0, file.torch_top1)
    assert json.loads((folder / "export.json").read_text())["files"][0]["sha256"] == file.sha256
    tensors = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensors[key], value) for key, value in network.state_dict().items())
    assert load_student(folder).classes == list("0123456789")
    header, card = (folder / "README.md").read_text().split("---\n")[1:3]
    assert yaml.safe_load(header)["model-index"][0]["results"][0]["metrics"][0]["value"] == 60.0
    assert "| top-1 % | 60.00 | 68.00 |" in card
    assert "| loss | rld (RLD) |" in card
    assert str(tmp_path) not in card
    assert "compared with PyTorch on 100 test images of digits" in (said := capsys.readouterr().out)
    assert "earlier export" not in said
    (folder / "model.pt2").write_bytes(b"")
    export_run(tmp_path / "run", ["safetensors"], val_images=0)
    assert "model.pt2 in " in (said := " ".join(capsys.readouterr().out.split()))
    assert "of an earlier export" in said


def test_names_add_no_markup_to_a_card(tmp_path):
    digits_run(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary |= {"dataset": "<img src=x>|[a](b)\n# c", "teacher_sha256": "`\n\n<img src=x>"}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    environment["commit"] = "`<img src=x> | [a](b)"  # as if it were code of ours
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))
    export_run(tmp_path / "run", ["safetensors"], val_images=0)
    header, card = (tmp_path / "run" / "export" / "README.md").read_text().split("---\n", 2)[1:]
    data = yaml.safe_load(header)["model-index"][0]["results"][0]["dataset"]
    assert (data["name"], data["type"]) == (summary["dataset"], "img-src-x-a-b-c")  # an id of the Hub
    assert "<img" not in card.replace("\\<", "")
    assert "[a](" not in card
    assert "\n# c" not in card


def test_card_has_the_table_of_the_networks(tmp_path):
    digits_run(tmp_path / "run")
    names, roles = ("a|b<img src=x>\n# c", "resnet8", "resnet8"), ("teacher", "student alone", "distilled student")
    networks = [
        Network(
            role,
            name,
            "test",
            360,
            95.5,
            None,
            0.25,
            1.5,
            None if role == "teacher" else 78042,
            None,
            320168,
            0.8,
            "a CPU",
        )
        for role, name, own in zip(roles, names, (None, 78042, 78042), strict=True)
    ]
    write_networks(tmp_path / "run", networks)
    assert read_networks(tmp_path / "run") == networks
    export_run(tmp_path / "run", ["safetensors"], val_images=0)
    card = (tmp_path / "run" / "export" / "README.md").read_text().split("---\n", 2)[2]
    assert "|  | teacher | student alone | distilled student |" in card
    assert "| network | a\\|b\\<img src=x\\> # c | resnet8 | resnet8 |" in card
    assert "| parameters, M | - | 0.08 | 0.08 |" in card
    assert "| one image, ms | 0.80 | 0.80 | 0.80 |" in card
    assert "on the 360 images of the test split" in card


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("{", "not JSON"),
        ("{}", "not a list"),
        ('[{"role": "teacher"}]', "whose bytes"),
        ('[{"role": "somebody"}]', "whose bytes"),
        ("[" * 100_000, "not JSON"),
        (lambda one: one | {"top1": float("nan")}, "whose top1"),
        (lambda one: one | {"name": ["x"]}, "whose name"),
        (lambda one: one | {"role": "boss"}, "whose role"),
        (lambda one: one | {"images": 1.5}, "whose images"),
        (lambda one: one | {"top1": 1e9}, "whose top1"),
        (lambda one: one | {"ece": 100.5}, "whose ece"),
        (lambda one: one | {"milliseconds": 10**400}, "whose milliseconds"),
    ],
)
def test_networks_of_a_foreign_run_are_plain_values_in_range(tmp_path, text, about):
    if callable(text):
        text = json.dumps([text(asdict(Network("teacher", "x", "test", 1, 1.0, 1.0, 1.0, 1.0, 1, 1, 1, 1.0, "a CPU")))])
    (tmp_path / "networks.json").write_text(text)
    with pytest.raises(ValueError, match=about):
        read_networks(tmp_path)


def test_libraries_read_their_own_networks(tmp_path):
    timm = pytest.importorskip("timm", minversion="1.0.31")  # earlier ones read pickles alone from a folder
    network = digits_run(tmp_path / "run", "timm/mobilenetv3_small_050", size=32)
    export_run(tmp_path / "run", ["safetensors"], out=tmp_path / "hub", val_images=0)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(theirs(images), network(images))
    config = timm.data.resolve_model_data_config(theirs)
    assert (*config["input_size"], config["crop_pct"], config["interpolation"]) == (3, 32, 32, 1.0, "bilinear")
    assert config["mean"] == pytest.approx((0.3054,) * 3)


def test_mistakes_end_in_a_sentence(tmp_path, monkeypatch):
    digits_run(tmp_path / "run")
    with pytest.raises(UserError, match="is not the directory of a finished run"):
        export(options(f"run={tmp_path}"))
    with pytest.raises(ValueError, match="tflite is not known; choose of safetensors, onnx, onnx_int8, torch_export"):
        export_run(tmp_path / "run", ["tflite"])
    broken = create_model("resnet8", 10)
    torch.nn.init.constant_(broken.fc.bias, torch.nan)
    file = (tmp_path / "run" / "student.safetensors").rename(tmp_path / "own.safetensors")
    save_weights(broken, tmp_path / "run" / "student.safetensors", digits_facts("resnet8"))
    with pytest.raises(ValueError, match="has logits that are not numbers: check how its weights"):
        export_run(tmp_path / "run", ["safetensors"], val_images=4)
    file.replace(tmp_path / "run" / "student.safetensors")
    monkeypatch.setattr("rld_lightning.tasks.export.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "rld-lightning\[onnx\]", or leave them out of formats='):
        export(options(f"run={tmp_path / 'run'}"))
    (tmp_path / "file").touch()
    monkeypatch.setattr("rld_lightning.tasks.export._Writer", None)  # nothing is written, nor is anything measured
    for place, told in (
        ("file/out", "is not a folder; choose another one with out="),
        ("x" * 300, "cannot be read or"),
    ):
        with pytest.raises(UserError, match=told):
            export(options(f"run={tmp_path / 'run'}", "formats=[safetensors]", f"out={tmp_path / place}"))
    (tmp_path / "out").mkdir()
    (tmp_path / "run" / "export").symlink_to(tmp_path / "out")
    with pytest.raises(ValueError, match=r"is a link out of .*: give out= yourself"):
        export_run(tmp_path / "run", ["safetensors"])
    assert not list((tmp_path / "out").iterdir())


def test_data_other_than_those_of_the_student_are_refused(tmp_path):
    digits_run(tmp_path / "run")
    from rld_lightning.models.weights.save import save_weights

    facts = {"name": "resnet8", "class_names": list("abcdefghij"), "image_shape": [3, 8, 8]}
    facts |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    save_weights(create_model("resnet8", 10), tmp_path / "run" / "student.safetensors", facts)
    with pytest.raises(ValueError, match=r"other classes than .*class 0 is 'a' there and '0' here.*root="):
        export_run(tmp_path / "run", ["safetensors"])


def test_files_that_resize_are_compared_on_original_images(tmp_path):
    for number, size in enumerate([(50, 37), (50, 37), (20, 90)]):
        write_jpegs(tmp_path / "parts" / str(number), {"train": 1, "val": 2}, size=size, ending=".jpg")
        for file in (tmp_path / "parts" / str(number)).rglob("*.jpg"):
            place = tmp_path / "all" / file.parent.relative_to(tmp_path / "parts" / str(number))
            place.mkdir(parents=True, exist_ok=True)
            file.rename(place / f"{number}{file.name}")
    data = ready(ImageFolderDataModule(tmp_path / "all", image_size=16, resize=20, num_workers=0))
    transform = Preprocessing((16, 16), data.eval_resize, data.mean, data.std)
    sample = _sample(data, 5)
    batches = list(_pictures(data, sample.positions))
    assert len({batch.shape[1:] for batch in batches}) == 2
    seen = torch.cat([transform.normalize(transform.crop(batch.permute(0, 3, 1, 2))) for batch in batches])
    assert torch.equal(seen, sample.images)


@pytest.mark.parametrize(
    ("pixels", "any_size"), [(False, True), (True, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_all_formats_match_the_student(tmp_path, pixels, any_size):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    network = digits_run(tmp_path / "run")
    formats = ["safetensors", "onnx", "onnx_int8", "torch_export"]
    found = export_run(tmp_path / "run", formats, val_images=None, train_images=100, pixels=pixels, any_size=any_size)
    assert [file.format for file in found.files] == formats
    assert {file.images for file in found.files} == {360}
    for file in found.files:
        assert file.max_difference < (2 if file.format == "onnx_int8" else 1e-4)
        assert file.agreement > (80 if file.format == "onnx_int8" else 99)
    folder = tmp_path / "run" / "export"
    transform = load_student(folder).transform
    images = torch.stack([transform(torch.randint(256, (3, 8, 8), dtype=torch.uint8)) for _ in range(3)])
    taken = transform.denormalize(images).permute(0, 2, 3, 1).contiguous() if pixels else images
    wanted = network(images).softmax(1) if pixels else network(images)
    torch.testing.assert_close(OnnxNetwork(folder / "model.onnx")(taken), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.export.load(folder / "model.pt2").module()(taken), wanted, rtol=1e-3, atol=1e-4)
    assert OnnxNetwork(folder / "model.int8.onnx").facts.class_names == list("0123456789")
    (given,) = onnxruntime.InferenceSession(folder / "model.onnx").get_inputs()
    size = ["height", "width"] if any_size else [8, 8]
    assert given.shape == (["batch", *size, 3] if pixels else ["batch", 3, 8, 8])
    assert "## Files" in (folder / "README.md").read_text()


@pytest.mark.parametrize("held_out", [0.0, 0.1])
def test_best_epoch_is_exported_beside_the_last_with_its_accuracy(tmp_path, capsys, held_out):
    run = tmp_path / "run"
    last = digits_run(run, held_out=held_out)
    torch.manual_seed(1)
    best = create_model("resnet8", 10).eval()
    torch.save(
        {
            "state_dict": {f"student.{key}": value for key, value in best.state_dict().items()},
            "hyper_parameters": {"student": "resnet8", "num_classes": 10},
        },
        run / "best.ckpt",
    )
    export(options(f"run={run}", "formats=[safetensors]"))
    assert "chosen" not in capsys.readouterr().out
    found = export(options(f"run={run}", "formats=[safetensors]", "checkpoint=best"))
    assert (found.checkpoint, found.folder) == ("best", str(run / "export_best"))
    for folder, network, top1 in (("export", last, 60.0), ("export_best", best, 60.1)):
        tensors = load_file(run / folder / "model.safetensors")
        assert all(torch.equal(tensors[key], value) for key, value in network.state_dict().items())
        header, card = (run / folder / "README.md").read_text().split("---\n")[1:3]
        assert yaml.safe_load(header)["model-index"][0]["results"][0]["metrics"][0]["value"] == top1
        assert f"| top-1 % | {top1:.2f} | 68.00 |" in card
        assert ("agreement with the teacher" in card) == (folder == "export")  # known of the last epoch alone
        images = "5,000 held-out training images (stratified)" if held_out else "the test split (10,000 images)"
        assert f"that of the {'best' if folder == 'export_best' else 'last'} epoch on {images}." in card
        assert ("The teacher's accuracy is too high if it was trained on these" in card) == (held_out > 0)
    assert load_student(run / "export_best").facts.top1 == 60.1
    assert ("chosen on the test split itself" in card) == (held_out == 0)
    assert ("The epoch was chosen by it" in card) == (held_out > 0)
    assert ("chosen on the test split itself" in capsys.readouterr().out) == (held_out == 0)


def test_invalid_best_epoch_is_refused_with_the_way_out(tmp_path):
    digits_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"has no best\.ckpt: .*checkpoint=last"):
        export(options(f"run={tmp_path / 'run'}", "formats=[safetensors]", "checkpoint=best"))
    (tmp_path / "run" / "best.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"is a checkpoint; .* run=.*run checkpoint=best"):
        export(options(f"run={tmp_path / 'run' / 'best.ckpt'}", "formats=[safetensors]"))
