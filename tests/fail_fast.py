"""Settings of hypothesis for tests that are meant to fail: always the same examples, none of them shrunk."""

from hypothesis import Phase, settings

settings.register_profile("fail_fast", phases=[Phase.generate], derandomize=True, database=None)
settings.load_profile("fail_fast")
