"""A few of the interruptions of which ``make soak`` tries hundreds, each in separate processes."""

import pytest
from soak import TWO, Soak

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def soak(tmp_path_factory):
    return Soak(tmp_path_factory.mktemp("soak"), seed=1)


@pytest.mark.parametrize(
    ("promise", "arguments"),
    [
        ("kills_at_writes", (4,)), ("kills_at_steps", (3,)), ("kills_at_steps", (1, TWO)), ("signals", (3,)),
        ("flips", (2,)), ("full_disk", (2,)), ("long", (8,)),
    ],
)  # fmt: skip
def test_the_guarantees_hold(soak, promise, arguments):
    found = getattr(soak, promise)(*arguments)
    assert not found.broken
