"""Checkpoints that mean harm, or were damaged."""

from __future__ import annotations

import io
import os
import random
import zipfile

import torch


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def zipped(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bit flips and truncations; half of the time with the archive's checksums made to fit again."""
    if draw.random() < 0.5:  # inside of the pickle, so that the unpickler is reached
        buffer, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(content))
        with zipfile.ZipFile(buffer, "w") as target:
            for entry in source.infolist():
                data = bytearray(source.read(entry))
                if entry.filename.endswith("data.pkl"):
                    for _ in range(draw.choice([1, 1, 3])):
                        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                target.writestr(entry.filename, bytes(data))
        return buffer.getvalue()
    damaged = bytearray(content)
    if draw.random() < 0.3:
        del damaged[draw.randrange(len(damaged)) :]
    else:
        for _ in range(draw.choice([1, 4, 32])):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)
