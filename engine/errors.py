"""Every error that fourbit raises on purpose, as one small tree.

FourbitError                 exit code 1, one sentence: what, the number seen, the limit, what to do
├── RegistryError            models.toml is wrong, or there is no such model
├── NotFound                 a checkpoint, model or file is not where it was looked for
├── CheckpointError          a checkpoint cannot be converted: shards, tensors, tokenizer
│   ├── UnknownArchitecture  no family converts it
│   └── UnsafeCheckpoint     it holds something other than data
├── GGUFError                not a GGUF file, a damaged one, or one of another family
├── FetchError               a hub does not give a checkpoint, or not the right one
├── OutputError              the output cannot be written
├── DoesNotFit               more memory or disk is needed than there is
├── MessageError             messages that no prompt can be built from
├── ContextError             the prompt, or prompt and reply, exceed the context
├── StateError               a saved state is not one, or not of this model
└── NativeError              llama.cpp is missing, of another version, or failed

try:
    engine = Engine.open("qwen-7b-chat")
except FourbitError as error:
    print(error)
"""

from __future__ import annotations


class FourbitError(Exception):
    """Base of every error meant for the user: its text is the one sentence to show."""


class RegistryError(FourbitError):
    """models.toml is malformed, or names no such model."""


class NotFound(FourbitError):
    """A checkpoint, model or file is not where it was looked for."""


class CheckpointError(FourbitError):
    """A checkpoint cannot be converted."""


class UnknownArchitecture(CheckpointError):
    """No family converts this checkpoint."""


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint holds something other than data."""


class GGUFError(FourbitError):
    """A file is no GGUF, is damaged, or is of another family."""


class FetchError(FourbitError):
    """A hub does not give a checkpoint, or not the right one."""


class OutputError(FourbitError):
    """The output cannot be written."""


class DoesNotFit(FourbitError):
    """More memory or disk is needed than there is."""


class MessageError(FourbitError):
    """No prompt can be built from these messages."""


class ContextError(FourbitError):
    """The prompt, or the prompt and its reply, exceed the context."""


class StateError(FourbitError):
    """A saved state is damaged, or of another model, build or setting."""


class NativeError(FourbitError):
    """llama.cpp is missing, of another version, or failed."""
