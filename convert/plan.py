"""What a conversion will do, decided before the first weight is read: types, places, metadata, sizes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.blocks import PINNED
from convert.checkpoint import open_checkpoint
from convert.families import Target, match_targets, model_entries, padded_shape, read_shape, recognise, targets
from convert.gguf_file import Entry, Slot, header_bytes, layout
from convert.mixture import MIXTURES, choose_qtypes, file_order
from convert.shard import Shard
from convert.source_tensor import SourceTensor
from convert.vocab import vocabulary_entries
from convert.vocab_files import read_vocabulary
from engine.registry import Model, Shape

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor's way: from where in a shard to where in the output."""

    tensor: SourceTensor
    slot: Slot
    rope_head_dim: int | None = None
    n_parts: int = 1

    @property
    def n_columns(self) -> int:
        """Values of a row as stored."""
        return self.tensor.shape[-1]

    @property
    def n_rows(self) -> int:
        """Rows as stored."""
        return math.prod(self.tensor.shape[:-1])

    @property
    def n_out_rows(self) -> int:
        """Rows of the output."""
        return math.prod(self.slot.shape[1:])


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole conversion; entries are complete but for the hashes of the shards."""

    model: Model
    ftype: str
    shards: tuple[Shard, ...]
    items: tuple[Item, ...]
    slots: tuple[Slot, ...]
    entries: tuple[Entry, ...]

    @property
    def fingerprint(self) -> str:
        """What two runs must have in common for the second to go on with the first: sha256 as hex."""
        header = hashlib.sha256(header_bytes(self.entries, self.slots)).hexdigest()
        shards = [shard.identity for shard in self.shards]
        whole = json.dumps([PINNED, self.ftype, header, shards])
        return hashlib.sha256(whole.encode("utf-8")).hexdigest()

    @property
    def source_bytes(self) -> int:
        return sum(item.tensor.n_bytes for item in self.items)


def plan_conversion(
    folder: Path, ftype: str, remote: Mapping[str, Shard] | None = None, pad_ff: bool | None = None
) -> Plan:
    """The plan for one checkpoint folder and mixture; CheckpointError says why there can be none.

    pad_ff: fill the feed-forward width up to whole blocks with zeros; None as models.toml says.
    """
    checkpoint = open_checkpoint(folder, remote)
    model, family = recognise(checkpoint.config)
    shape = read_shape(model, family, checkpoint.config)
    padded = output_shape(model, shape, ftype, pad_ff)
    wanted = match_targets(family, targets(family, shape, padded), checkpoint.tensors)
    pairs = {target.name: (target, source) for target, source in wanted}
    slots = place([(name, target.shape) for name, (target, _) in pairs.items()], ftype)
    items = [_item(*pairs[slot.name], slot) for slot in slots]
    vocabulary = read_vocabulary(family.key, folder, shape.n_vocab)
    entries = [*model_entries(model, family, padded), *vocabulary_entries(vocabulary)]
    entries += padding_entries(shape, padded)
    entries += own_entries(model, ftype, checkpoint.shards)
    return Plan(model, ftype, checkpoint.shards, tuple(items), slots, tuple(entries))


def _item(target: Target, tensor: SourceTensor, slot: Slot) -> Item:
    return Item(tensor, slot, target.rope_head_dim, target.n_parts)


def output_shape(model: Model, shape: Shape, ftype: str, pad_ff: bool | None = None) -> Shape:
    """The shape of the output: padded where asked for, or where models.toml does and the type has large blocks."""
    wanted = model.pad_ff and MIXTURES[ftype].has_superblocks if pad_ff is None else pad_ff
    return padded_shape(shape) if wanted else shape


def padding_entries(shape: Shape, padded: Shape) -> list[Entry]:
    """The checkpoint's own feed-forward width, where the file has another."""
    return [Entry("fourbit.n_ff", "u32", shape.n_ff)] if padded != shape else []


def place(tensors: Sequence[tuple[str, tuple[int, ...]]], ftype: str) -> tuple[Slot, ...]:
    """Types and places for tensors of (name, torch shape), in llama.cpp's file order."""
    shapes = {name: tuple(reversed(shape)) for name, shape in tensors}
    qtypes = choose_qtypes(ftype, list(shapes.items()))
    return layout([(name, shapes[name], qtypes[name]) for name in sorted(shapes, key=file_order)])


def own_entries(model: Model, ftype: str, shards: Sequence[Shard], replica: bool = False) -> list[Entry]:
    """What fourbit adds: chat template, model, origin; the hashes still zeros, of their final length."""
    entries = [
        Entry("tokenizer.chat_template", "str", chat_template(model)),
        Entry("general.quantization_version", "u32", QUANTIZATION_VERSION),
        Entry("general.file_type", "u32", MIXTURES[ftype].number),
        Entry("fourbit.version", "str", importlib.metadata.version("fourbit")),
        Entry("fourbit.model", "str", model.key),
        Entry("fourbit.replica", "bool", replica),
    ]
    if shards:
        entries.append(Entry("fourbit.source.files", "[str]", [shard.name for shard in shards]))
        entries.append(Entry("fourbit.source.sha256", "[str]", ["0" * 64 for _ in shards]))
    return entries


def with_hashes(entries: Sequence[Entry], hashes: Sequence[str]) -> list[Entry]:
    """The entries with the sha256 of the shards, in the order of fourbit.source.files."""
    key = "fourbit.source.sha256"
    return [Entry(key, "[str]", list(hashes)) if entry.key == key else entry for entry in entries]


def chat_template(model: Model) -> str:
    """The Jinja template for stock llama.cpp tools; the engine builds its prompts from ids and never renders it."""
    return (Path(__file__).parent / "templates" / f"{model.family}.jinja").read_text(encoding="utf-8")
