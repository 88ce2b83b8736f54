"""Exported students: what they predict in every form, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_batches import SCHEMA, SIZES, TASKS, random_batch, small_config, small_model

from rayfm.config import ConfigError, DataError, SnapshotError
from rayfm.data.batch import Batch
from rayfm.export import forms as forms_module
from rayfm.export.calibrator import Calibrator
from rayfm.export.check import calibration_shift, difference
from rayfm.export.config import CompileConfig, Tolerance
from rayfm.export.forms import available_forms
from rayfm.export.rows import CheckRows, only_inputs
from rayfm.export.served import ServedModel
from rayfm.export.student import ExportedStudent, check_export, export_student
from rayfm.models import MODELS, Model
from rayfm.models.dcn import DCN
from rayfm.models.histories import HistoryFeature

FORMS = ("eager", "torchscript", "int8")


def noisy(kind: str, seed: int = 0, **changes: object) -> Model:
    """A model whose weights say something: a fresh one predicts nearly the same of every row."""
    model = small_model(kind, seed=seed, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 0.5 if "embedding" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def calibrated(model: Model) -> dict[str, torch.Tensor]:
    calibrator = Calibrator(SCHEMA, TASKS)
    calibrator.set("click", 0.7, -0.4)
    return dict(ServedModel(model, calibrator).tensors())


def rows_of(model: Model, rows: int = 300, seed: int = 7) -> CheckRows:
    batch = random_batch(rows, seed=seed)
    with torch.no_grad():
        return CheckRows(only_inputs(batch, None, rows), model(batch).logits)


def exported(kind: str, model: Model, compile: str, **options: object) -> ExportedStudent:
    config = CompileConfig.model_validate({"compile": compile, **options})
    return export_student(small_config(kind), SCHEMA, TASKS, calibrated(model), config, rows_of(model))


def trained_predictions(model: Model, batch: Batch) -> dict[str, torch.Tensor]:
    """What a model predicts behind the calibrator of `calibrated`, without anything of the export."""
    with torch.no_grad():
        logits = model(batch).logits
    return {"click": torch.sigmoid(0.7 * logits["click"] - 0.4), "watch": logits["watch"]}


def test_every_model_is_tried() -> None:
    assert set(SIZES) == set(MODELS)


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_every_form_predicts_what_the_trained_model_does(kind: str) -> None:
    model = noisy(kind)
    batch = random_batch(257, seed=3)
    expected = trained_predictions(model, batch)
    assert float(expected["click"].std()) > 0.01
    for form in FORMS:
        student = exported(kind, noisy(kind), form, tolerance={"reduced": 0.1})
        assert student.form == form
        found = student(batch)
        exact = form != "int8"
        for task in TASKS:
            far = difference(expected[task], found[task], task == "click")
            assert found[task].shape == (257,)
            assert found[task].dtype == torch.float32
            assert far <= (2e-6 if exact else 0.1), (form, task, far)
        if form == "int8" and kind not in ("fm", "fmfm"):  # those two have no wide linear layer
            assert not torch.equal(found["click"], expected["click"])


def test_the_number_of_rows_is_free() -> None:
    model = noisy("dmin")
    student = exported("dmin", noisy("dmin"), "torchscript")
    for rows in (1, 2, 9):
        batch = random_batch(rows, seed=11)
        torch.testing.assert_close(student(batch), trained_predictions(model, batch), rtol=0, atol=2e-6)


def test_logits_and_representations_are_those_of_the_model() -> None:
    model = noisy("dcnv2")
    student = exported("dcnv2", noisy("dcnv2"), "int8", tolerance={"reduced": 0.1})
    batch = random_batch(30, seed=5)
    with torch.no_grad():
        output = model(batch)
    expected = {"click": 0.7 * output.logits["click"] - 0.4, "watch": output.logits["watch"]}
    torch.testing.assert_close(student.logits(batch), expected, rtol=0, atol=2e-6)
    predictions, representation_BH = student.predict(batch)
    torch.testing.assert_close(representation_BH, output.representation, rtol=0, atol=2e-6)
    torch.testing.assert_close(predictions, trained_predictions(model, batch), rtol=0, atol=2e-6)
    assert not torch.equal(predictions["click"], student(batch)["click"])  # which is int8


def test_only_a_two_tower_has_vectors() -> None:
    towers = noisy("two_tower")
    batch = random_batch(9)
    with torch.no_grad():
        expected = towers.vectors(batch)
    found = exported("two_tower", noisy("two_tower"), "eager").vectors(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    with pytest.raises(ConfigError, match="a model of type 'dlrm' has no towers"):
        exported("dlrm", noisy("dlrm"), "eager").vectors(batch)


def test_a_batch_without_rows_has_no_predictions() -> None:
    student = exported("dlrm", noisy("dlrm"), "eager")
    assert {task: len(value) for task, value in student(random_batch(0)).items()} == {"click": 0, "watch": 0}


@pytest.mark.parametrize("kind", ["dlrm", "dmin", "fm"])
def test_missing_ids_and_empty_lists_are_zero_vectors(kind: str) -> None:
    model = noisy(kind)
    batch = random_batch(40, seed=2)
    kept = {}
    for name in ("sparse", "weighted", "sequence"):
        ids = getattr(batch, name)
        lengths_KB = ids.lengths().view(-1, 40).clone()
        gone_KB = torch.rand(lengths_KB.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        keep_N = (~gone_KB).reshape(-1).repeat_interleave(lengths_KB.reshape(-1).long())
        lengths_KB[gone_KB] = 0
        weights = ids.weights_or_none()
        kept[name] = type(ids)(
            keys=ids.keys(),
            values=ids.values()[keep_N],
            lengths=lengths_KB.reshape(-1),
            weights=None if weights is None else weights[keep_N],
        )
    batch = dataclasses.replace(batch, **kept)
    found = exported(kind, noisy(kind), "torchscript")(batch)
    torch.testing.assert_close(found, trained_predictions(model, batch), rtol=0, atol=2e-6)


def test_features_may_come_in_another_order_and_with_others() -> None:
    features = ("age", "user", "watched", "topics")
    model = noisy("dlrm", features=features)
    config = small_config("dlrm", features=features)
    student = export_student(config, SCHEMA, TASKS, dict(model.state_dict()), CompileConfig(compile="eager"))
    batch = random_batch(20)
    order = [batch.sparse.keys().index(name) for name in reversed(batch.sparse.keys())]
    shuffled = dataclasses.replace(batch, sparse=batch.sparse.permute(order))
    with torch.no_grad():
        expected = torch.sigmoid(model(batch).logits["click"])
    torch.testing.assert_close(student(shuffled)["click"], expected, rtol=0, atol=2e-6)
    with pytest.raises(DataError, match="the batch lacks feature 'user'"):
        student(dataclasses.replace(batch, sparse=None))


@pytest.mark.parametrize("kind", ["dlrm", "dmin", "fm"])
def test_histories_are_read_as_in_training(kind: str, tmp_path: Path) -> None:
    histories = (
        HistoryFeature(teacher="big", key="user", width=5),
        HistoryFeature(teacher="big", key="video", width=3),
    )
    names = tuple((history.name, history.width or 0) for history in reversed(histories))
    config = small_config(kind, histories=histories)
    model = noisy(kind, histories=histories)
    generator = torch.Generator().manual_seed(3)
    batch = dataclasses.replace(
        random_batch(40, seed=6),
        representation=torch.randn(40, 8, generator=generator),
        representation_mask=torch.rand(40, 2, generator=generator) < 0.5,
        representation_widths=names,
    )
    with torch.no_grad():
        rows = CheckRows(only_inputs(batch, None, 40), model(batch).logits)
        without = torch.sigmoid(model(random_batch(40, seed=6)).logits["click"])
    rows.save(tmp_path / "rows.safetensors")
    options = CompileConfig(compile="torchscript")
    student = export_student(
        config, SCHEMA, TASKS, dict(model.state_dict()), options, CheckRows.load(tmp_path / "rows.safetensors")
    )
    expected = torch.sigmoid(rows.logits["click"])
    assert not torch.allclose(expected, without, atol=1e-3)
    torch.testing.assert_close(student(batch)["click"], expected, rtol=0, atol=2e-6)
    # A request without any history is one of entities that nobody has seen.
    torch.testing.assert_close(student(random_batch(40, seed=6))["click"], without, rtol=0, atol=2e-6)


def test_tables_are_merged_and_not_kept_twice() -> None:
    tensors = calibrated(noisy("dlrm"))
    kept = dict(tensors)
    student = export_student(small_config("dlrm"), SCHEMA, TASKS, tensors, CompileConfig(compile="eager"))
    assert tensors == {}
    assert not any("embedding_bags" in name for name in student._part.state_dict())
    merged = next(iter(student._lookups._merged.values())).weight_RE
    tables = [value for name, value in kept.items() if "embedding_bags" in name]
    assert len(merged) == sum(len(table) for table in tables) + 1
    assert torch.equal(merged[: len(tables[0])], next(t for t in tables if torch.equal(t, merged[: len(t)])))


def test_auto_keeps_the_fastest_of_the_right_forms() -> None:
    student = exported("dcnv2", noisy("dcnv2"), "auto", candidates=64)
    assert set(student.results) == {"eager", "torchscript", "int8"}
    timed = {form: r.seconds for form, r in student.results.items() if r.seconds is not None}
    assert student.form == min(timed, key=timed.__getitem__)
    assert all((r.seconds is None) == (r.refused is not None) for r in student.results.values())


def test_a_form_that_is_off_is_never_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 is fastest here, and wrong by a little more than may be."""

    def fast_and_wrong(part: torch.nn.Module) -> torch.nn.Module:
        class Wrong(torch.nn.Module):
            def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                rows = tensors[0][:, 0, 0] * 0
                return rows + 0.5, rows

            examples = part.examples

        return Wrong()

    monkeypatch.setattr(forms_module, "quantized", fast_and_wrong)
    monkeypatch.setattr(forms_module, "scripted", lambda part: part)
    student = exported("dcnv2", noisy("dcnv2"), "auto")
    assert student.form != "int8"
    assert student.results["int8"].refused is not None
    assert "differs: click by" in student.results["int8"].refused
    with pytest.raises(SnapshotError, match=r"does not predict what the trained one did .int8 differs: click by"):
        exported("dcnv2", noisy("dcnv2"), "int8")


