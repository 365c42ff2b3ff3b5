"""What goes wrong in the middle of a token costs that token: the next attempt has the right logits."""

import json
import os
import shutil
from contextlib import closing

import numpy as np
import offload_models as toys
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.builtin.exact_predictor import ExactPredictor
from pi2.builtin.mmap_tier import MmapTier
from pi2.container.reader import open_model
from pi2.engine import Engine
from pi2.errors import FormatError, StorageError
from pi2.memory import rss_bytes
from pi2.offload_options import OffloadOptions
from pi2.plugins import probe

UFS = toys.PLUGINS.of("storage_tiers").get("ufs")
HAS_UFS = UFS is not None and bool(probe(UFS))
PROMPT, DECODED = [5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15]


class Fuse:
    """Lets ``left`` reads pass, then raises ``error``, once."""

    left = None
    error: type[BaseException] = StorageError

    def burn(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                if self.error is StorageError:
                    raise StorageError("the device could not read", path=toys.folder())
                raise self.error


class FusedTier(MmapTier):
    """Fails when told to, instead of reading."""

    def __init__(self):
        super().__init__()
        self.fuse = Fuse()

    def read(self, file, ranges, into):
        self.fuse.burn()
        super().read(file, ranges, into)


if HAS_UFS:

    class FusedUfs(UFS):
        """The same with reads under way: a failed one is over, an interrupted one is not."""

        def __init__(self):
            super().__init__()
            self.fuse = Fuse()

        def wait(self, ticket):
            if self.fuse.error is StorageError:
                super().wait(ticket)
                self.fuse.burn()
            else:
                self.fuse.burn()
                super().wait(ticket)


def open_engine(tier, name="relu", **changes):
    model = open_model(toys.model(name), tier, views=False)
    backend = toys.part("backends", "numpy")
    options = OffloadOptions(**{"slots": toys.NEURONS + 20, "pipeline": "python", **changes})
    return Engine(model, backend, tier, ExactPredictor(), offload=options)


def attempt(session, fuse):
    """Logits of PROMPT and DECODED, where a step that fails is repeated."""
    results, failures = [], 0
    for step in (PROMPT, *([token] for token in DECODED)):
        try:
            logits = session.forward(step)
        except fuse.error:
            failures += 1
            logits = session.forward(step)
        results.append(logits)
    return np.stack(results), failures


def expected(name):
    with toys.engine(name) as engine:
        session = engine.session()
        return np.stack([session.forward(step) for step in (PROMPT, *([token] for token in DECODED))])


@pytest.mark.parametrize("name", ["relu", "wide"])
@pytest.mark.parametrize(
    "tier_class",
    [FusedTier, pytest.param("ufs", marks=pytest.mark.skipif(not HAS_UFS, reason="ufs cannot run here"))],
)
@settings(deadline=None, max_examples=12)
@given(
    left=st.integers(0, 25),
    error=st.sampled_from([StorageError, KeyboardInterrupt]),
    prefetch=st.sampled_from(["on", "off"]),
)
def test_a_token_that_fails_is_repeated_with_the_right_logits(name, tier_class, left, error, prefetch):
    tier = FusedUfs() if tier_class == "ufs" else tier_class()
    changes = {} if tier_class is FusedTier else {"prefetch": prefetch}
    with closing(tier), open_engine(tier, name, **changes) as engine:
        tier.fuse.left, tier.fuse.error = left, error
        got, failures = attempt(engine.session(), tier.fuse)
        burnt = tier.fuse.left is None
        only_a_guess = prefetch == "on" and error is StorageError and not failures
        assert failures == burnt or only_a_guess
    assert got.tobytes() == expected(name).tobytes()


@pytest.mark.parametrize("backend", toys.BACKENDS)
@pytest.mark.parametrize("storage", toys.STORAGES[:3])
def test_a_file_that_is_cut_short_ends_the_token_with_its_name(tmp_path, backend, storage):
    """Through the native pipeline, too, where backend and storage have one."""
    path = tmp_path / "model"
    shutil.copytree(toys.model("silu"), path)
    with Engine.open(
        path, backend=backend, storage=storage, plugins=toys.PLUGINS, offload=OffloadOptions(slots=170)
    ) as engine:
        session = engine.session()
        session.forward(PROMPT)
        os.truncate(path / "neurons.safetensors", 8192)
        for _ in range(2):  # an error, not a wrong token, also at the next attempt
            with pytest.raises(StorageError, match=r"neurons\.safetensors"):
                session.forward([3])


@pytest.mark.parametrize("storage", toys.STORAGES[:2])
def test_a_flipped_bit_is_found_before_the_first_token(tmp_path, storage):
    path = tmp_path / "model"
    shutil.copytree(toys.model("relu"), path)
    with (path / "neurons.safetensors").open("r+b") as f:
        f.seek(-500, os.SEEK_END)
        byte = f.read(1)
        f.seek(-500, os.SEEK_END)
        f.write(bytes([byte[0] ^ 4]))
    options = {"storage": storage, "plugins": toys.PLUGINS, "offload": OffloadOptions(slots=170)}
    with pytest.raises(FormatError, match=r"the checksum of neurons\.safetensors is wrong"):
        Engine.open(path, backend="numpy", verify=True, **options)
    with Engine.open(path, backend="numpy", verify=False, **options) as engine:
        assert not engine.model.verified


def test_closing_gives_the_memory_of_the_cache_back():
    for _ in range(2):  # the first time loads libraries
        before = rss_bytes()
        with toys.engine("wide", slots=10**6) as engine:
            toys.logits(engine, [1], list(range(60)))
        del engine
    assert rss_bytes() - before < 4 << 20


def test_a_trace_has_every_span_with_its_layer_and_cluster(tmp_path):
    with toys.engine("wide", slots=170, two_phase="on", trace=tmp_path / "t.json") as engine:
        toys.logits(engine, [1, 2], list(range(5)))
        engine.offloaded.take_count()
    events = json.loads((tmp_path / "t.json").read_text())
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["args"]["layer"] for e in spans} == {0, 1, 2}
    assert {e["name"] for e in spans} == {"gate read", "gate", "up/down read", "up/down"}
    assert all(e["dur"] >= 0 and {"layer", "cluster", "neurons"} == set(e["args"]) for e in spans)


def test_a_disk_that_is_full_ends_the_trace_and_not_the_run():
    with toys.engine("relu", slots=170, trace="/dev/full") as engine:
        got = toys.logits(engine, PROMPT, DECODED)
        engine.offloaded.take_count()
        assert any("the trace /dev/full ends early: No space left" in note for note in engine.notes)
    with toys.engine("relu") as engine:
        assert got.tobytes() == toys.logits(engine, PROMPT, DECODED).tobytes()


def test_a_trace_that_cannot_be_begun_is_an_error(tmp_path):
    place = tmp_path / "no" / "t"
    with pytest.raises(StorageError, match="No such file"), toys.engine("relu", slots=170, trace=place):
        pass
