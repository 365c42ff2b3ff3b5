"""What can go wrong in the worker, each with its own error; afterwards the next call works."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pi2.tensor import Tensor, encode
from pi2_backend_qnn import errors
from pi2_backend_qnn.backend import QnnBackend
from pi2_backend_qnn.client import Client
from pi2_backend_qnn.placed import Matrix
from pi2_backend_qnn.probe import probe

pytestmark = pytest.mark.skipif(not probe(), reason=probe().reason)
X = np.random.default_rng(1).standard_normal((1, 32), dtype=np.float32)


def weight(dtype="q4_0"):
    values = np.random.default_rng(0).standard_normal((8, 32), dtype=np.float32)
    return Tensor(encode(values, dtype), dtype, 32)


def product(backend, handle):
    out = np.full((1, 8), np.nan, np.float32)
    backend.linear(handle, X, out)
    return out.tobytes()


def state(process):
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def until(happens, seconds=10):
    """Whether it does in this time."""
    for _ in range(20 * seconds):
        if happens():
            return True
        time.sleep(0.05)
    return False


def stop(process_id):
    os.kill(process_id, signal.SIGSTOP)
    assert until(lambda: state(Path(f"/proc/{process_id}")) == "T")


@pytest.fixture
def backend():
    opened = QnnBackend.open({"emulator": "on", "deadline": "20"})
    yield opened
    opened.close()


def test_a_killed_worker_is_an_error_once(backend):
    handle = backend.place(weight())
    before = product(backend, handle)
    os.kill(backend._client.process_id, signal.SIGKILL)
    with pytest.raises(errors.WorkerDied, match="SIGKILL") as refusal:
        product(backend, handle)
    assert "starts a new one" in refusal.value.hint
    assert product(backend, handle) == before


def test_a_worker_that_crashes_is_an_error_once(backend):
    """By SIGSEGV, as QNN itself does with contexts that share weights."""
    handle = backend.place(weight())
    before = product(backend, handle)
    os.kill(backend._client.process_id, signal.SIGSEGV)
    with pytest.raises(errors.WorkerDied, match="SIGSEGV"):
        product(backend, handle)
    assert product(backend, handle) == before


def test_no_answer_in_time_is_an_error_once(backend):
    handle = backend.place(weight())
    before = product(backend, handle)
    backend._client._deadline = 0.5
    worker = backend._client.process_id
    stop(worker)
    with pytest.raises(errors.WorkerTimeout, match=r"within 0\.5 s") as refusal:
        product(backend, handle)
    assert "deadline" in refusal.value.hint
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    backend._client._deadline = 20
    assert product(backend, handle) == before


def test_ctrl_c_leaves_nothing_behind(backend):
    """The answer to a call that was given up is not taken for the next one's."""
    handle = backend.place(weight())
    before = product(backend, handle)
    stop(backend._client.process_id)
    restore = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            product(backend, handle)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, restore)
    os.kill(backend._client.process_id, signal.SIGCONT)
    assert [product(backend, handle) for _ in range(3)] == [before] * 3
    backend._client.reuse()
    assert backend._client._used == 0


def test_answers_that_come_together_are_all_noticed(backend):
    client = backend._client
    tickets = [client.ask({"do": "numbers"}) for _ in range(3)]
    time.sleep(0.3)  # until all are there
    assert until(lambda: all(client.poll(ticket) for ticket in tickets))
    assert [client.wait(ticket).values for ticket in tickets] == [{"numbers": []}] * 3


def test_a_worker_does_not_outlive_who_started_it():
    program = (
        "import os; from pi2_backend_qnn.backend import QnnBackend as B; b = B.open({'emulator': 'on'});"
        "print(b._client.process_id, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    worker = Path(f"/proc/{int(done.stdout)}")
    assert until(lambda: not worker.exists() or state(worker) == "Z")


def test_nor_does_a_worker_that_computes():
    program = (
        "import numpy as np; from pi2.tensor import Tensor; from pi2_backend_qnn.backend import QnnBackend;"
        "b, w = QnnBackend.open({'emulator': 'on'}), np.random.default_rng(0).standard_normal((4096, 4096));"
        "x = np.ones((128, 4096), np.float32); handle = b.place(Tensor.from_f32(w.astype('f4'), 'q4_0'));"
        "print(b._client.process_id, flush=True); b.linear(handle, x, np.empty_like(x))"  # for five seconds
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        worker = Path(f"/proc/{int(process.stdout.readline())}")
        time.sleep(1)
        assert state(worker) in "RS", "it ended before its parent"
        process.kill()
        assert until(lambda: not worker.exists() or state(worker) == "Z", seconds=2)


def test_a_missing_library_is_named(tmp_path):
    backend = QnnBackend.open({"emulator": "on", "library": str(tmp_path / "libQnnHtp.so")})
    with pytest.raises(errors.LibraryMissing, match=r"libQnnHtp\.so"):
        product(backend, backend.place(weight()))
    backend.close()


@pytest.mark.parametrize(
    ("soc", "error"), [("99999", errors.WrongSoc), ("30", errors.GraphRefused)], ids=["unknown", "too old"]
)
def test_what_qnn_says_to_a_soc_is_told(soc, error):
    client = Client(None, {"soc_model": soc}, 20)
    placed = Matrix(weight=weight())
    asked, arrays = placed.request((1, 1))
    asked |= {name: client.share(array) for name, array in arrays.items()}
    with pytest.raises(error) as refusal:
        client.call(asked | {"number": 1, "save": None})
    assert "QNN" in str(refusal.value)
    assert refusal.value.hint
    client.close()


def test_what_qnn_prints_is_not_taken_for_an_answer(backend, capfd):
    product(backend, backend.place(weight()))
    assert capfd.readouterr() == ("", "")
