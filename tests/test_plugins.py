"""The plugin seam: what is found, what is refused and why, and what is picked.

The plugins are real distributions on sys.path, found through importlib.metadata.
"""

import re
from pathlib import Path

import pytest
from fake_dists import backend_source, models_source
from pi2 import hookspecs
from pi2.config import Settings
from pi2.errors import PluginError
from pi2.plugins import KINDS, Plugins

HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("pi2_"))


def find(*names):
    """The built-ins and the named plugins, whatever else the tests' environment has installed."""
    return Plugins.installed(Settings(plugins=frozenset(names)))


def broken(install, source, dist="toy-dist"):
    """Why the plugin with this source is refused."""
    install(dist, source)
    plugins = find("toy")
    assert "numpy" in plugins.of("backends"), "it took the built-ins down"
    assert "toy" not in plugins.names
    return plugins.broken["toy"]


class TestFinding:
    def test_the_built_ins_are_there_without_any_plugin(self):
        plugins = find()
        assert plugins.names == ["builtin"]
        assert plugins.broken == {}
        assert "numpy" in plugins.of("backends")
        assert "mmap" in plugins.of("storage_tiers")
        assert "exact" in plugins.of("predictors")
        assert "lru" in plugins.of("cache_policies")

    def test_an_installed_plugin_is_found_with_its_version(self, install):
        module = install("toy-dist", backend_source(), version="3.4")
        plugins = find("toy")
        assert plugins.of("backends")["toy"].__module__ == module
        assert plugins.versions["toy"] == "toy-dist 3.4"
        assert plugins.hooks_of("toy") == ["pi2_backends"]

    def test_all_installed_plugins_are_found_without_settings(self, install):
        install("toy-dist", backend_source())
        assert "toy" in Plugins.installed().of("backends")

    def test_the_environment_restricts_what_is_loaded(self, install, monkeypatch):
        install("toy-dist", backend_source())
        install("other-dist", "raise SystemExit('this must not even be imported')")
        monkeypatch.setenv("PI2_PLUGINS", " toy , ")
        plugins = Plugins.installed(Settings.from_environment())
        assert plugins.names == ["builtin", "toy"]
        assert plugins.broken == {}

    def test_an_empty_restriction_loads_no_plugin(self, install, monkeypatch):
        install("toy-dist", backend_source())
        monkeypatch.setenv("PI2_PLUGINS", "")
        assert Plugins.installed(Settings.from_environment()).names == ["builtin"]

    def test_a_restriction_to_something_that_is_not_installed_is_reported(self):
        assert find("nonesuch").broken == {"nonesuch": "PI2_PLUGINS names it, but it is not installed"}


HOOK_SOURCES = {
    "pi2_backends": ("Backend", "place linear place_ffn ffn"),
    "pi2_cache_policies": ("CachePolicy", "touch victims evicted"),
    "pi2_model_formats": ("ModelFormat", "recognises load"),
    "pi2_predictors": ("Predictor", "predict"),
    "pi2_storage_tiers": ("StorageTier", "open_file read"),
}


class TestHooks:
    @pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "pi2_models"])
    def test_a_class_from_any_hook_can_be_picked(self, install, hook):
        base, methods = HOOK_SOURCES[hook]
        body = "\n".join(f"    def {method}(self, *args): ..." for method in methods.split())
        source = f"""
from pi2.api import {base}, Probe
from pi2.hookspecs import hookimpl
PI2_API_VERSION = 1
class Toy({base}):
    name = "toy"
    lossless = False
    probe = classmethod(lambda cls: Probe(1, "for a test"))
{body}
@hookimpl
def {hook}():
    yield Toy
"""
        module = install("toy-dist", source)
        assert find("toy").pick(hook.removeprefix("pi2_"), "toy").__module__ == module

    def test_models_are_named_with_their_directories(self, install, tmp_path):
        install("toy-dist", models_source("tiny", tmp_path))
        assert find("toy").models == {"tiny": tmp_path}

    def test_there_is_a_base_class_for_every_hook_but_models(self):
        assert {f"pi2_{kind}" for kind in KINDS} | {"pi2_models"} == set(HOOKS)
        assert set(HOOK_SOURCES) | {"pi2_models"} == set(HOOKS)

    @pytest.mark.parametrize("hook", HOOKS)
    def test_every_hook_is_documented(self, hook):
        assert re.search(r"\w.*\.  Collecting\.", getattr(hookspecs, hook).__doc__)
        readme = Path(__file__).parents[1] / "README.md"
        assert f"`{hook}`" in readme.read_text()


