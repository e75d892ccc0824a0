"""Matching the classes of the data to those of a teacher."""

import pytest
import torch

from rld_lightning.models.classes import class_positions, number_of_classes, read_class_map, select_classes
from rld_lightning.models.factory import create_model
from rld_lightning.models.libraries import published_classes

KNOWN = ["owl", "cat", "tabby", "dog"]


def test_classes_are_matched_by_name_by_number_and_by_the_class_map():
    assert class_positions(["cat", "owl"], KNOWN, 4, None) == [1, 0]
    assert class_positions(["cat", "owl"], KNOWN, 4, {"cat": "tabby"}) == [2, 0]
    assert class_positions(["cat", "owl"], None, 4, {"cat": 3, "owl": 1}) == [3, 1]


@pytest.mark.parametrize(
    ("classes", "known", "class_map", "words"),
    [
        (
            ["cat", "fox"],
            KNOWN,
            None,
            r"no class for 'fox' \('fox'\); say which of its 4, such as 'owl', 'cat', 'tabby', ",
        ),
        (["cat", "fox"], None, {"cat": 1}, "no class for 'fox'.*which has no names for them"),
        (["cat", "fox"], KNOWN, {"fox": 4}, r"no class for 'fox' \(4\)"),
        (["cat", "fox"], KNOWN, {"fox": True}, None),
        (["cat", "fox"], KNOWN, {"fix": "dog"}, r"names fix, which the data does not have\. Did you mean 'fox'"),
        (["cat", "fox"], KNOWN, {"fox": "cat"}, "are the same of the teacher's"),
    ],
)
def test_classes_without_a_position_are_named(classes, known, class_map, words):
    if words is None:  # True equals 1 in Python
        words = "are the same of the teacher's"
    with pytest.raises(ValueError, match=words):
        class_positions(classes, known, 4, class_map)


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "torchvision/squeezenet1_1"])
def test_selected_classes_have_the_logits_of_the_whole_network(name):
    whole = create_model(name, 7).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            select_classes(whole, name, [5, 0, 3], 7).eval()(images), whole(images)[:, [5, 0, 3]]
        )
    assert number_of_classes(name, whole.state_dict()) == 7
    assert number_of_classes(name, {"other": torch.zeros(3)}) is None


def test_a_map_may_be_a_file(tmp_path):
    (tmp_path / "map.csv").write_text('cat,"tabby, tabby cat"\ndog,207\n')
    assert read_class_map(tmp_path / "map.csv") == {"cat": "tabby, tabby cat", "dog": 207}
    (tmp_path / "map.csv").write_text("cat\n")
    with pytest.raises(ValueError, match="has other lines than"):
        read_class_map(tmp_path / "map.csv")
    with pytest.raises(FileNotFoundError, match="class_map names"):
        read_class_map(tmp_path / "gone.csv")
    (tmp_path / "map.csv").write_text("cat,7\n", encoding="utf-8-sig")  # as Excel writes it
    assert read_class_map(tmp_path / "map.csv") == {"cat": 7}
    (tmp_path / "map.csv").write_text("cat,7\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"map.csv is not text in UTF-8: save it in that encoding"):
        read_class_map(tmp_path / "map.csv")
    (tmp_path / "map.csv").write_text(f"cat,{'x' * 200_000}\n")
    with pytest.raises(ValueError, match=r"map.csv has other lines than"):
        read_class_map(tmp_path / "map.csv")


def test_pretrained_classes_have_names():
    assert (
        published_classes("torchvision/resnet18")[207] == published_classes("timm/resnet18")[207] == "golden retriever"
    )
    assert published_classes("resnet8") is None