def test_a_form_that_cannot_be_made_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:

    def broken(part: torch.nn.Module) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(forms_module, "scripted", broken)
    student = exported("dlrm", noisy("dlrm"), "auto")
    assert student.form == "eager"
    assert student.results["torchscript"].refused == "RuntimeError: no such operator"


def test_aot_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms_module.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"compile: aot_bf16 needs a C.. compiler.*install g.."):
        exported("dlrm", noisy("dlrm"), "aot_bf16")


def test_auto_tries_native_code_where_it_is_told_and_can(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    native = CompileConfig(native=True)
    monkeypatch.setattr(forms_module.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert available_forms(CompileConfig()) == FORMS
    assert available_forms(native) == (*FORMS, "aot_bf16")
    monkeypatch.setattr(forms_module.shutil, "which", lambda name: None)
    with caplog.at_level("WARNING"):
        assert available_forms(native) == FORMS
    assert "install g++" in caplog.text


def test_weights_that_were_not_trained_are_refused() -> None:
    rows = rows_of(noisy("dlrm"))
    with pytest.raises(SnapshotError, match="eager differs: click by"):
        export_student(
            small_config("dlrm"), SCHEMA, TASKS, calibrated(noisy("dlrm", seed=1)), CompileConfig(compile="eager"), rows
        )


def test_a_prediction_that_is_not_a_number_is_refused() -> None:
    model = noisy("dlrm")
    rows = rows_of(model)
    tensors = calibrated(model)
    tensors["heads.linear.bias"] = torch.tensor([float("nan"), 0.0])
    with pytest.raises(SnapshotError, match="click by NaN"):
        export_student(small_config("dlrm"), SCHEMA, TASKS, tensors, CompileConfig(compile="eager"), rows)


def test_without_rows_random_ones_are_compared() -> None:
    model = noisy("wukong")
    config = CompileConfig(compile="int8", tolerance=Tolerance(reduced=0.05))
    student = export_student(small_config("wukong"), SCHEMA, TASKS, calibrated(model), config)
    check = student.results["int8"].check
    assert check is not None
    assert check.passed
    assert 0 < check.difference["click"] < 0.05


def test_differences_by_hand() -> None:
    assert difference(torch.tensor([0.1, 0.5]), torch.tensor([0.3, 0.5]), binary=True) == pytest.approx(0.2)
    # A regression's is over its largest expected value where that is above 1.
    assert difference(torch.tensor([10.0, -40.0]), torch.tensor([12.0, -40.0]), binary=False) == pytest.approx(0.05)
    assert difference(torch.tensor([0.5]), torch.tensor([0.1]), binary=False) == pytest.approx(0.4)
    assert calibration_shift(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.3])) == pytest.approx(0.25)


