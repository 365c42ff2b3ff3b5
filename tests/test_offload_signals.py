"""Signals and lost files in the middle of a token: an end that is told, no hang, no wrong token later."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import offload_models as toys
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.container import read_manifest
from pi2.container.manifest import describe_member
from pi2.engine import Engine
from pi2.errors import StorageError
from pi2.offload_options import OffloadOptions
from pi2.testing.models import toy_architecture, write_toy_model

SLOW = "ufs:throttle=ufs40"
needs_ufs = pytest.mark.skipif(SLOW not in toys.STORAGES, reason="ufs cannot run here")
PROMPT, TOKENS = [5, 6, 7], [10, 11, 12, 13]
NO_END = [word for token in toy_architecture().eos_ids for word in ("--logit-bias", f"{token}=-inf")]
DEADLINE = 60  # seconds; what hangs is killed


def steps():
    return [PROMPT, *([token] for token in TOKENS)]


@needs_ufs
@pytest.mark.parametrize("backend", toys.BACKENDS)
@settings(deadline=None, max_examples=12)
@given(after=st.floats(0.0005, 0.03))
def test_an_interrupt_at_any_moment_costs_a_token_and_changes_none(backend, after):
    """The alarm of a timer ends a call of native code as Ctrl-C would."""
    with toys.engine("wide", backend=backend) as engine:
        session = engine.session()
        expected = np.stack([session.forward(step) for step in steps()])
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with toys.engine("wide", backend=backend, storage=SLOW, slots=170, prefetch="on") as engine:
            session, got = engine.session(), []
            for step in steps():
                n = len(session.seen)
                try:
                    signal.setitimer(signal.ITIMER_REAL, after)
                    logits = session.forward(step)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    session.cache.truncate(n)  # it may have come when the token was through
                    del session.seen[n:]
                    logits = session.forward(step)
                got.append(logits)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.stack(got).tobytes() == expected.tobytes()


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


@needs_ufs
@pytest.mark.parametrize("backend", toys.BACKENDS)
@pytest.mark.parametrize("harm", [replace, Path.unlink, lambda p: os.utime(p, ns=(1, 1))])
def test_weights_that_were_replaced_end_the_token_with_their_name(tmp_path, backend, harm):
    path = tmp_path / "model"
    shutil.copytree(toys.model("silu"), path)
    options = {"backend": backend, "storage": "ufs", "plugins": toys.PLUGINS}
    with Engine.open(path, offload=OffloadOptions(slots=170), **options) as engine:
        session = engine.session()
        session.forward(PROMPT)
        harm(path / "neurons.safetensors")
        for _ in range(2):
            with pytest.raises(StorageError, match=r"neurons\.safetensors") as raised:
                session.forward([3])
            assert raised.value.offset is not None
            assert raised.value.hint


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    arch = toy_architecture(max_context=1 << 20)
    return write_toy_model(tmp_path_factory.mktemp("models") / "endless.pi2", arch)


def running(model, tokens):
    """``pi2 run`` under a budget, in a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "pi2", "run", "--model", str(model), "--raw", "Once"]
    command += ["--memory", "2G", "--context", str(1 << 16), "--temperature", "8", "--seed", "3", *NO_END]
    return subprocess.Popen(
        [*command, "--max-tokens", str(tokens)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_ended_by_a_signal_leaves_nothing_behind(endless, sent, status):
    child = running(endless, 1 << 19)
    first = child.stdout.read(8)
    time.sleep(0.05)
    child.send_signal(sent)
    text, said = child.communicate(timeout=DEADLINE)
    assert child.returncode == status, said
    assert b"Traceback" not in said
    manifest = read_manifest(endless)
    assert all(describe_member(endless, name) == entry for name, entry in manifest.files.items())
    again = running(endless, 60)
    whole, _ = again.communicate(timeout=DEADLINE)
    assert again.returncode == 0
    n = min(len(whole), len(first + text)) - 8  # a character may have been open at the end
    assert whole[:n] == (first + text)[:n]
