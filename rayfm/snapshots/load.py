"""Reading published versions: whole models, or any rectangle of any tensor. Only safetensors and JSON are ever read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rayfm.config import SnapshotError
from rayfm.snapshots.manifest import MANIFEST, SliceRecord, SnapshotManifest, check_name, file_sha256, version_dir
from rayfm.snapshots.promotion import GUARDED, Promotion, read_promotion
from rayfm.snapshots.publish import torch_dtype

if TYPE_CHECKING:
    from rayfm.export.rows import CheckRows


class SnapshotStore:
    """The snapshots below ``root``, which may lack some or all of its folders. Reading only."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._verified: set[Path] = set()
        self._guarded: dict[tuple[str, str], bool] = {}

    def __repr__(self) -> str:
        return f"SnapshotStore({str(self.root)!r})"

    def models(self) -> list[str]:
        """Models with at least one complete version, by name."""
        return sorted({path.parent.parent.name for path in (self.root / "snapshots").glob(f"*/*/{MANIFEST}")})

    def versions(self, model: str) -> list[str]:
        """Complete versions, oldest first. A folder without a manifest is no version."""
        folder = self.root / "snapshots" / check_name("model", model)
        return sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))

    def latest(self, model: str) -> str | None:
        """The newest complete version, None where there is none."""
        return max(self.versions(model), default=None)

    def promotion(self, model: str, version: str) -> Promotion | None:
        """What was decided of a version, None where nothing was. Raises SnapshotError: it cannot be read."""
        return read_promotion(self.folder(model, version))

    def guarded(self, model: str, version: str) -> bool:
        """Whether a version may be taken by itself only once it is promoted. Raises SnapshotError: as `manifest`."""
        found = self._guarded.get((model, version))
        if found is None:
            found = self._guarded[model, version] = bool(self.manifest(model, version).extra.get(GUARDED, False))
        return found

    def withheld(self, model: str, version: str) -> bool:
        """Whether nobody may take a version by itself: the guard has refused it, or not yet decided.

        What cannot be read is not withheld here: whoever verifies the version finds out, and says so.
        """
        try:
            promotion = self.promotion(model, version)
        except SnapshotError:
            return True
        if promotion is not None:
            return not promotion.promoted
        try:
            return self.guarded(model, version)
        except SnapshotError:
            return False

    def takeable(self, model: str) -> list[str]:
        """The versions that may be taken by themselves, oldest first: all but those that the guard withholds."""
        return [version for version in self.versions(model) if not self.withheld(model, version)]

    def newest(self, model: str) -> str | None:
        """The newest version that may be taken by itself, None where there is none."""
        found = (version for version in reversed(self.versions(model)) if not self.withheld(model, version))
        return next(found, None)

    def folder(self, model: str, version: str) -> Path:
        """The folder of a version, which need not exist. Raises SnapshotError for a name that could leave it."""
        return version_dir(self.root, model, version)

    def manifest(self, model: str, version: str) -> SnapshotManifest:
        """The manifest of a complete version.

        Raises:
            SnapshotError: the version does not exist or is incomplete, or its manifest is unreadable or another's.
        """
        path = self.folder(model, version) / MANIFEST
        try:
            manifest = SnapshotManifest.model_validate_json(path.read_text())
        except FileNotFoundError:
            state = "incomplete (no manifest)" if path.parent.exists() else "not published"
            known = ", ".join(self.versions(model)[-3:]) or "none"
            raise SnapshotError(
                f"snapshot {model}@{version} is {state} in {self.root}; newest there: {known}"
            ) from None
        except (OSError, ValueError) as error:
            raise SnapshotError(f"{path}: unreadable manifest ({error}); publish the model again") from None
        if (manifest.model, manifest.version) != (model, version):
            raise SnapshotError(f"{path}: is the manifest of {manifest.model}@{manifest.version}; publish again")
        for name in manifest.files:
            check_name(f"{path}: file", name)
        return manifest

    def verify(self, model: str, version: str) -> SnapshotManifest:
        """Compare every file with its hash.

        Raises:
            SnapshotError: naming the first file that is missing or differs.
        """
        manifest = self.manifest(model, version)
        for name in manifest.files:
            self._verify_file(manifest, name)
        return manifest

    def _verify_file(self, manifest: SnapshotManifest, name: str) -> Path:
        path, record = self.folder(manifest.model, manifest.version) / name, manifest.files.get(name)
        whose = f"snapshot {manifest.model}@{manifest.version}"
        if record is None:
            raise SnapshotError(f"{path}: {whose} does not list it; publish the model again")
        try:
            same = path.stat().st_size == record.bytes and file_sha256(path) == record.sha256
        except OSError as error:
            raise SnapshotError(f"{path}: a file of {whose} cannot be read ({error.strerror})") from None
        if not same:
            raise SnapshotError(f"{path}: bytes differ from the manifest of {whose}; use another version")
        self._verified.add(path)
        return path

    def load(self, model: str, version: str, verify: bool = True) -> dict[str, Tensor]:
        """Every tensor, whole, on the CPU.

        Raises:
            SnapshotError: as `manifest` and `verify`.
        """
        return self.tensors(self.verify(model, version) if verify else self.manifest(model, version))

    def tensors(self, manifest: SnapshotManifest) -> dict[str, Tensor]:
        """Every tensor that a manifest names, which may be a draft: read and not compared with its hash.

        Raises:
            SnapshotError: a file cannot be read.
        """
        return {name: self._read(manifest, name, None, None, verify=False) for name in manifest.tensors}

    def check_rows(self, model: str, version: str) -> CheckRows | None:
        """The rows that the version was checked on, with the trained model's logits; None where it has none.

        Raises:
            SnapshotError: as `manifest` and `verify`.
        """
        manifest = self.manifest(model, version)
        if manifest.check is None or manifest.check.file is None:
            return None
        from rayfm.export.rows import CheckRows  # needs torchrec, which takes seconds to import

        return CheckRows.load(self._verify_file(manifest, check_name("file", manifest.check.file)))

    def read_slice(
        self,
        model: str,
        version: str,
        name: str,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        verify: bool = True,
    ) -> Tensor:
        """Rows ``[a, b)`` and columns ``[c, d)`` of a tensor (None: all), whichever ranks wrote them.

        Reads only what overlaps. A file is hashed the first time that this object touches it.

        Raises:
            SnapshotError: as `manifest` and `verify`; no such tensor; a range beyond its shape.
        """
        return self._read(self.manifest(model, version), name, rows, columns, verify)

    def _read(
        self,
        manifest: SnapshotManifest,
        name: str,
        rows: tuple[int, int] | None,
        columns: tuple[int, int] | None,
        verify: bool,
    ) -> Tensor:
        record = manifest.tensors.get(name)
        if record is None:
            raise SnapshotError(f"snapshot {manifest.model}@{manifest.version} has no tensor {name!r}")
        n_rows, n_columns = record.extent
        (a, b), (c, d) = rows or (0, n_rows), columns or (0, n_columns)
        if not (0 <= a <= b <= n_rows and 0 <= c <= d <= n_columns):
            raise SnapshotError(f"tensor {name!r} is {list(record.shape)}: no rows [{a}, {b}), columns [{c}, {d})")
        if len(record.shape) == 0 and (b - a, d - c) != (1, 1):
            raise SnapshotError(f"tensor {name!r} is a scalar: it has no part")
        shape = (b - a, d - c)[: len(record.shape)] + record.shape[2:]
        out: Tensor | None = None
        for part in record.slices:
            top, bottom = max(a, part.rows[0]), min(b, part.rows[1])
            left, right = max(c, part.columns[0]), min(d, part.columns[1])
            if top >= bottom or left >= right:
                continue
            block = self._block(manifest, part, (top, bottom), (left, right), len(record.shape), verify)
            if str(block.dtype) != f"torch.{record.dtype}":
                raise SnapshotError(
                    f"tensor {name!r}: {part.file} holds {block.dtype}, the manifest says {record.dtype}"
                )
            if tuple(block.shape) == shape:
                return block
            if out is None:
                out = torch.empty(shape, dtype=block.dtype)
            target = out[top - a : bottom - a]
            (target[:, left - c : right - c] if len(shape) > 1 else target).copy_(block)
        return torch.empty(shape, dtype=torch_dtype(record.dtype)) if out is None else out

    def _block(
        self,
        manifest: SnapshotManifest,
        part: SliceRecord,
        rows: tuple[int, int],
        columns: tuple[int, int],
        dims: int,
        verify: bool,
    ) -> Tensor:
        """The overlap of one stored slice with ``rows`` and ``columns`` of the whole tensor."""
        path = self.folder(manifest.model, manifest.version) / check_name("file", part.file)
        if verify and path not in self._verified:
            self._verify_file(manifest, part.file)
        inner: tuple[Any, ...] = (
            slice(rows[0] - part.rows[0], rows[1] - part.rows[0]),
            slice(columns[0] - part.columns[0], columns[1] - part.columns[0]),
        )
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                if dims == 0 or (rows, columns) == (part.rows, part.columns):
                    block: Tensor = file.get_tensor(part.key)
                else:
                    block = file.get_slice(part.key)[inner[:dims]]
        except (OSError, SafetensorError) as error:
            raise SnapshotError(f"{path}: cannot be read ({error}); use another version") from None
        return block