def test_a_shifted_calibration_alone_is_refused() -> None:
    """Every row is off by less than the difference lets pass, and all the same way."""
    model = noisy("dlrm")
    rows = rows_of(model)
    tensors = calibrated(model)
    tensors["calibrator.click.shift"] = torch.tensor(-0.4)
    rows.logits["click"] = rows.logits["click"] + 0.02
    tolerance = Tolerance(exact=0.05, calibration=1e-3)
    with pytest.raises(SnapshotError, match="calibration of click"):
        export_student(
            small_config("dlrm"), SCHEMA, TASKS, tensors, CompileConfig(compile="eager", tolerance=tolerance), rows
        )


@pytest.mark.parametrize("kind", ["dmin", "dlrm"])
def test_rows_come_back_as_they_were(tmp_path: Path, kind: str) -> None:
    model = noisy(kind)
    batch = random_batch(50, seed=4)
    rows = CheckRows(only_inputs(batch, None, 20), {"click": torch.randn(20)})
    rows.save(tmp_path / "rows.safetensors")
    again = CheckRows.load(tmp_path / "rows.safetensors")
    assert torch.equal(again.logits["click"], rows.logits["click"])
    with torch.no_grad():
        expected = model(batch).logits["click"][:20]
        assert torch.equal(model(again.batch).logits["click"], model(rows.batch).logits["click"])
        torch.testing.assert_close(model(again.batch).logits["click"], expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "rows.safetensors").write_bytes(b"12345678")
    with pytest.raises(SnapshotError, match="no rows of an export check"):
        CheckRows.load(tmp_path / "rows.safetensors")


