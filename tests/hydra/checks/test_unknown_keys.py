"""Error messages for unknown keys."""

import pytest

from rld_lightning.hydra.checks.unknown_keys import unknown_key

PREDICT = ["weights", "images", "top", "format", "hydra.run.dir"]
FIT = ["seed", "resume", "data.root", "data.batch_size", "recipe.epochs", "recipe.batch_size", "trainer.devices"]
FIT += ["recipe.optimizer.lr", "recipe.scheduler.gamma", "loss._target_", "loss.alpha", "loss.beta"]


@pytest.mark.parametrize(
    ("key", "known", "sentence"),
    [
        ("top_k", PREDICT, "top_k is not known; there are weights, images, top, format."),
        ("weight", PREDICT, "weight is not known. Did you mean weights?"),
        ("preprocessing", FIT, "preprocessing is not known; `--cfg all` prints all keys."),
        ("data.colour", FIT, "data.colour is not known; data has batch_size, root."),
        ("data.rot", FIT, "data.rot is not known. Did you mean data.root?"),
        ("recipe.lr", FIT, "recipe.lr is not known. Did you mean recipe.optimizer.lr?"),
        # Of other groups, only behind the group's own.
        (
            "loss.gamma",
            FIT,
            "loss.gamma is not known; loss has alpha, beta. Or did you mean recipe.scheduler.gamma?",
        ),
    ],
)
def test_an_unknown_key_is_told_with_those_that_there_are(key, known, sentence):
    assert unknown_key(key, known)[0] == sentence
