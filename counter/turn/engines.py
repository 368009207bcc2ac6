"""Which engine serves, made by its name: what each needs is imported with it, and nothing else.

Only for a process that forks no more, as NumPy starts threads.
"""

from __future__ import annotations

import os

from counter.turn.engine import Engine
from counter.turn.library import load
from protocol import Decoder


def make_decoder(max_amount: int, decodes: bool) -> Decoder:
    """This process's decoder. One that has frames to decode, and not just to explain, imports
    NumPy."""
    if not decodes:
        return Decoder(max_amount)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from counter.turn.vector import VectorDecoder

    return VectorDecoder(max_amount)


def make_engine(name: str, decoder: Decoder) -> Engine:
    """The engine of that name, on a decoder that has its limit."""
    if name == "compiled":
        from counter.turn.compiled import CompiledEngine

        return CompiledEngine(load(), decoder.max_amount)
    from counter.turn.plain import PlainEngine

    return PlainEngine(decoder)
