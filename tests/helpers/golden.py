"""Reads the golden numbers of the losses and compares with them; the tolerances are those of tests/golden/README.md."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.testing import assert_close

FOLDER = Path(__file__).parents[1] / "golden"
WARMUP = json.loads((FOLDER / "schedules.json").read_text())["warmup"]["cases"]


@dataclass(frozen=True)
class GoldenCase:
    """One case of ``losses.json`` or ``rld_stress.json``: inputs, hyper-parameters and expected results.

    Attributes:
        name: its file, without suffix.
        facts: its entry in the file.
    """

    name: str
    facts: dict[str, Any]

    def __getattr__(self, key):
        if key.startswith("_") or key not in self.facts:
            raise AttributeError(key)
        return self.facts[key]

    def __str__(self):
        return self.id

    @property
    def dtypes(self):
        """The dtypes to test."""
        if "input_dtype" in self.facts:
            return (getattr(torch, self.input_dtype),)
        if self.dtype == "float32":
            return (torch.float32,)
        return (torch.float64,) if self.id == "rkd/duplicate_rows" else (torch.float64, torch.float32)

    def tensors(self, dtype):
        """The arrays by field name, floating ones in ``dtype``; lists and mappings of arrays keep their form."""

        def load(entry):
            if isinstance(entry, list):
                return [load(key) for key in entry]
            if isinstance(entry, dict):
                return {name: load(key) for name, key in entry.items()}
            tensor = torch.from_numpy(_arrays(self.name)[entry].copy())
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return {field: load(entry) for field, entry in self.arrays.items()}

    def assert_value(self, actual, expected):
        """Compares a scalar, with the tolerance for the dtype of its computation."""
        if self.name == "rld_stress" and actual.dtype == torch.float32:
            tolerance = {"rtol": 1e-3, "atol": 1e-10}
        elif self.dtypes == (torch.float32,) or actual.dtype == torch.float64:
            tolerance = {"rtol": {"crd": 1e-6, "kdsvd": 1e-4}.get(self.method, 1e-9), "atol": 1e-11}
        else:
            loose = self.method == "pkt" or self.facts.get("scenario") == "flat_shifted"
            tolerance = {"rtol": 2e-4 if loose else 5e-5, "atol": 1e-5}
        assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), **tolerance)

    def assert_terms(self, terms):
        """Compares the method's own terms, named as in the file, and their sum."""
        assert set(terms) == set(self.expected["terms"])
        for name, expected in self.expected["terms"].items():
            self.assert_value(terms[name], expected)
        self.assert_value(sum(terms.values()), self.expected["distillation"])

    def assert_gradient(self, field, actual):
        """Compares the gradient with respect to ``field`` (a tensor or a list of tensors)."""
        expected = self.tensors(torch.float64)[f"grad_{field}"]
        if isinstance(expected, list):
            for one, expected_one in zip(actual, expected, strict=True):
                self._assert_gradient(one, expected_one)
        else:
            self._assert_gradient(actual, expected)

    def _assert_gradient(self, actual, expected):
        assert actual.isfinite().all()
        float64 = actual.dtype == torch.float64
        two_classes = self.name == "losses" and self.facts.get("num_classes") == 2
        if not float64 and two_classes and self.hyper["logit_standardization"]:
            return  # Two standardised logits have only an order: the true gradient is almost 0, the rest rounding.
        if self.name == "rld_stress":
            relative, absolute = (1e-6, 1e-11) if float64 else (1e-3, 1e-6)
        elif float64 or self.dtypes == (torch.float32,):
            relative, absolute = (1e-3 if self.method == "kdsvd" else 1e-6), 1e-11
        else:
            relative, absolute = 1e-3, 1e-5
        # The gradient of a half tensor has its dtype and is rounded once.
        rounding = 0.0 if float64 or actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
        assert_close(actual.double(), expected, rtol=rounding, atol=relative * expected.abs().max().item() + absolute)


def golden_cases(method=None, name="losses"):
    """The cases of ``losses.json`` (or ``rld_stress.json``), of one method or of all."""
    return [case for case in _cases(name) if method in (None, case.method)]


@cache
def _cases(name):
    return tuple(GoldenCase(name, facts) for facts in json.loads((FOLDER / f"{name}.json").read_text())["cases"])


@cache
def _arrays(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return dict(arrays)
