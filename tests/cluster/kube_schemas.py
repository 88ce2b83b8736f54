"""Strict schemas of Kubernetes objects: an unknown field is an error, where the API server would drop it silently."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

KUBERNETES = "1.34"
"""The version whose schemas core kinds are held to."""

RAY_KINDS = {
    "RayCluster": "rayclusters",
    "RayJob": "rayjobs",
    "RayService": "rayservices",
    "RayCronJob": "raycronjobs",
}


def schemas_folder() -> Path:
    """The folder of KubeRay's CRDs (RAYFM_KUBERAY_SCHEMAS, by default beside the checkout); skips without it."""
    default = Path(__file__).resolve().parents[3] / "shared" / "schemas" / "kuberay"
    folder = Path(os.environ.get("RAYFM_KUBERAY_SCHEMAS", default))
    if not folder.is_dir():
        pytest.skip(f"no KubeRay schemas at {folder}; set RAYFM_KUBERAY_SCHEMAS to a folder of its CRDs as JSON")
    return folder


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema that accepts what a structural schema of a CRD keeps, and nothing that it would prune.

    Objects have the properties that are named and no others, unless ``additionalProperties`` or
    ``x-kubernetes-preserve-unknown-fields`` says so. ``x-kubernetes-int-or-string`` is an integer or a string;
    ``x-kubernetes-embedded-resource`` adds an object's own fields. Rules (``x-kubernetes-validations``, CEL) are left.
    """
    found = {key: value for key, value in schema.items() if key not in ("properties", "items", "default", "format")}
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        return found
    if "items" in schema:
        found["items"] = strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = strict(schema["additionalProperties"])
    if schema.get("type") == "object":
        properties = dict(schema.get("properties", {}))
        if schema.get("x-kubernetes-embedded-resource"):
            properties |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
        found["properties"] = {name: strict(value) for name, value in properties.items()}
        keeps = schema.get("x-kubernetes-preserve-unknown-fields", False)
        if not keeps and "additionalProperties" not in schema:
            found["additionalProperties"] = False
    if schema.get("nullable") and "type" in found:
        found["type"] = [found["type"], "null"]
    return found


@functools.cache
def ray_schema(kind: str, folder: Path) -> dict[str, Any]:
    """The strict schema of ``ray.io/v1`` of a kind."""
    definition = json.loads((folder / f"ray.io_{RAY_KINDS[kind]}.json").read_text())
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema = copy.deepcopy(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return strict(schema)


def problems(found: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an object, one line each."""
    name = f"{found['kind']} {found['metadata'].get('name', found['metadata'].get('generateName'))}"
    if found["kind"] in RAY_KINDS:
        if found["apiVersion"] != "ray.io/v1":
            yield f"{name}: apiVersion {found['apiVersion']}"
        schema = ray_schema(found["kind"], schemas_folder())
        for error in jsonschema.Draft202012Validator(schema).iter_errors(found):
            yield f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
        yield from (f"{name}: {twice}" for twice in repeated(found, schema))
        # The CRD says nothing of an object's own metadata: a ConfigMap with it is held to the core schema.
        found = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": found["metadata"]}
    try:
        kubernetes_validate.validate(found, KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        where = ".".join(map(str, getattr(error, "absolute_path", getattr(error, "path", ()))))
        yield f"{name}: {where}: {error.message}"


def repeated(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Items of lists that stand for maps (``x-kubernetes-list-map-keys``) whose keys are not unique."""
    if isinstance(value, dict):
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key)
            if inner is not None:
                yield from repeated(item, inner, f"{path}.{key}")
    elif isinstance(value, list):
        inner, keys = schema.get("items", {}), schema.get("x-kubernetes-list-map-keys")
        if keys:
            seen = [tuple(item.get(key) for key in keys) for item in value]
            yield from (f"{path}: {one} stands twice" for one in sorted(set(seen), key=str) if seen.count(one) > 1)
        for item in value:
            yield from repeated(item, inner, f"{path}[]")
