"""Native code of exported students: what its package is named by, where it lies, and that it takes other weights."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from model_batches import SCHEMA, TASKS, small_config

from rayfm.config import ConfigError
from rayfm.export import compiled as compiled_module
from rayfm.export import forms as forms_module
from rayfm.export.calibrator import Calibrator
from rayfm.export.compiled import Architecture, cache_folder, package_path, source_digest
from rayfm.export.config import CompileConfig, Tolerance
from rayfm.export.rows import only_inputs
from rayfm.export.served import ServedModel
from rayfm.export.student import export_student
from rayfm.models.build import build_model
from rayfm.models.synthetic import synthetic_batch
from rayfm.schema import Schema


def test_a_cache_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    assert cache_folder(str(tmp_path / "own" / "compiled")).stat().st_mode & 0o777 == 0o700
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(ConfigError, match="holds code that the service runs"):
        cache_folder(str(open_to_all))
    (tmp_path / "link").symlink_to(tmp_path / "own")
    with pytest.raises(ConfigError, match="holds code that the service runs"):
        cache_folder(str(tmp_path / "link"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        cache_folder(str(tmp_path / "file"))


def test_an_architecture_names_what_its_code_depends_on() -> None:
    one = Architecture(small_config("dlrm"), SCHEMA, TASKS, True)
    assert Architecture.parse(one.text()) == one
    others = [
        Architecture(small_config("dlrm", over=(16, 8)), SCHEMA, TASKS, True),
        Architecture(small_config("dlrm"), SCHEMA, TASKS[:1], True),
        Architecture(small_config("dlrm"), SCHEMA, TASKS, False),
    ]
    assert len({item.digest() for item in (one, *others)}) == 4


def test_a_change_of_the_models_code_is_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest() -> str:
        source_digest.cache_clear()
        return Architecture(small_config("dlrm"), SCHEMA, TASKS, True).digest()

    before = digest()
    assert digest() == before
    copies = []
    for folder in compiled_module.SOURCES:
        copies.append(tmp_path / folder.name)
        shutil.copytree(folder, copies[-1])
    monkeypatch.setattr(compiled_module, "SOURCES", tuple(copies))
    names = {file.name for folder in copies for file in folder.iterdir()}
    assert {"dlrm.py", "mlp.py", "ports.py", "calibrator.py"} <= names
    found = {digest()}
    for name in ("models/mlp.py", "export/calibrator.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        found.add(digest())
    assert len(found) == 3
    source_digest.cache_clear()


def test_a_change_of_a_plug_ins_code_is_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "plugged_in"
    (package / "layers").mkdir(parents=True)
    for name in ("__init__.py", "model.py", "layers/crosses.py"):
        (package / name).write_text("")
    (package / "model.py").write_text("from rayfm.models.dlrm import DLRM\nclass Plugged(DLRM): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("plugged_in.model").Plugged
    found = {source_digest(model), source_digest(model.__base__)}
    for name in ("model.py", "layers/crosses.py"):
        with (package / name).open("a") as file:
            file.write("# changed\n")
        source_digest.cache_clear()
        found.add(source_digest(model))
    assert len(found) == 4


SMALL = Schema.model_validate(
    {**SCHEMA.dump(), "features": [{"name": "age", "kind": "dense"}, {"name": "user", "kind": "sparse"}]}
)


@pytest.mark.skipif(
    forms_module.compiler() is None and os.environ.get("RAYFM_CI") != "1", reason="no C++ compiler; install g++"
)
def test_native_code_is_compiled_once_and_takes_each_versions_weights(tmp_path: Path) -> None:
    config = CompileConfig(compile="aot_bf16", cache=str(tmp_path / "compiled"), tolerance=Tolerance(reduced=0.02))
    architecture = Architecture(small_config("dlrm"), SMALL, ("click",), True)
    package = package_path(architecture, config)
    students, built = [], []
    for seed in (0, 1):
        model = build_model(small_config("dlrm"), SMALL, ("click",), seed=seed).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        calibrator = Calibrator(SMALL, ("click",))
        calibrator.set("click", 0.5 + seed, 0.25 - seed)
        with torch.no_grad():
            batch = synthetic_batch(SMALL, 65, seed=9)
            built.append(torch.sigmoid((0.5 + seed) * model(batch).logits["click"] + 0.25 - seed))
        tensors = dict(ServedModel(model, calibrator).tensors())
        students.append(export_student(small_config("dlrm"), SMALL, ("click",), tensors, config))
        when = package.stat().st_mtime_ns
        assert students[0].form == "aot_bf16"
    assert package.stat().st_mtime_ns == when
    assert len(list(package.parent.glob("*.pt2"))) == 1
    assert float((built[0] - built[1]).abs().max()) > 0.2
    for student, expected in zip(students, built, strict=True):
        for rows in (1, 2, 65):
            found = student(only_inputs(synthetic_batch(SMALL, 65, seed=9), None, rows))["click"]
            assert found.dtype == torch.float32
            assert 0 < float((found - expected[:rows]).abs().max()) < 0.02
