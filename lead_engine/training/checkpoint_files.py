"""A checkpoint's files: checksums made while they are written, and reading that runs no code from disk.

torch.distributed.checkpoint (DCP) keeps its metadata as a pickle, and unpickles entries that are no tensors. A pickle
may call anything, so here metadata may name DCP's own classes only, and everything else goes through
torch.load(weights_only=True).
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem as dcp_files
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

METADATA = ".metadata"
CHUNK = 1 << 22  # bytes read at a time


class Summing(io.IOBase):
    """A file that is being written, and the CRC-32 of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.crc, self.size = file, 0, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        written = self.file.write(data)
        self.crc, self.size = zlib.crc32(data, self.crc), self.size + memoryview(data).nbytes
        return written

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        self.file.flush()  # it is asked for to sync what was written
        return self.file.fileno()

    def flush(self) -> None:
        self.file.flush()


class SummingFiles(dcp_files.FileSystem):
    """The local file system, with checksums of what is written to it.

    `written`: name -> (bytes, CRC-32) of this rank's files; `error`: the first that a file gave.
    """

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, int]] = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode != "wb":
            raise ValueError(f"{path}: opened with mode {mode!r}, but checkpoints are only written here")
        try:
            with Path(path).open(mode) as file:
                summing = Summing(file)
                yield summing
                self.written[Path(path).name.removesuffix(".tmp")] = (summing.size, summing.crc)
        except Exception as error:
            # torch's zip writer hides what the file said behind an "unexpected pos" of its own.
            self.error = self.error or root_cause(error)
            raise


def root_cause(error: BaseException | None) -> OSError | None:
    """The OSError that an exception is, or came from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class Writer(FileSystemWriter):
    """DCP's writer, over SummingFiles."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs = self.files = SummingFiles()


def check_file(path: Path, size: int, crc: int) -> str | None:
    """What is wrong with a file, None if nothing is; reads all of it."""
    try:
        with path.open("rb") as file:
            found_crc, found_size = 0, 0
            while chunk := file.read(CHUNK):
                found_crc, found_size = zlib.crc32(chunk, found_crc), found_size + len(chunk)
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    if found_size != size:
        return f"{path.name} has {found_size:,} bytes of {size:,}"
    return None if found_crc == crc else f"{path.name} was changed: its checksum is not the one that was written"


class Reader(FileSystemReader):
    """DCP's reader, whose metadata is unpickled with nothing but METADATA_CLASSES at hand."""

    # DCP gives keyword arguments only to a reader that takes them: then to guess at other files.
    def read_metadata(self) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError(f"{METADATA} holds no checkpoint's metadata")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(
                    f"{METADATA} names a file outside of the checkpoint: {info.relative_path!r}"
                )
        return metadata


class Planner(DefaultLoadPlanner):
    """DCP's planner, whose entries that are no tensors are numbers, strings and their lists: no code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        *path, last = self.mappings[read_item.dest_index.fqn]
        owner: Any = self.original_state_dict
        for key in path:
            owner = owner[key]
        owner[last] = torch.load(value, weights_only=True)


METADATA_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (cls.__module__, cls.__name__): cls
        for cls in (
            dcp_metadata.Metadata,
            dcp_metadata.MetadataIndex,
            dcp_metadata.TensorStorageMetadata,
            dcp_metadata.BytesStorageMetadata,
            dcp_metadata.ChunkStorageMetadata,
            dcp_metadata.TensorProperties,
            dcp_metadata.StorageMeta,
            dcp_metadata._MEM_FORMAT_ENCODING,
            dcp_files._StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # a table look-up
    **{
        (module, kind): pathlib.PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "PurePosixPath")
    },
    **{
        ("torch", str(value).removeprefix("torch.")): value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype)
    },
}
"""(module, name) -> what a pickle that names it gets."""


class MetadataUnpickler(pickle.Unpickler):
    """pickle.UnpicklingError for everything but METADATA_CLASSES."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return METADATA_CLASSES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"{METADATA} names {module}.{name}, which is no part of a checkpoint: it was not run"
            ) from None
