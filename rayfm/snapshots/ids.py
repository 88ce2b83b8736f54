"""The vocabularies that a published version was trained with; whoever serves it maps ids as its trainer did."""

from __future__ import annotations

import numpy as np

from rayfm.data.vocabulary import Vocabulary
from rayfm.export.served import IDS_PREFIX
from rayfm.schema import Schema
from rayfm.snapshots.load import SnapshotStore


def load_vocabularies(store: SnapshotStore, model: str, version: str) -> dict[str, Vocabulary]:
    """Table -> vocabulary, of the tables of a version that have one: its tensors ``ids.<table>``, int64 ``[V]``.

    Raises:
        SnapshotError: the version is not there, or its bytes differ from its manifest.
    """
    manifest = store.manifest(model, version)
    schema = Schema.model_validate(manifest.example_schema)
    found = {}
    for name in manifest.tensors:
        if name.startswith(IDS_PREFIX):
            table = name.removeprefix(IDS_PREFIX)
            ids_V = store.read_slice(model, version, name).numpy().astype(np.int64)
            found[table] = Vocabulary(ids_V, schema.tables[table].shared_rows, schema.salt(table))
    return found
