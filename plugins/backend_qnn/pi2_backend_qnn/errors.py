"""What can go wrong with the NPU, each with a name of its own.

QnnError               any of these; a PluginError, so the command line shows it with its hint
├── NotInstalled       the packages of the extra are missing
├── WrongVersion       packages, or compiled contexts, of versions that do not fit
├── WrongWeights       contexts have weights that are rounded otherwise than asked for
├── NoDevice           there is no NPU, and nobody asked for the emulator
├── WrongSoc           the SoC is unknown, or contexts were compiled for another one
├── LibraryMissing     a library of Qualcomm's could not be loaded
├── GraphRefused       QNN does not take a graph whole; never run on the CPU in its place
├── ContextDamaged     a file of compiled contexts is not what the manifest says
├── ContextMissing     these weights were not compiled
├── WorkerDied         the process that has QNN in it ended
└── WorkerTimeout      it did not answer in time, and was ended
"""

from __future__ import annotations

from pi2.errors import PluginError

DAMAGED = "a compiled context is damaged: "
"""How the worker begins what it says of a file that is not the manifest's."""
INSTALL = 'python3 -m pip install "pi2-backend-qnn[qnn]"'


class QnnError(PluginError):
    """Anything of this backend."""


class NotInstalled(QnnError):
    """The packages of the extra are missing."""


class WrongVersion(QnnError):
    """Packages, or compiled contexts, of versions that do not fit."""


class WrongWeights(QnnError):
    """Contexts have weights that are rounded otherwise than asked for."""


class NoDevice(QnnError):
    """There is no NPU, and nobody asked for the emulator."""


class WrongSoc(QnnError):
    """The SoC is unknown, or contexts were compiled for another one."""


class LibraryMissing(QnnError):
    """A library of Qualcomm's could not be loaded."""


class GraphRefused(QnnError):
    """QNN does not take a graph whole; it is never run on the CPU in its place."""


class ContextDamaged(QnnError):
    """A file of compiled contexts is not what the manifest says."""


class ContextMissing(QnnError):
    """These weights were not compiled."""


class WorkerDied(QnnError):
    """The process that has QNN in it ended."""


class WorkerTimeout(QnnError):
    """The process that has QNN in it did not answer in time, and was ended."""


def reason(error: str, said: str) -> QnnError:
    """The error that ONNX Runtime's exception and what its provider wrote on stderr stand for.

    The exception's text is generic; the true reason is among the lines on stderr.
    """
    both = f"{error}\n{said}"
    line = _telling_line(said) or error.strip().splitlines()[0]
    if error.startswith(DAMAGED):
        return ContextDamaged(error, hint="compile again: pi2 compile")
    if "cannot open shared object file" in both or "Unable to load backend" in both:
        return LibraryMissing(
            f"the library of QNN could not be loaded: {line}", hint=f"reinstall it: {INSTALL}"
        )
    if "QNN_DEVICE_ERROR_INVALID_CONFIG" in both or "14001" in both:
        return WrongSoc(
            f"QNN does not know this SoC, or may not talk to it: {line}",
            hint="see the plugin's README; on a device look at ADSP_LIBRARY_PATH and /dev/fastrpc*",
        )
    if "CREATE_FROM_BINARY" in both or "context binary info" in both:
        return ContextDamaged(
            f"QNN cannot read a compiled context: {line}", hint="compile again: pi2 compile"
        )
    return GraphRefused(f"QNN refuses a graph: {line}", hint="use another backend for this model")


def _telling_line(said: str) -> str | None:
    """The line of a log that says most: the first that names an error of QNN's, else the first error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    marks = ("shared object file", "QNN_", "REASON", "not supported", "rror")
    for mark in marks:
        for line in lines:
            if mark in line and "LIBNATIVE" not in line:
                return line.split("] ", 1)[-1].removesuffix("\x1b[m")[:300]
    return None
