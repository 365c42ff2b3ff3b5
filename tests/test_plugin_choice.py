"""Choosing among plugins: by name, else by the score of the probe."""

import pytest
from fake_dists import backend_source
from pi2.api import Probe
from pi2.config import Settings
from pi2.errors import PluginError
from pi2.plugins import Plugins, probe


def find(*names):
    """The built-ins and the named plugins, whatever else is installed."""
    return Plugins.installed(Settings(plugins=frozenset(names)))


def test_the_best_score_wins(install):
    install("toy-dist", backend_source("fast", score=1000))
    install("other-dist", backend_source("slow", score=999))
    assert find("toy", "other").pick("backends").name == "fast"


def test_a_name_wins_over_the_best_score(install):
    install("toy-dist", backend_source("fast", score=1000))
    assert find("toy").pick("backends", "numpy").name == "numpy"


def test_of_equals_the_first_name_wins_whatever_the_order_of_installation(install):
    install("toy-dist", backend_source("abel", score=1000), entry="z")
    install("other-dist", backend_source("cain", score=1000), entry="a")
    assert find("a", "z").pick("backends").name == "abel"


def test_a_misspelt_name_gets_the_nearest_as_a_hint():
    with pytest.raises(PluginError, match="there is no 'nunpy' among the backends") as refusal:
        find().pick("backends", "nunpy")
    assert refusal.value.hint == "did you mean 'numpy'?"


def test_a_name_like_no_other_gets_all_of_them_as_a_hint():
    with pytest.raises(PluginError) as refusal:
        find().pick("storage_tiers", "quux")
    assert refusal.value.hint == "there are: mmap"


def test_the_name_of_a_refused_plugin_gets_the_reason_as_a_hint(install):
    install("toy-dist", "raise RuntimeError('no SDK')")
    with pytest.raises(PluginError) as refusal:
        find("toy").pick("backends", "toy")
    assert refusal.value.hint == "the plugin 'toy' was refused: RuntimeError: no SDK"


def test_what_cannot_run_here_is_refused_with_its_own_reason(install):
    install("toy-dist", backend_source(score=0, reason="libtoy.so not found"))
    plugins = find("toy")
    assert plugins.pick("backends").name == "numpy"
    with pytest.raises(PluginError, match=r"toy cannot run here: libtoy\.so not found") as refusal:
        plugins.pick("backends", "toy")
    assert refusal.value.hint


def test_without_any_that_can_run_there_is_an_error():
    with pytest.raises(PluginError, match="none of the cache policies can run here"):
        Plugins().pick("cache_policies")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("raise OSError('no device')", "probe() raised OSError: no device"),
        ("return True", "probe() returned True, which is no Probe"),
    ],
)
def test_a_probe_that_breaks_its_promise_counts_as_cannot(install, answer, why):
    install("toy-dist", backend_source().replace('return Probe(5, "for a test")', answer))
    plugins = find("toy")
    assert probe(plugins.of("backends")["toy"]) == Probe(0, why)
    assert plugins.pick("backends").name == "numpy"
