"""Models in GGUF files, single or split, as sources for conversion."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pi2.api import ModelFormat, ModelSource, Probe
from pi2.architecture import Architecture
from pi2.errors import FormatError, UnsupportedModel
from pi2.families import by_gguf
from pi2.formats.gguf import MAGIC, POWERINFER_MAGIC, GgufFile, TensorInfo
from pi2.formats.gguf_blocks import BF16_TYPE, decode_rows, exact_dtype, to_tensor, transpose, type_name
from pi2.formats.gguf_config import config_of, llama3_scaling
from pi2.formats.gguf_metadata import Metadata
from pi2.formats.gguf_vocab import end_ids, tokenizer_json
from pi2.inventory import dense_matrices, dense_vectors, neuron_biases, neuron_matrices
from pi2.tensor import F32, Ids, Tensor

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_LAYER = re.compile(r"layers\.(\d+)\.(.*)\.(weight|bias)")
_GLOBAL = {
    "embed.weight": "token_embd.weight",
    "final_norm.weight": "output_norm.weight",
    "final_norm.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
_PARTS = {
    "attn.norm": "attn_norm",
    "attn.post_norm": "post_attention_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "ffn.norm": "ffn_norm",
    "ffn.post_norm": "post_ffw_norm",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
}
_ROPE_FREQS = "rope_freqs.weight"


class GgufFormat(ModelFormat):
    """GGUF files of versions 2 and 3 (llama.cpp's), also split into ``-00001-of-0000N.gguf``."""

    name = "gguf"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(10, "reads GGUF versions 2 and 3")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return file.read(4) in (MAGIC, POWERINFER_MAGIC)
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return False

    def load(self, path: Path) -> GgufSource:
        return GgufSource(path)


class GgufSource(ModelSource):
    """A model in GGUF.  Tensors are read from the mapped file one at a time, when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._files = _open_parts(path)
        self._place = {name: file for file in self._files for name in file.tensors}
        self._meta = Metadata(self._files[0].metadata, path.name)
        arch = self._meta.text("general.architecture")
        self._family = by_gguf(arch)
        self.architecture = self._describe(arch)
        self._shapes = _shapes(self.architecture)
        self._check_tensors()
        self.provenance = self._provenance(arch)
        self.notes = self._notes()

    def tensor(self, name: str) -> Tensor:
        file, info = self._find(name)
        raw = file.data(info)
        if name.endswith(".ffn.down.weight"):
            return transpose(raw, info.type)
        order = self._order(name)
        return to_tensor(raw if order is None else raw[order], info.type)

    def vector(self, name: str) -> F32:
        file, info = self._find(name)
        values: F32 = decode_rows(file.data(info), info.type)[0]
        order = self._order(name)
        return values if order is None else values[order]

    def tokenizer_json(self) -> str:
        return tokenizer_json(self._meta, self.architecture.vocab_size)

    def chat_template(self) -> str | None:
        key = "tokenizer.chat_template"
        return self._meta.text(key) if key in self._meta else None

    def _find(self, name: str) -> tuple[GgufFile, TensorInfo]:
        foreign = foreign_name(name)
        file = self._place[foreign]
        return file, file.tensors[foreign]

    def _order(self, name: str) -> Ids | None:
        """Where GGUF keeps each row of q or k, if it interleaves the halves of the heads.

        GGUF's row (head, j, half) is row (head, half, j) here: rows move as a whole, so no bit changes.
        """
        part = name.rsplit(".", 2)[-2]
        if not self._family.gguf_permuted or ".attn." not in name or part not in ("q", "k"):
            return None
        arch = self.architecture
        heads = arch.n_heads if part == "q" else arch.n_kv_heads
        rows = np.arange(heads * arch.head_dim, dtype=np.int32)
        return rows.reshape(heads, arch.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def _describe(self, arch: str) -> Architecture:
        """Translate, let the family read it, and believe the tensors in what only they can tell."""
        meta, file = self._meta, self._meta.file
        embedding = self._place.get("token_embd.weight")
        if embedding is None:
            raise FormatError(f"{file}: there is no tensor token_embd.weight", hint="is it a whole model?")
        vocab_size = embedding.tensors["token_embd.weight"].shape[0]
        config = config_of(meta, arch, vocab_size, self._place)
        if config["num_hidden_layers"] > len(self._place):
            raise FormatError(f"{file}: {config['num_hidden_layers']} layers in {len(self._place)} tensors")
        if _ROPE_FREQS in self._place:
            config |= self._llama3(config)
        try:
            described = self._family.configure(config)
        except FormatError as e:
            raise type(e)(str(e).replace("config.json", file), hint=e.hint) from None
        described = dataclasses.replace(
            described,
            qkv_bias="blk.0.attn_q.bias" in self._place,
            o_bias="blk.0.attn_output.bias" in self._place,
            ffn_bias="blk.0.ffn_up.bias" in self._place,
            bos_id=meta.optional_integer("tokenizer.ggml.bos_token_id"),
            eos_ids=end_ids(meta),
        )
        described.check()
        rope = described.rope
        # The families that GGUF permutes rotate whole heads and norm none, so whole heads are un-permuted.
        assert not (
            self._family.gguf_permuted and (described.qk_norm or not rope or rope.dims < described.head_dim)
        )
        return described

    def _llama3(self, config: Mapping[str, object]) -> dict[str, object]:
        file = self._place[_ROPE_FREQS]
        info = file.tensors[_ROPE_FREQS]
        if len(info.shape) != 1 or "rope_scaling" in config:
            raise UnsupportedModel(f"{self._meta.file}: RoPE is scaled in two ways at once")
        theta, context = config["rope_theta"], config["max_position_embeddings"]
        assert isinstance(theta, float)
        assert isinstance(context, int)
        if 2 * info.shape[0] != config["head_dim"] or not 0 < theta < 1e12:
            raise FormatError(f"{self._meta.file}: {_ROPE_FREQS} does not match the heads")
        scaling = llama3_scaling(decode_rows(file.data(info), info.type)[0], theta, context)
        return {} if scaling is None else {"rope_scaling": scaling}

    def _check_tensors(self) -> None:
        """Every tensor of the inventory is there in its shape, and nothing else is."""
        file = self._meta.file
        if any(name.endswith("attn_qkv.weight") for name in self._place):
            raise UnsupportedModel(f"{file}: fused q, k and v matrices (attn_qkv) are not supported")
        for name, shape in self._shapes.items():
            foreign = foreign_name(name)
            if foreign not in self._place:
                raise FormatError(
                    f"{file}: the tensor {foreign} is missing",
                    hint="the file does not match its architecture",
                )
            found = self._place[foreign].tensors[foreign].shape
            if found != shape:
                raise FormatError(f"{file}: {foreign} has the shape {found}, not {shape}")
        known = {foreign_name(name) for name in self._shapes} | {_ROPE_FREQS}
        for name in self._place:
            if name not in known:
                raise UnsupportedModel(
                    f"{file}: the tensor {name[:80]} has no place in a {self.architecture.family} model",
                    hint="pi2 does not leave out parts of a model",
                )

    def _provenance(self, arch: str) -> dict[str, str]:
        meta = self._meta
        found = {"format": "gguf", "file": meta.file, "architecture": arch}
        for key in ("general.name", "general.license", "general.source.url", "general.repo_url"):
            if key in meta:
                found[key.removeprefix("general.")] = meta.text(key)
        types = Counter(type_name(f.tensors[n].type) for n, f in self._place.items())
        found["types"] = ", ".join(f"{kind} x {n}" for kind, n in sorted(types.items()))
        found["size_bytes"] = str(sum(f.size_bytes for f in self._files))
        return found

    def _notes(self) -> Sequence[str]:
        downs, others = set(), Counter[str]()
        for name in self._shapes:
            kind = self._find(name)[1].type
            dtype = exact_dtype(kind)
            if name.endswith("ffn.down.weight") and dtype not in ("f32", "f16") and kind != BF16_TYPE:
                downs.add(type_name(kind))
            elif dtype is None and kind != BF16_TYPE:
                others[type_name(kind)] += 1
        notes = [
            f"{n} tensors in {kind} were decoded to float32 and are quantised anew"
            for kind, n in sorted(others.items())
        ]
        if downs:
            notes.append(
                f"down projections ({', '.join(sorted(downs))}) were decoded and are quantised anew, "
                "along the other axis, neuron by neuron"
            )
        return notes


def foreign_name(name: str) -> str:
    """GGUF's name of the tensor with this canonical name (``pi2.inventory``)."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return _GLOBAL.get(name, name)
    return f"blk.{layer[1]}.{_PARTS[layer[2]]}.{layer[3]}"


def _shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape as GGUF has it, of all tensors; GGUF's down projections are (d, neurons)."""
    shapes: dict[str, tuple[int, ...]] = dict(dense_matrices(arch))
    shapes |= {name: (n,) for name, n in dense_vectors(arch).items()}
    for layer in range(arch.n_layers):
        for part, name in neuron_matrices(arch, layer).items():
            shape = (arch.n_neurons, arch.d_model)
            shapes[name] = shape[::-1] if part == "down" else shape
        shapes |= dict.fromkeys(neuron_biases(arch, layer), (arch.n_neurons,))
    return shapes


def _open_parts(path: Path) -> list[GgufFile]:
    """The file, or all parts of a split one if ``path`` is the first."""
    first = GgufFile(path)
    meta = Metadata(first.metadata, path.name)
    count = meta.integer("split.count", 1)
    if count <= 1:
        return [first]
    name = _SPLIT.fullmatch(path.name)
    if name is None or int(name[2]) != 1 or int(name[3]) != count or meta.integer("split.no") != 0:
        raise FormatError(
            f"{path.name} is a part of a model split into {count} files, and not the first",
            hint="give the file whose name ends in -00001-of-"
            + f"{count:05}.gguf, with the others beside it",
        )
    files = [first]
    for i in range(2, count + 1):
        files.append(GgufFile(path.with_name(f"{name[1]}-{i:05}-of-{count:05}.gguf")))
    names = Counter(name for file in files for name in file.tensors)
    if len(names) != sum(names.values()):
        raise FormatError(f"{path.name}: several parts hold the same tensor")
    return files
