"""What the tests of whole models share beside the fixture ``model``."""

QNN = "qnn:emulator=on,cluster=32"
PROMPT = list(range(40, 52))
