"""Labels of capacities: text, or the number that papermill's -p makes of it."""

import pytest

from djinn_lib.errors import ConfigError
from djinn_lib.experiment.parameters import label
from djinn_lib.experiment.profile import load_profile


@pytest.mark.parametrize(
    ("value", "text"), [("25", "25"), (25, "25"), (25.0, "25"), (22.5, "22.5")]
)
def test_a_label_may_come_as_a_number(value, text):
    assert label(value) == text


def test_a_cell_is_found_by_a_number():
    assert load_profile("cpu").cell("paper", 25, "djinn").id == "paper-25-djinn"


@pytest.mark.parametrize("value", [None, "", True, ["25"]])
def test_what_is_no_label_is_refused(value):
    with pytest.raises(ConfigError, match="expected a label"):
        label(value)
