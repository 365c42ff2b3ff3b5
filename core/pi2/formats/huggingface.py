"""Models in the layout of Hugging Face: config.json, safetensors, tokenizer.json."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from pi2 import families, inventory
from pi2.api import ModelFormat, ModelSource, Probe
from pi2.architecture import Architecture
from pi2.container.manifest import MANIFEST
from pi2.errors import FormatError, StorageError
from pi2.families import Family
from pi2.formats.checkpoint import Checkpoint, read_json, read_text
from pi2.tensor import F32, Tensor
from pi2.text import TextTokenizer

_CONFIG_BYTES: Final = 1 << 22
_TOKENIZER_BYTES: Final = 1 << 28
_TEMPLATE_BYTES: Final = 1 << 22
# Tensors that some checkpoints carry and no forward pass needs: tables that can be computed, and the
# predictors of TurboSparse, which were trained for another runtime's threshold.
_UNUSED = re.compile(r"rotary_emb\.inv_freq\Z|\.mlp\.predictor\.|\.(attn|self_attn)\.(masked_)?bias\Z")


class HuggingFaceFormat(ModelFormat):
    """A directory as ``save_pretrained`` of transformers writes it, sharded or not."""

    name: ClassVar[str] = "huggingface"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(10, "directories with config.json, *.safetensors and tokenizer.json")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        try:
            return (path / "config.json").is_file() and not (path / MANIFEST).exists()
        except OSError:
            return False

    def load(self, path: Path) -> HuggingFaceSource:
        try:
            return HuggingFaceSource(path)
        except OSError as e:
            place = Path(e.filename) if isinstance(e.filename, str) else path
            raise StorageError(e.strerror or str(e), path=place, hint="check that it may be read") from None


class HuggingFaceSource(ModelSource):
    """An opened directory.  Everything but the weights' values is checked once this exists."""

    def __init__(self, path: Path) -> None:
        config = read_json(path / "config.json", _CONFIG_BYTES)
        self._path = path
        self._family, architecture = families.describe(config)
        self._weights = Checkpoint(path)
        self.notes: list[str] = []
        tied = self._is_tied(architecture)
        bos, eos = _special_ids(path, config)
        self.architecture = replace(architecture, tied=tied, bos_id=bos, eos_ids=eos)
        self.architecture.check()
        self._foreign = _foreign_names(self._family, self.architecture, self._weights)
        self._check_weights()
        self._tokenizer_json = _read_tokenizer(path, self.architecture)
        self._chat_template = _read_chat_template(path)
        self.provenance: Mapping[str, str] = {
            "format": HuggingFaceFormat.name,
            "name": path.resolve().name,
            "architecture": self._family.architectures[0],
            "config_sha256": hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
            "headers_sha256": self._weights.sha256,
        }

    def tensor(self, name: str) -> Tensor:
        down = name.endswith(".ffn.down.weight")
        skip = self._family.position_offset if name == "embed.positions" else 0
        return Tensor(*self._weights.rows(self._foreign[name], skip=skip, transposed=down))

    def vector(self, name: str) -> F32:
        values = self._weights.vector(self._foreign[name])
        if self._family.norm_offset and name.endswith("norm.weight"):
            values += np.float32(self._family.norm_offset)
        return values

    def tokenizer_json(self) -> str:
        return self._tokenizer_json

    def chat_template(self) -> str | None:
        return self._chat_template

    def _is_tied(self, arch: Architecture) -> bool:
        """What the configuration says, unless the weights prove otherwise; as transformers decides."""
        names = (_present(self._weights, self._family.names[n]) for n in ("embed.weight", "head.weight"))
        embed, head = names
        if arch.tied and embed in self._weights and head in self._weights:
            if not self._weights.same(embed, head):
                self.notes.append(f"{head} differs from the embedding, so they are not tied")
                return False
        elif not arch.tied and head not in self._weights:
            self.notes.append(f"the weights have no {head}: the embedding is used in its place")
            return True
        return arch.tied

    def _check_weights(self) -> None:
        """Every tensor of the inventory is there with its shape, and no other that could matter."""
        arch = self.architecture
        shapes: dict[str, tuple[int, ...]] = {**inventory.dense_matrices(arch)}
        shapes |= {name: (n,) for name, n in inventory.dense_vectors(arch).items()}
        if "embed.positions" in shapes:
            rows, cols = shapes["embed.positions"]
            shapes["embed.positions"] = (rows + self._family.position_offset, cols)
        for layer in range(arch.n_layers):
            for part, name in inventory.neuron_matrices(arch, layer).items():
                shape = (arch.n_neurons, arch.d_model)
                shapes[name] = shape[::-1] if part == "down" else shape
            shapes |= dict.fromkeys(inventory.neuron_biases(arch, layer), (arch.n_neurons,))
        for name, wanted in shapes.items():
            self._weights.check(self._foreign[name], wanted)
        self._account_for_the_rest({self._foreign[name] for name in shapes})

    def _account_for_the_rest(self, used: set[str]) -> None:
        head = _present(self._weights, self._family.names["head.weight"])
        left = sorted(set(self._weights) - used - {head})
        odd = [name for name in left if not _UNUSED.search(name)]
        if odd:
            raise FormatError(
                f"the weights hold {len(odd)} tensors unknown to this family, such as {odd[0][:120]!r}",
                hint="config.json and the weights may belong to different models",
            )
        if left:
            self.notes.append(
                f"{len(left)} tensors that no forward pass needs were left out, such as {left[0]}"
            )


