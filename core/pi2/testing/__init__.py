"""The conformance kit: subclass a kind's tests, name your class, and run pytest.

    from pi2.testing import BackendTests

    class TestMine(BackendTests):
        plugin = MyBackend

Needs ``pip install "pi2[testing]"``.  A test that a plugin cannot pass is a bug in it or in the kit; who has
to leave one out overrides it with ``@pytest.mark.xfail(reason=...)``.
"""

from pi2.testing.backend import BackendTests

__all__ = ["BackendTests"]
