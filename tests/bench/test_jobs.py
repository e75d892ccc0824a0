"""Processes measured in turn."""

import sys
import time

import pytest

from rld_lightning.bench.data import write_image_folder
from rld_lightning.bench.jobs import Contender, Job
from rld_lightning.bench.plain import images_of

STEPS = "import sys, time\nwhile True:\n    time.sleep(0.01)\n    open(sys.argv[1], 'a').write(f'{time.time()}\\n')"


def test_a_contender_runs_only_in_its_turn_and_is_killed_at_the_end(tmp_path):
    contender = Contender([sys.executable, "-c", STEPS, str(tmp_path / "times")], tmp_path)
    with contender.running():
        time.sleep(0.05)  # for a write in progress
        before = contender.times.read_text()
        time.sleep(0.1)
        assert contender.times.read_text() == before
        contender.measure(0.1, batch=64)
    assert contender.first_step > 0
    assert 640 < contender.rates[0] < 6400
    assert contender.process.returncode < 0


def test_a_contender_that_fails_shows_what_it_printed(tmp_path):
    contender = Contender([sys.executable, "-c", "raise SystemExit('no such data')"], tmp_path)
    with pytest.raises(RuntimeError, match="no such data"), contender.running():
        pass


def test_a_folder_of_images_is_written_once_and_the_plain_trainer_reads_it(tmp_path):
    root = tmp_path / "jpegs"
    (tmp_path / "jpegs.part" / "train").mkdir(parents=True)  # left by an interrupted call
    for _ in range(2):
        write_image_folder(root, classes=3, each=2, images=2)
    job = Job("imagefolder", str(root), "torchvision/resnet34", "torchvision/resnet18", 2)
    images = images_of(job)
    assert [label for _, label in images] == [0, 0, 1, 1, 2, 2]
    assert {image.shape for image, _ in images} == {job.shape}
    assert len(list(root.glob("val/*/*.jpg"))) == job.classes == 3
    assert not (tmp_path / "jpegs.part").exists()
