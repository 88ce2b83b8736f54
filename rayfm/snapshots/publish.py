"""Publishing: each rank writes its slices to its own file, then rank 0 checks them all and writes the manifest.

Files are named by their content, so a publisher that was killed and runs again can never change a file that a
committed manifest names.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rayfm.config import Config, SnapshotError
from rayfm.config.durable import move_new, sync_dir, sync_open
from rayfm.snapshots.manifest import (
    MANIFEST,
    FileRecord,
    SliceRecord,
    SnapshotManifest,
    TensorRecord,
    extent,
    file_sha256,
    version_dir,
)
from rayfm.snapshots.promotion import PROMOTION


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """One rank's rectangle of a tensor.

    ``tensor`` holds rows ``offsets[0], offsets[0] + 1, ...`` and columns ``offsets[1], ...`` of the whole, whose shape
    is ``shape``; dimensions after the second are whole.
    """

    name: str
    tensor: Tensor
    offsets: tuple[int, int]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> TensorSlice:
        """The slice that is the whole tensor."""
        return cls(name, tensor, (0, 0), tuple(tensor.shape))


class RankFile(Config):
    """What one rank wrote: plain values, to be gathered by rank 0."""

    rank: int
    file: str | None
    """None: the rank had no slices."""

    record: FileRecord | None
    tensors: dict[str, TensorRecord]


class SnapshotWriter:
    """Writes one version of a model below ``root``, which all ranks must see (a local or mounted folder).

    Raises:
        SnapshotError: a name could leave its folder.
    """

    def __init__(self, root: str | Path, model: str, version: str) -> None:
        self.root, self.model, self.version = Path(root), model, version
        self.folder = version_dir(self.root, model, version)

    def write(self, rank: int, slices: Iterable[TensorSlice]) -> RankFile:
        """Write this rank's slices to one file, durably, and say what it holds.

        Raises:
            SnapshotError: a slice does not lie within its tensor, or the folder cannot be written.
        """
        held: dict[str, Tensor] = {}
        records: dict[str, TensorRecord] = {}
        stored: set[int] = set()
        for item in slices:
            record = _record(item)
            key = f"{item.name}[{record.rows[0]}:{record.rows[1]},{record.columns[0]}:{record.columns[1]}]"
            if key in held:
                raise SnapshotError(f"{self._name()}: rank {rank} gave {key} twice")
            held[key] = _own(item.tensor, stored)
            dtype = str(item.tensor.dtype).removeprefix("torch.")
            before = records.get(item.name)
            if before is not None and (before.shape, before.dtype) != (tuple(item.shape), dtype):
                raise SnapshotError(f"{self._name()}: rank {rank} gave {item.name!r} in two shapes or types")
            slices_before = before.slices if before else ()
            records[item.name] = TensorRecord(
                shape=tuple(item.shape), dtype=dtype, slices=(*slices_before, record.model_copy(update={"key": key}))
            )
        if not held:
            return RankFile(rank=rank, file=None, record=None, tensors={})
        name, file_record = self.write_file(f"rank-{rank:05d}", lambda path: save_file(held, path))
        named = {
            tensor: value.model_copy(
                update={"slices": tuple(part.model_copy(update={"file": name}) for part in value.slices)}
            )
            for tensor, value in records.items()
        }
        return RankFile(rank=rank, file=name, record=file_record, tensors=named)

    def write_file(self, prefix: str, save: Callable[[Path], None]) -> tuple[str, FileRecord]:
        """Write one safetensors file durably, as ``save`` fills it: its name, from its content, and its record.

        Raises:
            SnapshotError: the folder cannot be written.
        """
        temporary = self.folder / f".{prefix}.{uuid.uuid4().hex}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                save(temporary)
                with temporary.open("rb") as file:
                    sync_open(file)
                record = FileRecord(sha256=file_sha256(temporary), bytes=temporary.stat().st_size)
                name = f"{prefix}-{record.sha256[:16]}.safetensors"
                os.replace(temporary, self.folder / name)
            finally:
                temporary.unlink(missing_ok=True)
            sync_dir(self.folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SnapshotError(f"{self.folder}: cannot write ({reason}); free space or fix access") from None
        return name, record

    def draft(
        self, rank_files: Sequence[RankFile], others: dict[str, FileRecord] | None = None, **meta: Any
    ) -> SnapshotManifest:
        """The manifest that `commit` would write, for a look at the version before it stands.

        Raises:
            SnapshotError: slices overlap or leave a gap, ranks disagree on a tensor, or a file is missing.
        """
        tensors = _tile(self._name(), rank_files)
        files = {part.file: part.record for part in rank_files if part.file is not None and part.record is not None}
        files |= others or {}
        for name, record in files.items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size != record.bytes:
                raise SnapshotError(f"{path}: not what its rank wrote; all ranks must see one folder {self.root}")
        manifest = SnapshotManifest(
            model=self.model,
            version=self.version,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            tensors=tensors,
            files=files,
            **meta,
        )
        # Through JSON, so that what is compared and returned is what a reader will see.
        return SnapshotManifest.model_validate_json(manifest.model_dump_json())

    def commit(
        self, rank_files: Sequence[RankFile], others: dict[str, FileRecord] | None = None, **meta: Any
    ) -> SnapshotManifest:
        """Declare the version complete. Committing equal content again returns the manifest that stands.

        Args:
            rank_files: what each rank wrote.
            others: further files, from `write_file`.
            meta: fields of `SnapshotManifest` (``trained_through``, ``config``, ...).

        Raises:
            SnapshotError: as `draft`; or the version stands with other content.
        """
        manifest = self.draft(rank_files, others, **meta)
        standing = self._create(manifest)
        if standing is not None:
            if standing.model_copy(update={"created": manifest.created}) != manifest:
                raise SnapshotError(f"{self._name()} stands with other content; publish under another version")
            manifest = standing
        for leftover in self.folder.iterdir():
            if leftover.name not in (MANIFEST, PROMOTION) and leftover.name not in manifest.files:
                leftover.unlink(missing_ok=True)  # of attempts that were killed
        return manifest

    def _create(self, manifest: SnapshotManifest) -> SnapshotManifest | None:
        """Write the manifest if there is none, atomically; return the one that stands if there is."""
        path = self.folder / MANIFEST
        temporary = self.folder / f".{MANIFEST}.{uuid.uuid4().hex}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(json.dumps(manifest.dump(), indent=1).encode())
                sync_open(file)
            try:
                move_new(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_dir(self.folder)
            sync_dir(self.folder.parent)
        except FileExistsError:
            return SnapshotManifest.model_validate_json(path.read_text())
        except OSError as error:
            raise SnapshotError(f"{path}: cannot write ({error.strerror or error}); free space or fix access") from None
        return None

    def _name(self) -> str:
        return f"snapshot {self.model}@{self.version}"


def publish(root: str | Path, model: str, version: str, tensors: dict[str, Tensor], **meta: Any) -> SnapshotManifest:
    """Publish whole tensors from one process. ``meta`` and errors as in `SnapshotWriter.commit`."""
    writer = SnapshotWriter(root, model, version)
    return writer.commit([writer.write(0, [TensorSlice.whole(*item) for item in tensors.items()])], **meta)


def _record(item: TensorSlice) -> SliceRecord:
    """Where a slice lies, once it is known to lie within its tensor."""
    shape, part = tuple(item.shape), tuple(item.tensor.shape)
    rows, columns = extent(shape)
    part_rows, part_columns = extent(part)
    row, column = item.offsets
    fits = (
        len(shape) == len(part)
        and shape[2:] == part[2:]
        and 0 <= row <= row + part_rows <= rows
        and 0 <= column <= column + part_columns <= columns
    )
    if not fits:
        raise SnapshotError(f"tensor {item.name!r}: a slice {part} at {item.offsets} does not lie within {shape}")
    return SliceRecord(file="", key="", rows=(row, row + part_rows), columns=(column, column + part_columns))


def _own(tensor: Tensor, stored: set[int]) -> Tensor:
    """A contiguous CPU tensor that shares memory with no other one in the file (safetensors stores no sharing)."""
    held = tensor.detach().cpu().contiguous()
    storage = held.untyped_storage()
    if storage.data_ptr() in stored or storage.nbytes() != held.numel() * held.element_size():
        held = held.clone()
    stored.add(held.untyped_storage().data_ptr())
    return held


def _tile(name: str, rank_files: Sequence[RankFile]) -> dict[str, TensorRecord]:
    """All ranks' slices by tensor, once they are known to tile each one."""
    merged: dict[str, TensorRecord] = {}
    for part in sorted(rank_files, key=lambda part: part.rank):
        for tensor, record in part.tensors.items():
            before = merged.get(tensor)
            if before is None:
                merged[tensor] = record
                continue
            if (before.shape, before.dtype) != (record.shape, record.dtype):
                raise SnapshotError(
                    f"{name}: tensor {tensor!r} is {before.dtype}{list(before.shape)} on one rank and "
                    f"{record.dtype}{list(record.shape)} on rank {part.rank}"
                )
            merged[tensor] = before.model_copy(update={"slices": before.slices + record.slices})
    for tensor, record in merged.items():
        _check_tiling(f"{name}: tensor {tensor!r}", record)
    return merged


