"""What the tests of every kind share: how a subclass names its plugin, and what any plugin owes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings

from pi2.api import Plugin, Probe
from pi2.errors import OptionError, Pi2Error

# The tests are inherited, so hypothesis sees one test function called on many classes.
_INHERITED = (HealthCheck.differing_executors, HealthCheck.too_slow, HealthCheck.data_too_large)


def examples(count: int) -> settings:
    """Run a property ``count`` times, however slow the device is.

    ``pytest --hypothesis-profile`` scales every count: ``max_examples`` of the profile is the percentage.
    """
    scaled = max(1, count * settings().max_examples // 100)  # 100 is hypothesis' own default
    return settings(max_examples=scaled, deadline=None, suppress_health_check=_INHERITED)


class PluginTests:
    """Tests of what every plugin class has.  Subclasses of the kinds' tests set ``plugin``.

    ``options`` are passed to ``open``.  To run several implementations through one class, override the
    fixture ``implementation`` (class-scoped, since hypothesis refuses function-scoped fixtures).
    """

    plugin: ClassVar[type[Plugin]]
    options: ClassVar[Mapping[str, str]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def implementation(cls) -> type[Plugin]:
        """The class under test."""
        return cls.plugin

    @pytest.fixture(scope="class")
    @classmethod
    def runnable(cls, implementation: type[Plugin]) -> type[Plugin]:
        """The class under test, if it can run here; else its tests are skipped for its own reason."""
        if not (probe := implementation.probe()):
            pytest.skip(f"{implementation.name} cannot run here: {probe.reason}")
        return implementation

    def test_its_name_is_one_that_a_user_can_type(self, implementation: type[Plugin]) -> None:
        assert implementation.name == implementation.name.lower()
        assert implementation.name.replace("-", "_").isidentifier()

    def test_its_probe_gives_a_score_and_a_reason_and_repeats_itself(
        self, implementation: type[Plugin]
    ) -> None:
        probe = implementation.probe()
        assert isinstance(probe, Probe)
        assert probe.score >= 0
        assert probe.reason.strip()
        assert not probe.reason.rstrip().endswith(".")  # it is printed as a part of a line
        assert implementation.probe() == probe

    def test_an_unknown_option_is_refused(self, implementation: type[Plugin]) -> None:
        with pytest.raises(OptionError):
            implementation.open({"no_such_option": "1"})

    def test_it_opens_exactly_where_its_probe_says_so(self, implementation: type[Plugin]) -> None:
        """And closes twice; or refuses, with a hint that says what to do."""
        if implementation.probe():
            opened = implementation.open(self.options)
            opened.close()
            opened.close()
        else:
            with pytest.raises(Pi2Error) as refusal:
                implementation.open(self.options)
            assert refusal.value.hint
