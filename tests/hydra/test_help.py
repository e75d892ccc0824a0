"""What --help says about the options."""

import re

import pytest
from helpers.configs import CONF, LOSSES, PAIRS, SINGLES

from rld_lightning.hydra.help import WIDTH, options_help


@pytest.fixture(scope="module")
def text():
    return options_help("fit")


def test_all_options_are_there_in_lines_of_80_columns(text):
    words = set(re.findall(r"[\w/]+", text))
    assert words >= {*LOSSES, *SINGLES, *PAIRS, "pair", "single", "digits", "rld_optuna", "joblib", "combined"}
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert len(text.splitlines()) < 120


def test_losses_and_networks_stand_in_their_families_with_a_few_words(text):
    logits, features = (text.index(family) for family in ("  On logits\n", "  On features\n"))
    assert logits < text.index("    rld            Refined Logit Distillation\n") < features
    assert features < text.index("    crd            Contrastive representation distillation\n")
    assert "    rld_mcd_g      rld alpha=0.0 mask=g\n" in text
    assert "    eadkd          DKD, samples weighted by entropy\n" in text
    assert "  Wide residual networks\n    wrn16_1, wrn16_2," in text


def test_what_is_no_group_of_a_script_is_not_listed(text):
    groups = re.findall(r"^(\w+)(?:=\w+)?$", text, re.MULTILINE)
    assert groups[:4] == ["data", "model", "loss", "recipe"]
    assert set(groups) < {path.name for path in CONF.iterdir()}
    assert not {"wandb_sweeps", "parts", "hydra"} & set(groups)
    assert re.findall(r"^(\w+)=", options_help("eval"), re.MULTILINE) == ["data", "trainer", "paths"]
