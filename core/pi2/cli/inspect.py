"""``pi2 inspect``: the facts of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi2.cli import options as o
from pi2.cli.output import human_bytes, print_json, print_table

if TYPE_CHECKING:
    from pi2.architecture import Architecture
    from pi2.container import PiModel
    from pi2.plugins import Plugins

Where = Annotated[
    str,
    typer.Argument(metavar="PATH", help="pi2 model, installed model, GGUF file, or Hugging Face directory."),
]
Verify = Annotated[bool, typer.Option("--verify", help="Compare all checksums, however large the model.")]


def command(path: Where, verify: Verify = False, json: o.Json = False) -> None:
    """Show the facts of a model: family, size, formats, bytes by part."""
    facts = describe(path, o.installed_plugins(), verify=verify)
    if json:
        print_json(facts)
        return
    rows = [[name.replace("_", " "), _text(name, value)] for name, value in facts.items() if name != "notes"]
    rows += [["note", note] for note in facts["notes"]]
    print_table(rows)


def describe(wanted: str, plugins: Plugins, *, verify: bool = False) -> dict[str, Any]:
    """Everything that ``--json`` prints.  Raises Pi2Error."""
    from pi2.model_choice import MANIFEST, find_model

    path = Path(wanted).expanduser()
    foreign = path.exists() and not (path / MANIFEST).is_file()
    if foreign and wanted not in plugins.models:
        return _describe_source(path, plugins)
    from pi2.container import open_model

    tier = plugins.pick("storage_tiers").open()
    try:
        model = open_model(find_model(wanted, plugins), tier, verify=verify or None)
        return _describe_model(model)
    finally:
        tier.close()


def _describe_model(model: PiModel) -> dict[str, Any]:
    manifest, geometry = model.manifest, model.geometry
    files = {name: entry.nbytes for name, entry in sorted(manifest.files.items())}
    return {
        "path": str(model.path),
        "format": "pi2 model",
        **_describe_architecture(model.architecture),
        "quantisation": dict(manifest.quantisation),
        "bytes": sum(files.values()),
        "bytes_by_part": bytes_by_part(model),
        "bytes_by_file": files,
        "bundle": {
            "stride": geometry.stride,
            "bytes": geometry.nbytes,
            "page": geometry.page,
            "segments": {name: list(place) for name, place in geometry.segments().items()},
        },
        "source": dict(manifest.source),
        "created_by": manifest.created_by,
        "chat_template": model.chat_template is not None,
        "checksums": "correct" if model.verified else "of the weights not compared: use --verify",
        "notes": list(manifest.notes),
    }


def bytes_by_part(model: PiModel) -> dict[str, int]:
    """Bytes of the weights: attention, embedding, head, norms and biases, FFNs, and padding of the files."""
    from pi2 import inventory

    parts: dict[str, int] = {}
    for name in inventory.dense_matrices(model.architecture):
        first = name.partition(".")[0]
        part = "attention" if first == "layers" else first
        parts[part] = parts.get(part, 0) + int(model.matrix(name).data.nbytes)
    parts["norms_and_biases"] = 4 * sum(inventory.dense_vectors(model.architecture).values())
    arch = model.architecture
    parts["ffn"] = arch.n_layers * arch.n_neurons * model.geometry.stride
    parts["headers_and_padding"] = model.nbytes - sum(parts.values())
    return parts


def _describe_source(path: Path, plugins: Plugins) -> dict[str, Any]:
    source = o.load_source(path, plugins)
    members = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]
    return {
        "path": str(path),
        "format": source.provenance.get("format", "unknown"),
        **_describe_architecture(source.architecture),
        "bytes": sum(p.stat().st_size for p in members),
        "source": dict(source.provenance),
        "chat_template": source.chat_template() is not None,
        "notes": list(source.notes),
    }


def _describe_architecture(arch: Architecture) -> dict[str, Any]:
    ffn = ("gated, " if arch.gated else "") + arch.activation + (" on gate and up" if arch.up_relu else "")
    return {
        "family": arch.family,
        "parameters": count_parameters(arch),
        "layers": arch.n_layers,
        "d_model": arch.d_model,
        "heads": arch.n_heads,
        "kv_heads": arch.n_kv_heads,
        "neurons_per_layer": arch.n_neurons,
        "ffn": ffn,
        "exact_zeros": arch.sparse,
        "vocabulary": arch.vocab_size,
        "context": arch.max_context,
    }


def count_parameters(arch: Architecture) -> int:
    """Weights of the model, each counted once: a head that is the embedding adds none."""
    from pi2 import inventory

    dense = sum(rows * cols for rows, cols in inventory.dense_matrices(arch).values())
    segments = len(inventory.neuron_matrices(arch, 0)) * arch.d_model
    per_neuron = segments + len(inventory.neuron_biases(arch, 0))
    vectors = sum(inventory.dense_vectors(arch).values())
    return dense + vectors + arch.n_layers * arch.n_neurons * per_neuron


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        sized = name.startswith("bytes_")
        named = ((k if "." in k else k.replace("_", " "), v) for k, v in value.items())  # files keep theirs
        return ", ".join(f"{k} {human_bytes(v) if sized else v}" for k, v in named)
    if name == "bytes":
        return f"{human_bytes(value)} ({value} bytes)"
    if name == "parameters":
        return f"{value / 1e6:.1f} million"
    return str(value)
