"""The conformance kit: subclass a kind's tests, name your class, and run pytest.

    from pi2.testing import BackendTests

    class TestMine(BackendTests):
        plugin = MyBackend

Needs ``pip install "pi2[testing]"``.  A test that fails shows a bug in the plugin or in the kit; who has to
leave one out overrides it under ``@pytest.mark.xfail(reason=...)``, so that the report says why.
"""

from pi2.testing.backend import BackendTests
from pi2.testing.cache import CachePolicyTests
from pi2.testing.model_format import ModelFormatTests
from pi2.testing.predictor import PredictorTests
from pi2.testing.storage import StorageTierTests

__all__ = ["BackendTests", "CachePolicyTests", "ModelFormatTests", "PredictorTests", "StorageTierTests"]