class TestRefusing:
    def test_a_misspelt_hook_is_named(self, install):
        source = backend_source().replace("pi2_backends", "pi2_backend")
        assert "unknown hook 'pi2_backend'" in broken(install, source)

    def test_the_hint_for_a_misspelt_hook_lists_the_hooks(self):
        class Wrong:
            PI2_API_VERSION = 1

            @hookspecs.hookimpl
            def pi2_backend(self): ...

        with pytest.raises(PluginError) as refusal:
            Plugins().add("wrong", Wrong())
        assert all(hook in refusal.value.hint for hook in HOOKS)

    def test_a_hook_with_an_argument_that_no_hook_has_is_named(self, install):
        source = backend_source().replace("def pi2_backends()", "def pi2_backends(device)")
        assert re.search("pi2_backends.*device", broken(install, source), re.DOTALL)

    def test_a_plugin_without_hooks_is_refused(self, install):
        source = backend_source().replace("@hookimpl", "")
        assert broken(install, source) == "toy implements no hook"

    def test_missing_methods_are_named_with_the_class(self, install):
        source = backend_source().replace("    def place(self, weight): ...\n", "")
        source = source.replace("    def ffn(self, ffn, x, out, rows=None): ...\n", "")
        assert broken(install, source) == "fake_toy_dist.Toy lacks ffn, place"

    def test_of_two_that_claim_one_name_both_are_named(self, install):
        install("bad-dist", backend_source("toy"))
        install("abc-dist", backend_source("toy"))
        plugins = find("bad", "abc")
        assert plugins.of("backends")["toy"].__module__ == "fake_abc_dist"
        said = "fake_bad_dist.Toy and fake_abc_dist.Toy both claim the name 'toy'"
        assert plugins.broken == {"bad": said}

    def test_no_plugin_takes_the_name_of_a_built_in(self, install):
        why = broken(install, backend_source("numpy"))
        assert "fake_toy_dist.Toy" in why
        assert "pi2.builtin.numpy_backend.NumpyBackend" in why

    def test_one_plugin_cannot_claim_a_name_twice(self, install):
        source = backend_source().replace("[Toy]", "[Toy, type('Other', (Toy,), {})]")
        assert "both claim the name 'toy'" in broken(install, source)

    def test_two_plugins_of_one_name_are_reported(self, install):
        install("toy-dist", backend_source("one"), entry="toy")
        install("other-dist", backend_source("two"), entry="toy")
        plugins = find("toy")
        assert len({"one", "two"} & set(plugins.of("backends"))) == 1
        assert plugins.broken == {"toy": "two plugins are called 'toy'"}

    def test_of_two_that_carry_one_model_both_are_named(self, install, tmp_path):
        install("abc-dist", models_source("tiny", tmp_path / "1"))
        install("toy-dist", models_source("tiny", tmp_path / "2"))
        plugins = find("abc", "toy")
        assert plugins.models == {"tiny": tmp_path / "1"}
        assert plugins.broken == {"toy": "toy and abc both carry a model 'tiny'"}

    @pytest.mark.parametrize(
        ("source", "why"),
        [
            ("raise RuntimeError('no SDK')", "RuntimeError: no SDK"),
            ("raise SystemExit('no SDK')", "SystemExit: no SDK"),
            ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
            ("this is no Python", "SyntaxError: invalid syntax"),
        ],
    )
    def test_a_plugin_that_raises_when_imported_is_quoted(self, install, source, why):
        assert broken(install, source).startswith(why)

    def test_a_hook_that_raises_is_quoted(self, install):
        source = backend_source().replace("return [Toy]", "raise OSError('no device')")
        assert broken(install, source) == "toy: a hook raised OSError: no device"

    def test_another_api_version_is_named_beside_ours(self, install):
        source = backend_source().replace("PI2_API_VERSION = 1", "PI2_API_VERSION = 99")
        assert "written for version 99 of the plugin API, this pi2 has 1" in broken(install, source)

    def test_a_missing_api_version_is_asked_for(self, install):
        source = backend_source().replace("PI2_API_VERSION = 1", "")
        assert broken(install, source) == "toy does not state PI2_API_VERSION"

    @pytest.mark.parametrize(
        ("returned", "why"),
        [
            ("[Toy()]", "which is no subclass of Backend"),
            ("['Toy']", "returned 'Toy', which is no subclass of Backend"),
            ("[int]", "returned <class 'int'>, which is no subclass of Backend"),
            ("Toy", "must return a list of classes, not <class 'fake_toy_dist.Toy'>"),
            ("'Toy'", "must return a list of classes, not 'Toy'"),
            ("{'toy': Toy}", "must return a list of classes"),
        ],
    )
    def test_what_is_no_list_of_backends_is_quoted(self, install, returned, why):
        assert why in broken(install, backend_source().replace("[Toy]", returned))

    def test_a_class_of_another_kind_is_refused(self, install):
        source = backend_source().replace("pi2_backends", "pi2_predictors")
        assert "which is no subclass of Predictor" in broken(install, source)

    def test_a_class_without_a_name_is_refused(self, install):
        source = backend_source().replace('name = "toy"', "pass")
        assert broken(install, source) == "fake_toy_dist.Toy has no name"

    def test_a_predictor_must_say_whether_it_is_lossless(self, install):
        source = """
from pi2.api import Predictor, Probe
from pi2.hookspecs import hookimpl
PI2_API_VERSION = 1
class Toy(Predictor):
    name = "toy"
    probe = classmethod(lambda cls: Probe(1, "for a test"))
    def predict(self, ffn, x): ...
@hookimpl
def pi2_predictors():
    return [Toy]
"""
        assert broken(install, source) == "fake_toy_dist.Toy does not say whether it is lossless"

    def test_models_must_be_a_mapping(self, install):
        source = models_source("tiny", "x").replace("return {", "return ['tiny'] or {")
        assert "pi2_models must return a mapping" in broken(install, source)

    def test_a_refused_plugin_leaves_no_trace_and_the_others_working(self, install):
        install("toy-dist", backend_source("good"))
        half = backend_source("half") + "\n@hookimpl\ndef pi2_predictors(): return [Toy]\n"
        install("half-dist", half)
        install("worst-dist", "raise RuntimeError")
        plugins = find("toy", "half", "worst")
        assert plugins.names == ["builtin", "toy"]
        assert sorted(plugins.broken) == ["half", "worst"]
        assert plugins.pick("backends", "good").name == "good"
        assert "half" not in plugins.of("backends")
