"""Loading a student in the form that serves it fastest, in place of the plain fp32 model."""

from __future__ import annotations

import logging

from rayfm.data.encode import Encoder
from rayfm.export.config import CompileConfig
from rayfm.export.student import export_student
from rayfm.models.base import MODELS, ModelConfig
from rayfm.schema import Schema
from rayfm.serving.teacher import LoadedVersion
from rayfm.snapshots.ids import load_vocabularies
from rayfm.snapshots.load import SnapshotStore

log = logging.getLogger(__name__)


def load_exported(store: SnapshotStore, model: str, version: str, config: CompileConfig | None = None) -> LoadedVersion:
    """Load, verify and export a published version; as `load_version`, compiled.

    The forms are compared with the trained model on the rows that the version was checked on when it was published.

    Raises:
        SnapshotError: it is not there, its bytes differ from its manifest, or no form that is allowed passes the check.
        ConfigError: the named form cannot be made on this machine.
    """
    manifest = store.manifest(model, version)
    schema = Schema.model_validate(manifest.example_schema)
    model_config: ModelConfig = MODELS[manifest.config["type"]].Config.model_validate(manifest.config)
    rows = store.check_rows(model, version)
    student = export_student(model_config, schema, manifest.tasks, store.load(model, version), config, rows)
    for form, result in student.results.items():
        if result.refused is not None:
            log.warning("%s@%s is not served as %s: %s", model, version, form, result.refused)
    log.info("%s@%s is served as %s", model, version, student.form)
    histories = tuple((history.name, history.width or 0) for history in model_config.histories)
    vocabularies = load_vocabularies(store, model, version)
    encoder = Encoder(schema, model_config.features, labels=False, representations=histories, vocabularies=vocabularies)
    return LoadedVersion(version, manifest.trained_through, student, encoder, manifest.tasks)
