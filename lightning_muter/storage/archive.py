"""What a checkpoint would take of memory, judged before torch unpacks it: nothing it claims may exceed what it is."""

from __future__ import annotations

import os
import pickletools
import zipfile
from typing import BinaryIO

from lightning_muter.errors import CorruptFileError

_MAX_PICKLE = 256 << 20  # bytes of structure (names, hyperparameters); the tensors lie in files of their own
_ALLOCATING = ("builtins bytearray", "__builtin__ bytearray")


def check_archive(file: BinaryIO) -> None:
    """Insist that a checkpoint is an archive as torch writes it: stored, not compressed, no part inside of another.

    So unpacking takes no more memory than the file has bytes. The file is left at its beginning.

    Raises:
        CorruptFileError: it is something else.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise CorruptFileError("it is compressed, which torch does not do: it may unpack to any size")
            if sum(member.file_size for member in members) > size or any(
                m.file_size != m.compress_size for m in members
            ):
                raise CorruptFileError("its parts are said to be larger than all of it")
            for member in members:
                if member.filename.endswith(".pkl"):
                    _check_pickle(archive, member)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, OverflowError) as error:
        raise CorruptFileError(
            f"not an archive as torch has written them since 1.6 ({type(error).__name__}: {error})"
        ) from error
    file.seek(0)


def _check_pickle(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuse what would allocate by a number instead of by content."""
    if member.file_size > _MAX_PICKLE:
        raise CorruptFileError(f"its structure takes {member.file_size} bytes, more than {_MAX_PICKLE}")
    for code, argument, _ in pickletools.genops(archive.read(member)):
        if code.name == "GLOBAL" and argument in _ALLOCATING:
            raise CorruptFileError(f"it would make a {argument!r} of any size")
