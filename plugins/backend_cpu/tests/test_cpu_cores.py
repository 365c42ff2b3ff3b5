"""Threads on the cores that they were asked to run on."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from pi2.errors import OptionError
from pi2.tensor import Tensor
from pi2_backend_cpu.backend import CpuBackend
from pi2_backend_cpu.cores import fastest, parse_cores, speeds

CORES = sorted(os.sched_getaffinity(0))
FIRST = str(CORES[0])


def affinities():
    """Thread -> the cores that it may use."""
    found = {}
    for status in Path("/proc/self/task").glob("*/status"):
        lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        found[status.parent.name] = lines["Cpus_allowed_list"]
    return found


@pytest.mark.skipif(len(CORES) < 2, reason="there is one core only")
def test_every_thread_runs_on_its_core_and_the_caller_is_free_again():
    free, older = os.sched_getaffinity(0), set(affinities())
    backend = CpuBackend.open({"cpus": f"{CORES[1]}+{CORES[0]}"})
    weight = backend.place(Tensor.from_f32(np.ones((4096, 64), np.float32)))
    out = np.empty((1, 4096), np.float32)
    pinned, end = set(), time.monotonic() + 60
    while pinned != {FIRST} and time.monotonic() < end:  # a new thread may have to wait for its turn
        backend.linear(weight, np.ones((1, 64), np.float32), out)
        pinned = {cores for thread, cores in affinities().items() if thread not in older}
    assert pinned == {FIRST}
    assert os.sched_getaffinity(0) == free
    assert backend.describe().endswith(f"2 threads, int8, on cores {CORES[1]}+{CORES[0]}")
    backend.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cpus": "first"}, "names no cores"),
        ({"cpus": "5-4"}, "names no core, or one twice"),
        ({"cpus": f"{FIRST}+{FIRST}"}, "names no core, or one twice"),
        ({"cpus": "100000"}, "may not use core 100000"),
        ({"cpus": FIRST, "threads": "2"}, "2 threads cannot be pinned to 1 cores"),
    ],
)
def test_cores_that_cannot_be_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        CpuBackend.open(options)


def test_ranges_and_single_cores_are_read():
    assert parse_cores(FIRST) == [CORES[0]]
    assert parse_cores(f"{FIRST}-{FIRST}") == [CORES[0]]


def machine(root, **files):
    """A sysfs in which core n has the n-th of the numbers in each file."""
    for name, numbers in files.items():
        for core, number in zip(CORES, numbers, strict=False):
            path = root / f"cpu{core}" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{number}\n")
    return root


@pytest.mark.skipif(len(CORES) < 2, reason="there is one core only")
def test_the_fastest_cores_come_first(tmp_path):
    little_big = [300, *range(1000, 1000 + len(CORES))]
    root = machine(tmp_path, cpu_capacity=little_big, cpufreq__cpuinfo_max_freq=[9, *[1] * len(CORES)])
    assert speeds(CORES, root) == dict(zip(CORES, little_big, strict=False))
    assert fastest(1, root) == [CORES[-1]]
    assert fastest(len(CORES), root)[-1] == CORES[0]
    assert fastest(len(CORES) + 1, root) is None


def test_frequencies_stand_in_for_capacities_and_equal_cores_are_left_to_the_system(tmp_path):
    root = machine(tmp_path, cpufreq__cpuinfo_max_freq=[2000] * len(CORES))
    assert set(speeds(CORES, root).values()) == {2000}
    assert fastest(1, root) is None
    assert set(speeds(CORES, tmp_path / "nothing").values()) == {1}
