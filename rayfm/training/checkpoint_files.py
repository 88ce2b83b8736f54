"""What checkpoints lie in a run's folder, and whether they can be read: without the run's config, or a worker group."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from rayfm.config import DataError
from rayfm.training.checkpoint import CheckpointState
from rayfm.training.divergence import table_of
from rayfm.training.saving import unfit


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """One checkpoint of one trainer of a run."""

    trainer: str
    path: Path
    state: CheckpointState | None
    """None: it was cut short, or is being written."""
    bytes: int
    changed: float
    """When a file of it last changed, in seconds of Unix time."""


def checkpoint_roots(run_dir: Path) -> dict[str, Path]:
    """Trainer -> folder of its checkpoints."""
    return {path.parent.name: path for path in sorted(run_dir.glob("trainers/*/checkpoints"))}


def checkpoints_of(run_dir: Path) -> list[CheckpointFolder]:
    """A run's checkpoints by trainer, oldest first, those that were cut short among them."""
    found = []
    for trainer, root in checkpoint_roots(run_dir).items():
        for path in sorted(path for path in root.iterdir() if path.is_dir()):
            stats = [file.stat() for file in path.iterdir()] or [path.stat()]
            state = read_state(path) if (path / "state.json").exists() else None
            changed = max(stat.st_mtime for stat in stats)
            found.append(CheckpointFolder(trainer, path, state, sum(stat.st_size for stat in stats), changed))
    return found


def read_state(path: Path) -> CheckpointState:
    """What a complete checkpoint holds beside tensors.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return CheckpointState.model_validate(json.loads((path / "state.json").read_text()))
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'state.json'}: {_first(error)}; remove the checkpoint") from error


def verify_checkpoint(path: Path) -> int:
    """Read every shard of a complete checkpoint: its checksums, and that its values are finite.

    Returns:
        Bytes of the shards.

    Raises:
        DataError: naming the first shard that is missing, changed or not finite.
    """
    read_state(path)
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
    except Exception as error:  # it is a pickle: a changed byte may raise anything
        raise _broken(path, ".metadata", error) from error
    total = 0
    for index, place in metadata.storage_data.items():
        file = path / place.relative_path
        try:
            with file.open("rb") as stream:
                stream.seek(place.offset)
                content = stream.read(place.length)
            _check_shard(index.fqn, content, metadata.state_dict_metadata[index.fqn], place.length)
        except _NotFinite as error:
            raise DataError(f"{path}: {table_of(index.fqn)} holds values that are not finite") from error
        except Exception as error:
            raise _broken(path, f"{file.name}, {index.fqn}", error) from error
        total += place.length
    for name, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            covered = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
            if covered != math.prod(stored.size):
                raise DataError(f"{path}: {name} has {covered} of {math.prod(stored.size)} values")
    return total


class _NotFinite(Exception):
    pass


def _check_shard(name: str, content: bytes, stored: Any, length: int) -> None:
    if len(content) != length:
        raise EOFError(f"{len(content)} of {length} bytes")
    # torch.save writes a zip archive, with a checksum for each of its records.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"the checksum of {bad} differs")
    if isinstance(stored, BytesStorageMetadata):
        return
    value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(value, Tensor):
        raise ValueError("is no tensor")
    if unfit(name, value):
        raise _NotFinite


def _broken(path: Path, where: str, error: Exception) -> DataError:
    return DataError(f"{path}: {where}: {_first(error)}; the checkpoint cannot be used, remove its folder")


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
