"""What the tests of damaged and hostile pi2 models share."""

import tracemalloc

import pytest
import yaml
from pi2 import inventory
from pi2.builtin.mmap_tier import MmapTier
from pi2.container import open_model
from pi2.container.manifest import describe_member
from pi2.convert import QuantPlan, convert
from pi2.errors import Pi2Error
from sources import RandomSource, tiny

HEADROOM = 6 << 20  # bytes; parsing a manifest of 256 KiB takes most of it


def sound_model(path):
    """A small model with everything that can be damaged."""
    source = RandomSource(tiny(n_layers=2, ffn_bias=True), template="{{ x }}")
    return convert(source, path, QuantPlan.named("q4_0"))


def use(path, verify):
    """Open a model and read everything in it."""
    tier = MmapTier()
    opened = open_model(path, tier, verify=verify)
    for name in inventory.dense_matrices(opened.architecture):
        opened.matrix(name).to_f32()
    for name in inventory.dense_vectors(opened.architecture):
        opened.vector(name).sum()
    for layer in range(opened.architecture.n_layers):
        opened.geometry.unpack(opened.bundles(layer))


def assert_refused(path, match=None, verify=None, kind=Pi2Error):
    """One Pi2Error that names the model and says what to do; no allocation beyond the size of the files."""
    size = sum(p.stat().st_size for p in path.iterdir() if p.is_file()) if path.is_dir() else 0
    tracemalloc.start()
    try:
        with pytest.raises(kind, match=match) as caught:
            use(path, verify)
        assert tracemalloc.get_traced_memory()[1] < 3 * size + HEADROOM
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def relist(path):
    """Make sizes and checksums of the manifest fit again, so that only deeper checks can object."""
    manifest = yaml.safe_load((path / "pi2.yaml").read_text())
    for name in manifest["files"]:
        entry = describe_member(path, name)
        manifest["files"][name] = {"bytes": entry.nbytes, "sha256": entry.sha256}
    (path / "pi2.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
