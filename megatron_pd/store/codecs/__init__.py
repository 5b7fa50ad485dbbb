"""Codecs of blocks: the package's, by name, and how another one is found.

A codec is added as a file here and a line below, or anywhere else as `package.module:attribute`.
"""

from __future__ import annotations

from megatron_pd.errors import UserError
from megatron_pd.registry import Registry
from megatron_pd.store.codecs.codec import Codec, Trainer
from megatron_pd.store.codecs.compact import CompactCodec
from megatron_pd.store.codecs.exact import ExactCodec

__all__ = ["CODECS", "Codec", "CompactCodec", "ExactCodec", "Trainer", "codec_named"]

CODECS: Registry[type] = Registry("codec", type)
for _codec in (CompactCodec, ExactCodec):
    CODECS.add(_codec.name, _codec)


def codec_named(name: str) -> type[Codec]:
    """The codec of that name, or what `package.module:attribute` imports.

    Raises:
        UserError: there is none, it can't be imported, or it is no subclass of `Codec`.
    """
    found = CODECS.get(name)
    if not issubclass(found, Codec):
        raise UserError(f"{name} is no subclass of megatron_pd.store.codecs.Codec: make it one.")
    return found
