"""Two processes train on the same batches as one, from shards on a server."""

import pytest
import torch
from helpers.scripts import run_script
from helpers.shards import pack_folder, serve, write_images

pytest.importorskip("webdataset")
pytestmark = pytest.mark.slow  # each process imports Lightning

JOB = (
    "data=shards", "data.num_workers=1", "data.batch_size=6", "data.eval_batch_size=4", "data.streams=2",
    "data.mixed_shards=4", "model=single", "model.student.name=resnet8", "loss=ce", "recipe=quick", "recipe.epochs=2",
    "trainer.precision=32-true", "+callbacks.witness._target_=shard_jobs.Witness",
    "print_config=false", "callbacks.progress=null",
)  # fmt: skip


@pytest.fixture
def shards(tmp_path):
    write_images(tmp_path / "images")
    pack_folder(tmp_path / "images", tmp_path / "shards")
    return tmp_path / "shards"


def test_two_processes_get_the_batches_of_one(shards, tmp_path):
    seen = {}
    with serve(shards) as (address, requested):
        for world, trainer in ((1, ["trainer=cpu"]), (2, ["trainer=ddp_cpu", "trainer.devices=2"])):
            run = tmp_path / f"world_{world}"
            options = (f"data.root={address}", f"data.cache={run}/cache", *trainer, f"hydra.run.dir={run}")
            run_script("fit.py", *JOB, *options, folder=tmp_path)
            seen[world] = [torch.load(run / f"rank_{rank}.pt") for rank in range(world)]
    for epoch, (alone, *ranks) in enumerate(
        zip(seen[1][0]["trained"], *(rank["trained"] for rank in seen[2]), strict=True)
    ):
        together = [torch.cat(values) for values in zip(*ranks, strict=True)]
        size = len(alone[0])  # the last batch has three images, and is padded to four
        assert all(torch.equal(ours[:size], theirs) for ours, theirs in zip(together, alone, strict=True)), epoch
    for ranks in seen.values():
        validated = torch.cat([rank["validated"] for rank in ranks])
        assert torch.equal(validated.sort().values, torch.arange(18).repeat_interleave(2))
    tars = [name for name in requested if name.endswith(".tar")]
    assert len(tars) == 2 * len(set(tars))  # once for each run


def test_a_shard_truncated_during_a_run_ends_it_with_one_sentence(shards, tmp_path):
    with serve(shards) as (address, _):
        lost = shards / "train-000004.tar"
        lost.write_bytes(lost.read_bytes()[:3000])
        options = (f"data.root={address}", f"data.cache={tmp_path}/cache", "trainer=cpu", f"paths.runs={tmp_path}/runs")
        result = run_script("fit.py", *JOB, *options, folder=tmp_path, check=False)
    assert result.returncode == 2
    assert f"error: {address}/{lost.name} has 3,000 bytes instead of" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
