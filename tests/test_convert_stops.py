"""Conversion that is stopped: killed, interrupted, out of disk; it leaves nothing or all, and goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pi2
import pytest
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import open_model
from pi2.container.writer import JOURNAL
from pi2.convert import QuantPlan, convert
from pi2.errors import StorageError
from sources import Counting, RandomSource, contents, tiny

Q4 = QuantPlan.named("q4_0")
PATHS = [str(Path(pi2.__file__).parent.parent), str(Path(__file__).parent)]
# Converts in a process of its own; argument 2 is the step after which it kills itself, 3 the limit of a file.
CHILD = f"""
import os, resource, signal, sys
from pathlib import Path
sys.path[:0] = {PATHS!r}
from sources import RandomSource, tiny
from pi2.convert import QuantPlan, convert
from pi2.errors import Pi2Error

calls = 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in ("pwrite", "fsync", "open", "preadv"):
    setattr(os, name, counted(getattr(os, name)))
Path.rename, Path.unlink = counted(Path.rename), counted(Path.unlink)
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    convert(RandomSource(tiny()), Path(sys.argv[1]), QuantPlan.named("q4_0"))
except Pi2Error as e:
    sys.exit(f"{{type(e).__name__}}: {{e}} ({{e.hint}})")
print(calls)
"""


def child(destination, stop=0, *limit):
    command = [sys.executable, "-c", CHILD, str(destination), str(stop), *map(str, limit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return contents(convert(RandomSource(tiny()), tmp_path_factory.mktemp("whole") / "m", Q4))


def test_conversion_killed_at_any_moment_leaves_nothing_or_a_whole_model(tmp_path, undisturbed):
    done = child(tmp_path / "count")
    assert done.returncode == 0, done.stderr
    total = int(done.stdout)
    moments = sorted(
        set(np.random.default_rng(0).integers(1, total, 12).tolist()) | {1, total - 2, total - 1, total}
    )
    for moment in moments:
        path = tmp_path / f"m{moment}"
        assert child(path, moment).returncode == -signal.SIGKILL
        if path.exists():
            assert open_model(path, MmapTier(), verify=True).verified
        else:
            convert(RandomSource(tiny()), path, Q4)
        assert contents(path) == undisturbed
        assert not path.with_name(f"{path.name}.partial").exists()


def test_a_run_killed_again_and_again_gets_there(tmp_path, undisturbed):
    path, runs = tmp_path / "m", 0
    while not path.exists():
        runs += 1
        assert runs < 100
        child(path, 25)  # each run gets this far only because it does not repeat the finished steps
    assert runs > 1
    assert contents(path) == undisturbed


def test_interrupting_keeps_what_is_done(tmp_path, undisturbed):
    first = Counting(tiny(), fail_at=12)
    with pytest.raises(KeyboardInterrupt):
        convert(first, tmp_path / "m", Q4)
    assert not (tmp_path / "m").exists()
    second = Counting(tiny())
    assert contents(convert(second, tmp_path / "m", Q4)) == undisturbed
    repeated = set(first.asked) & set(second.asked)
    assert {name.rpartition(".ffn.")[0] for name in repeated} <= {"layers.0"}  # the FFN that was begun


@pytest.mark.parametrize("change", ["seed", "plan", "template"])
def test_another_source_or_plan_starts_over(tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        convert(Counting(tiny(), fail_at=9), tmp_path / "m", Q4)
    source = RandomSource(tiny(), seed=change == "seed", template="x" if change == "template" else None)
    source.provenance = RandomSource(tiny()).provenance  # the weights alone tell them apart
    plan = QuantPlan.named("q4_0", up="q8_0") if change == "plan" else Q4
    assert contents(convert(source, tmp_path / "m", plan)) == contents(convert(source, tmp_path / "n", plan))


def test_a_torn_or_damaged_journal_costs_no_correctness(tmp_path, undisturbed):
    damages = (lambda b: b[:-5], lambda b: b"", lambda b: b"\xff\xfe\n" + b, lambda b: b[:30])
    for i, damage in enumerate(damages):
        path = tmp_path / f"m{i}"
        with pytest.raises(KeyboardInterrupt):
            convert(Counting(tiny(), fail_at=12), path, Q4)
        journal = tmp_path / f"m{i}.partial" / JOURNAL
        journal.write_bytes(damage(journal.read_bytes()))
        assert contents(convert(RandomSource(tiny()), path, Q4)) == undisturbed


def test_a_data_file_cut_between_runs_starts_over(tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        convert(Counting(tiny(), fail_at=12), tmp_path / "m", Q4)
    with (tmp_path / "m.partial" / "dense.safetensors").open("r+b") as f:
        f.truncate(5000)
    assert contents(convert(RandomSource(tiny()), tmp_path / "m", Q4)) == undisturbed


def test_a_full_disk_is_one_clear_error_and_the_next_run_continues(tmp_path, undisturbed):
    result = child(tmp_path / "m", 0, 20_000)  # no file may grow beyond this
    assert result.returncode == 1
    assert result.stderr.startswith("StorageError: ")
    assert "continues where it stopped" in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(convert(RandomSource(tiny()), tmp_path / "m", Q4)) == undisturbed


def test_a_device_without_space_is_a_storage_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        convert(RandomSource(tiny()), tmp_path / "m", Q4)
    assert caught.value.path == tmp_path / "m.partial"


def test_a_file_that_is_cut_while_it_is_written_is_a_storage_error(tmp_path):
    class Cutting(RandomSource):
        def tensor(self, name):
            if ".ffn." in name:
                os.truncate(tmp_path / "m.partial" / "neurons.safetensors", 4096)
            return super().tensor(name)

    with pytest.raises(StorageError, match=r"neurons\.safetensors.*was cut"):
        convert(Cutting(tiny()), tmp_path / "m", Q4)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_won_after_the_other_converter_finished_does_not_count(tmp_path, monkeypatch, replaced):
    def finish_first(fd, how):
        (tmp_path / "m.partial").rename(tmp_path / "m")
        if replaced:
            (tmp_path / "m.partial").mkdir()

    monkeypatch.setattr("fcntl.flock", finish_first)
    with pytest.raises(StorageError, match="another conversion"):
        convert(RandomSource(tiny()), tmp_path / "m", Q4)
    assert not any((tmp_path / "m").iterdir())
