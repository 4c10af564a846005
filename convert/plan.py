"""What a conversion will do, decided before the first weight is read: types, places, metadata, sizes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint import open_checkpoint
from convert.families import match_targets, model_entries, read_shape, recognise, targets
from convert.gguf_file import Entry, Slot, layout
from convert.mixture import MIXTURES, choose_qtypes, file_order
from convert.source_tensor import SourceTensor
from convert.vocab import vocabulary_entries
from convert.vocab_files import read_vocabulary
from engine.registry import Model

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor's way: from where in a shard to where in the output."""

    tensor: SourceTensor
    slot: Slot
    rope_head_dim: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole conversion; entries are complete but for the hashes of the shards."""

    model: Model
    ftype: str
    shards: tuple[Path, ...]
    items: tuple[Item, ...]
    slots: tuple[Slot, ...]
    entries: tuple[Entry, ...]

    @property
    def source_bytes(self) -> int:
        return sum(item.tensor.n_bytes for item in self.items)


def plan_conversion(folder: Path, ftype: str) -> Plan:
    """The plan for one checkpoint folder and mixture; CheckpointError says why there can be none."""
    checkpoint = open_checkpoint(folder)
    model, family = recognise(checkpoint.config)
    shape = read_shape(model, family, checkpoint.config)
    pairs = {t.name: (t, source) for t, source in match_targets(family, targets(family, shape), checkpoint.tensors)}
    slots = place([(name, target.shape) for name, (target, _) in pairs.items()], ftype)
    items = [Item(pairs[slot.name][1], slot, pairs[slot.name][0].rope_head_dim) for slot in slots]
    vocabulary = read_vocabulary(family.key, folder, shape.n_vocab)
    entries = [*model_entries(model, family, shape), *vocabulary_entries(vocabulary)]
    entries += own_entries(model, ftype, checkpoint.shards)
    return Plan(model, ftype, checkpoint.shards, tuple(items), slots, tuple(entries))


def place(tensors: Sequence[tuple[str, tuple[int, ...]]], ftype: str) -> tuple[Slot, ...]:
    """Types and places for tensors of (name, torch shape), in llama.cpp's file order."""
    shapes = {name: tuple(reversed(shape)) for name, shape in tensors}
    qtypes = choose_qtypes(ftype, list(shapes.items()))
    return layout([(name, shapes[name], qtypes[name]) for name in sorted(shapes, key=file_order)])


def own_entries(model: Model, ftype: str, shards: Sequence[Path], replica: bool = False) -> list[Entry]:
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