def _foreign_names(family: Family, arch: Architecture, weights: Checkpoint) -> dict[str, str]:
    """Canonical name -> name in the files, of everything in the inventory."""
    # Before anything is made per layer: a lying layer count must not cost memory.
    if arch.n_layers > sum(1 for _ in weights):
        raise FormatError(f"config.json claims {arch.n_layers} layers, the weights have fewer tensors")
    names = [*inventory.dense_matrices(arch), *inventory.dense_vectors(arch)]
    for layer in range(arch.n_layers):
        names += inventory.neuron_matrices(arch, layer).values()
        names += inventory.neuron_biases(arch, layer)
    return {name: _present(weights, family.foreign(name)) for name in names}


def _present(weights: Checkpoint, name: str) -> str:
    """Checkpoints saved from the model without its head lack the first part of the names."""
    short = name.removeprefix("model.")
    return short if name not in weights and short in weights else name


def _special_ids(path: Path, config: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """BOS and EOS: what generation_config.json says, else config.json."""
    given = path / "generation_config.json"
    raw = {**config, **_without_nulls(read_json(given, _CONFIG_BYTES) if given.is_file() else {})}
    bos, eos = raw.get("bos_token_id"), raw.get("eos_token_id")
    several = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for value in [*several, *([] if bos is None else [bos])]:
        if type(value) is not int or not 0 <= value < 1 << 24:
            raise FormatError(f"bos_token_id or eos_token_id cannot be {str(value)[:40]!r}")
    return bos, tuple(several)


def _without_nulls(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if value is not None}


def _read_tokenizer(path: Path, arch: Architecture) -> str:
    if not (path / "tokenizer.json").is_file():
        raise FormatError(
            f"{path} has no tokenizer.json",
            hint="make one: from transformers import AutoTokenizer;"
            f' AutoTokenizer.from_pretrained("{path}").save_pretrained("{path}")',
        )
    text = read_text(path / "tokenizer.json", _TOKENIZER_BYTES)
    known = TextTokenizer(text).vocab_size
    if known > arch.vocab_size:
        raise FormatError(f"the tokenizer knows {known} tokens, the model only {arch.vocab_size}",
                          hint="tokenizer.json and the weights may belong to different models")  # fmt: skip
    return text


def _read_chat_template(path: Path) -> str | None:
    """chat_template.jinja, else what tokenizer_config.json holds: a text, or a list of named ones."""
    if (path / "chat_template.jinja").is_file():
        return read_text(path / "chat_template.jinja", _TEMPLATE_BYTES)
    if not (path / "tokenizer_config.json").is_file():
        return None
    given = read_json(path / "tokenizer_config.json", _TEMPLATE_BYTES).get("chat_template")
    if given is None or isinstance(given, str):
        return given
    try:
        named = {str(item["name"]): str(item["template"]) for item in given}
    except (TypeError, KeyError):
        raise FormatError(
            "tokenizer_config.json: chat_template is neither a text nor a list of them"
        ) from None
    return named.get("default", next(iter(named.values()), None))
