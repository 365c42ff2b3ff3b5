"""The values of the plugin API: probes, and options given as text."""

import pytest
from pi2.api import Plugin, Probe
from pi2.errors import OptionError
from pi2.options import parse_options


class Configured(Plugin):
    """Takes one option of every type."""

    name = "configured"

    def __init__(self, depth: int = 1, share: float = 0.5, direct: bool = False, path: str | None = None):
        self.given = (depth, share, direct, path)

    @classmethod
    def probe(cls):
        return Probe(1, "for a test")


def test_a_probe_is_true_if_its_score_is():
    assert Probe(1, "runs")
    assert not Probe(0, "does not")


def test_open_turns_texts_into_what_the_constructor_is_annotated_with():
    options = {"depth": "8", "share": "0.25", "direct": "yes", "path": "/tmp/x"}
    assert Configured.open(options).given == (8, 0.25, True, "/tmp/x")
    assert Configured.open().given == Configured.open({}).given == (1, 0.5, False, None)


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "false", "0", "no", "NO"])
def test_truth_is_spelt_in_six_ways(text):
    assert parse_options(Configured, {"direct": text}) == {"direct": text.lower() in ("true", "1", "yes")}


def test_an_unknown_option_gets_the_known_ones_as_a_hint():
    with pytest.raises(OptionError, match="Configured has no option 'dept'") as refusal:
        Configured.open({"dept": "8"})
    assert refusal.value.hint == "its options: depth, direct, path, share"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"depth": "many"}, "option depth of Configured takes a int, not 'many'"),
        ({"depth": "1.5"}, "option depth of Configured takes a int, not '1.5'"),
        ({"share": ""}, "option share of Configured takes a float, not ''"),
        ({"direct": "maybe"}, "option direct of Configured takes a bool, not 'maybe'"),
    ],
)
def test_an_unusable_value_is_quoted_with_the_type_wanted(options, why):
    with pytest.raises(OptionError) as refusal:
        Configured.open(options)
    assert str(refusal.value) == why


def test_closing_what_holds_nothing_is_fine():
    opened = Configured.open()
    opened.close()
    opened.close()
