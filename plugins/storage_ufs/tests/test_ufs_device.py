"""The flash model on a clock of the test's own, against the published figures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.errors import OptionError
from pi2.testing.plugin import examples
from pi2_storage_ufs import native
from pi2_storage_ufs.device import DEVICES, UFS31, UFS40, Device, load_device

MIB = 1 << 20
LIB = native.library()


class Clocked:
    """A modelled device and its time."""

    def __init__(self, device, queues=1):
        self._device, self._at = LIB.pi2_ufs_device_open(device.native(), queues), 0.0

    def read(self, offset, nbytes, file=0, now=0.0):
        done = LIB.pi2_ufs_device_read(self._device, now, file, offset, nbytes)
        took, self._at = done - max(now, self._at), done
        return took

    def __enter__(self):
        return self

    def __exit__(self, *_):
        LIB.pi2_ufs_device_close(self._device)


def random_bandwidth(device, nbytes, span, queues=1):
    """Bytes per second of reads at random places within ``span`` bytes."""
    places = np.random.default_rng(1).integers(0, span // nbytes // 2, 400) * 2 * nbytes  # never in a row
    places[::64], places[1::64] = 0, span - nbytes
    with Clocked(device, queues) as clocked:
        warm = [clocked.read(int(at), nbytes) for at in places]
    return nbytes * 200 / sum(warm[200:])


def test_published_figures_of_ufs40():
    assert random_bandwidth(UFS40, 4096, 128 * MIB) == pytest.approx(1076.10e6, rel=0.02)
    assert random_bandwidth(UFS40, 4096, 512 * MIB) == pytest.approx(850e6, rel=0.05)
    assert random_bandwidth(UFS40, 512 * 1024, 128 * MIB) == pytest.approx(3500e6, rel=0.05)
    little = Device(core_factor=0.708)
    assert random_bandwidth(little, 4096, 128 * MIB) == pytest.approx(761.87e6, rel=0.02)
    assert random_bandwidth(UFS40, 4096, 128 * MIB, queues=4) == pytest.approx(0.6 * 1076.10e6, rel=0.02)


@pytest.mark.parametrize(("nbytes", "bandwidth"), [(4096, 450e6), (512 * 1024, 4e9), (MIB, 4e9)])
def test_sequential_reads_depend_on_the_block(nbytes, bandwidth):
    with Clocked(UFS40) as clocked:
        took = [clocked.read(i * nbytes, nbytes) for i in range(10)]
    assert nbytes / took[-1] == pytest.approx(bandwidth)


def test_small_reads_take_as_long_as_4_kib():
    with Clocked(UFS40) as one, Clocked(UFS40) as other:
        assert one.read(MIB, 512) == other.read(MIB, 4096)


@examples(100)
@given(
    reads=st.lists(
        st.tuples(st.integers(0, 1 << 30), st.integers(1, 1 << 21), st.integers(0, 2), st.floats(0, 1)),
        max_size=30,
    ),
    device=st.sampled_from((UFS40, UFS31)),
)
def test_one_queue_serves_one_read_after_the_other_and_forgets_idle_time(reads, device):
    slowest = min(device.random_small * device.far_factor, device.sequential_small)
    fastest = max(device.random_large, device.sequential_large)
    with Clocked(device) as clocked, Clocked(device) as again:
        now = 0.0
        for offset, nbytes, file, pause in reads:
            now += pause
            took = clocked.read(offset, nbytes, file, now)
            assert max(nbytes, 4096) / fastest * 0.999 <= took <= max(nbytes, 4096) / slowest * 1.001 + 1e-9
            assert again.read(offset, nbytes, file, now) == took  # the same, every time


def test_a_device_comes_by_name_or_from_a_file(tmp_path):
    assert load_device("ufs40") is DEVICES["ufs40"]
    assert load_device("ufs31").random_small == UFS40.random_small / 2
    (tmp_path / "mine.yaml").write_text("random_small: 5.0e+8\nfar_factor: 0.5\n")
    assert load_device(str(tmp_path / "mine.yaml")) == Device(random_small=5e8, far_factor=0.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "speed: 1",
        "random_small: fast",
        "random_small: 0",
        "far_factor: .nan",
        "a: [",
        "core_factor: true",
    ],
)
def test_a_file_that_describes_no_device_is_refused(tmp_path, text):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(OptionError) as refusal:
        load_device(str(tmp_path / "odd.yaml"))
    assert refusal.value.hint
