"""What ``kubectl kustomize`` makes of a folder, for the few features that cluster/kubernetes uses; all else is refused.

There is no package of kustomize for Python. Where ``kubectl`` is installed, `test_kustomize` compares the two.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Object = dict[str, Any]

KEYS = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "components",
    "generatorOptions",
    "configMapGenerator",
    "patches",
    "images",
    "replacements",
}
CLUSTER_WIDE = {"Namespace"}


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization."""
    objects: list[Object] = []
    kustomization = read(folder, "Kustomization")
    for name in kustomization.get("resources", []):
        path = (folder / name).resolve()
        objects += render(path) if path.is_dir() else documents(path)
    apply(kustomization, folder, objects)
    return objects


def read(folder: Path, kind: str) -> Object:
    """A kustomization.yaml. Raises AssertionError where it has a key that is not known here."""
    found: Object = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = found.keys() - KEYS
    assert not unknown, f"{folder}: the renderer of the tests does not know {sorted(unknown)}"
    assert found["kind"] == kind, folder
    return found


def documents(path: Path) -> list[Object]:
    """The objects of a YAML file; what anchors and aliases share there is nobody's afterwards."""
    found = [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
    unshared: list[Object] = json.loads(json.dumps(found))
    return unshared


def apply(kustomization: Object, folder: Path, objects: list[Object]) -> None:
    """Components, generators, patches, namespace, images and replacements, in kustomize's order."""
    for name in kustomization.get("components", []):
        inner = (folder / name).resolve()
        component = read(inner, "Component")
        assert "resources" not in component
        apply(component, inner, objects)
    options = kustomization.get("generatorOptions", {})
    for config_map in kustomization.get("configMapGenerator", []):
        assert options == {"disableNameSuffixHash": True}, f"{folder}: names with hashes are not rendered here"
        _generate(config_map, folder, objects)
    for patch in kustomization.get("patches", []):
        _patch(patch, folder, objects)
    namespace = kustomization.get("namespace")
    for found in objects if namespace else []:
        if found["kind"] == "Namespace":
            found["metadata"]["name"] = namespace
        if found["kind"] not in CLUSTER_WIDE:
            found["metadata"]["namespace"] = namespace
    for image in kustomization.get("images", []):
        for found in objects:
            _set_image(found, image)
    for replacement in kustomization.get("replacements", []):
        _replace(replacement, objects)


def select(objects: list[Object], kind: str, name: str) -> Object:
    """The one object of this kind and name."""
    found = [one for one in objects if (one["kind"], one["metadata"].get("name")) == (kind, name)]
    assert len(found) == 1, f"{len(found)} objects {kind} {name}"
    return found[0]


def _generate(config_map: Object, folder: Path, objects: list[Object]) -> None:
    assert config_map.keys() <= {"name", "namespace", "behavior", "files", "options"}, config_map
    data = {name: (folder / name).read_text() for name in config_map["files"]}
    if config_map.get("behavior") == "merge":
        select(objects, "ConfigMap", config_map["name"])["data"].update(data)
        return
    metadata = {key: config_map[key] for key in ("name", "namespace") if key in config_map}
    objects.append(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata | config_map.get("options", {}), "data": data}
    )


def _patch(patch: Object, folder: Path, objects: list[Object]) -> None:
    assert patch.keys() <= {"target", "path", "patch"}, patch
    target = select(objects, **patch["target"])
    body = yaml.safe_load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text())
    if isinstance(body, list):
        changed = jsonpatch.apply_patch(target, body)
        target.clear()
        target.update(changed)
    else:
        _merge(target, body)


def _merge(target: Object, body: Object) -> None:
    for key, value in body.items():
        assert not isinstance(value, list), f"{key}: how lists are merged depends on the kind; write a JSON patch"
        if isinstance(value, dict):
            _merge(target.setdefault(key, {}), value)
        else:
            target[key] = value


def _set_image(node: Any, image: Object) -> None:
    if isinstance(node, list):
        for item in node:
            _set_image(item, image)
        return
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in ("containers", "initContainers") and isinstance(value, list):
            for container in value:
                name = container.get("image", "").rpartition("@")[0] or container.get("image", "")
                repository, _, tag = name.rpartition(":") if ":" in name.rpartition("/")[2] else (name, "", "")
                if repository == image["name"]:
                    container["image"] = f"{image.get('newName', repository)}:{image.get('newTag', tag)}"
        _set_image(value, image)


def _replace(replacement: Object, objects: list[Object]) -> None:
    source = replacement["source"]
    values = _places(select(objects, source["kind"], source["name"]), _split(source["fieldPath"]), create=False)
    assert len(values) == 1, source
    holder, key = values[0]
    for target in replacement["targets"]:
        found = select(objects, **target["select"])
        for path in target["fieldPaths"]:
            places = _places(found, _split(path), target.get("options", {}).get("create", False))
            assert places, f"{path} leads nowhere"
            for place, name in places:
                place[name] = copy.deepcopy(holder[key])


def _split(path: str) -> list[str]:
    return re.findall(r"\[[^\]]*\]|[^.\[\]]+", path)


def _places(node: Any, path: list[str], create: bool) -> list[tuple[Any, Any]]:
    """(container, key) of each value that a path leads to."""
    step, rest = path[0], path[1:]
    if step == "*":
        keys: list[Any] = list(range(len(node)))
    elif step.startswith("["):
        name, _, value = step[1:-1].partition("=")
        keys = [place for place, item in enumerate(node) if item.get(name) == value]
        if not keys and create:
            node.append({name: value})
            keys = [len(node) - 1]
    else:
        if step not in node and create:
            node[step] = {}
        keys = [step] if step in node else []
    if not rest:
        return [(node, key) for key in keys]
    return [place for key in keys for place in _places(node[key], rest, create)]