def _check_tiling(name: str, record: TensorRecord) -> None:
    rows, columns = record.extent
    bounds = np.array([(*part.rows, *part.columns) for part in record.slices], np.int64)
    # Disjoint rectangles within the whole whose areas add up to its area tile it. Sorted by first row, a rectangle can
    # only meet those that start before it ends.
    bounds = bounds[np.argsort(bounds[:, 0], kind="stable")]
    for position, (_, row_end, column, column_end) in enumerate(bounds[:-1].tolist()):
        others = bounds[position + 1 : position + 1 + int(np.searchsorted(bounds[position + 1 :, 0], row_end))]
        area = np.minimum(others[:, 1], row_end) - others[:, 0]
        hit = (area > 0) & (np.minimum(others[:, 3], column_end) > np.maximum(others[:, 2], column))
        if hit.any():
            low = others[np.argmax(hit)].tolist()
            raise SnapshotError(
                f"{name}: two slices overlap at row {low[0]}, column {max(low[2], column)}; give each part, and each "
                "replicated tensor, from one rank only"
            )
    covered = int(((bounds[:, 1] - bounds[:, 0]) * (bounds[:, 3] - bounds[:, 2])).sum())
    if covered != rows * columns:
        raise SnapshotError(f"{name}: slices cover {covered} of {rows} x {columns} cells; a rank's part is missing")


def torch_dtype(name: str) -> torch.dtype:
    """The torch type called ``name``. Raises SnapshotError where there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise SnapshotError(f"unknown tensor type {name!r}")
    return dtype