def test_rows_hold_the_models_features_alone() -> None:
    kept = only_inputs(random_batch(30), ("user", "tags"), 5)
    assert kept.sparse.keys() == ["user", "tags"]
    assert (kept.weighted, kept.sequence, len(kept)) == (None, None, 5)


def test_the_check_at_publishing() -> None:
    model = noisy("dcn")
    rows = rows_of(model)
    check = check_export(small_config("dcn"), SCHEMA, TASKS, calibrated(model), rows, "2024-01-01", Tolerance())
    assert (check.period, check.rows) == ("2024-01-01", 300)
    assert set(check.forms) == set(FORMS)
    assert check.forms["eager"].passed
    assert type(check).model_validate_json(check.model_dump_json()) == check
    rows.logits["watch"] = rows.logits["watch"] + 1.0
    with pytest.raises(SnapshotError, match=r"differs from the trained one on 300 rows of 2024-01-01: .*not published"):
        check_export(small_config("dcn"), SCHEMA, TASKS, calibrated(model), rows, "2024-01-01", Tolerance())


def test_publishing_goes_on_without_a_form_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def branching(self: DCN, batch: Batch) -> torch.Tensor:
        x_BI = self.flat_inputs(batch)
        return self.deep(x_BI) + x_BI.sum() if torch.jit.is_tracing() else original(self, batch)

    original = DCN.represent
    monkeypatch.setattr(DCN, "represent", branching)
    rows = rows_of(noisy("dcn"))
    tensors = calibrated(noisy("dcn"))
    check = check_export(small_config("dcn"), SCHEMA, TASKS, tensors, rows, "2024-01-01", Tolerance())
    assert check.forms["eager"].passed
    for form in ("torchscript", "int8"):
        said = check.forms[form]
        assert not said.passed
        assert said.reason is not None
        assert said.reason.startswith("RuntimeError: ")
        assert said.worst() == said.reason
    assert type(check).model_validate_json(check.model_dump_json()) == check


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (len, r"TypeError: len.batch. is not known .* take the shape of what the embeddings gave"),
        (lambda batch: batch.traffic, r"AttributeError: batch\.traffic is not there where a model is served"),
        (lambda batch: batch.sparse, r"AttributeError: batch\.sparse is not there where a model is served"),
    ],
)
def test_a_model_that_reads_more_than_its_inputs_is_not_published(
    read: Callable[[Batch], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(self: DCN, batch: Batch) -> torch.Tensor:
        read(batch)
        return original(self, batch)

    original = DCN.represent
    monkeypatch.setattr(DCN, "represent", greedy)
    rows = rows_of(noisy("dcn"))
    tensors = calibrated(noisy("dcn"))
    with pytest.raises(SnapshotError, match=rf"does not run .{message}.*docs/extending\.md.*not published"):
        check_export(small_config("dcn"), SCHEMA, TASKS, tensors, rows, "2024-01-01", Tolerance())


def test_calibration_shifts_by_hand() -> None:
    assert calibration_shift(torch.tensor([0.2, 0.4]), torch.tensor([0.3, 0.6])) == pytest.approx(0.5)
    assert calibration_shift(torch.zeros(3), torch.zeros(3)) == 0.0  # a model that has collapsed is exported as it is
    assert calibration_shift(torch.zeros(3), torch.ones(3)) == float("inf")
