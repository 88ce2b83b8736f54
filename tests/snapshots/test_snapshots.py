from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rayfm.config import SnapshotError
from rayfm.snapshots import (
    Collector,
    LeaseLost,
    RankFile,
    SnapshotStore,
    SnapshotWriter,
    TensorSlice,
    version_id,
)
from rayfm.snapshots.manifest import MANIFEST, extent
from rayfm.snapshots.publish import publish


def model_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "table": torch.randn(10, 6, generator=generator),
        "half": torch.randn(7, 4, generator=generator).to(torch.bfloat16),
        "bias": torch.randn(5, generator=generator),
        "scale": torch.tensor(2.5),
        "steps": torch.tensor([3], dtype=torch.int64),
        "cube": torch.randn(4, 3, 2, generator=generator),
        "empty": torch.empty(0, 3),
    }


def part(name: str, whole: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> TensorSlice:
    tensor = whole[rows[0] : rows[1]]
    if columns is not None:
        tensor = tensor[:, columns[0] : columns[1]]
    return TensorSlice(name, tensor, (rows[0], columns[0] if columns else 0), tuple(whole.shape))


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def test_what_is_published_is_what_is_loaded(tmp_path):
    tensors = model_tensors()
    manifest = publish(
        tmp_path,
        "fm",
        version_id("2022-04-25", "run"),
        tensors,
        trained_through="2022-04-25",
        config={"type": "dlrm", "embedding_dim": 16},
        tasks=("click",),
        metrics={"ne": 0.87},
    )
    store = SnapshotStore(tmp_path)
    loaded = store.load("fm", manifest.version)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    assert store.manifest("fm", manifest.version) == manifest
    assert manifest.trained_through == "2022-04-25"
    assert manifest.config["embedding_dim"] == 16
    suffixes = {path.suffix for path in store.folder("fm", manifest.version).iterdir()}
    assert suffixes == {".json", ".safetensors"}


def test_versions_sort_in_time_and_incomplete_ones_are_ignored(tmp_path):
    versions = [version_id(period, "run") for period in ("2022-04-30", "2022-05-01", "2022-04-29T23")]
    for version in versions:
        publish(tmp_path, "fm", version, {"w": torch.ones(1)})
    SnapshotWriter(tmp_path, "fm", "2023-01-01-aaaaaaaa").write(0, [TensorSlice.whole("w", torch.ones(1))])
    SnapshotWriter(tmp_path, "other", "2023-01-01-aaaaaaaa").write(0, [TensorSlice.whole("w", torch.ones(1))])
    store = SnapshotStore(tmp_path)
    assert store.models() == ["fm"]
    assert store.versions("fm") == sorted(versions)
    assert store.latest("fm") == versions[1]
    assert store.latest("other") is None
    with pytest.raises(SnapshotError, match=r"incomplete \(no manifest\)"):
        store.load("fm", "2023-01-01-aaaaaaaa")
    with pytest.raises(SnapshotError, match="not published"):
        store.load("fm", "2024-01-01-aaaaaaaa")


def test_slices_of_several_ranks_are_read_as_other_slices(tmp_path):
    tensors = model_tensors()
    table = tensors["table"]
    ranks = [  # row-wise, column-wise and grid, from three ranks; a fourth has nothing
        [
            part("table", table, (0, 4)),
            part("half", tensors["half"], (0, 7), (0, 1)),
            part("cube", tensors["cube"], (0, 1)),
        ],
        [part("table", table, (4, 10), (0, 2)), part("half", tensors["half"], (0, 7), (1, 4))],
        [
            part("table", table, (4, 10), (2, 6)),
            part("cube", tensors["cube"], (1, 4)),
            part("bias", tensors["bias"], (2, 5)),
        ],
        [],
    ]
    ranks[0] += [part("bias", tensors["bias"], (0, 2)), TensorSlice.whole("scale", tensors["scale"])]
    writer = SnapshotWriter(tmp_path, "fm", "v1")
    files = [writer.write(rank, slices) for rank, slices in enumerate(ranks)]
    files = [RankFile.model_validate(json.loads(json.dumps(file.dump()))) for file in files]  # as gathered
    manifest = writer.commit(files[::-1])
    assert len(manifest.files) == 3
    store = SnapshotStore(tmp_path)
    loaded = store.load("fm", "v1")
    for name in ("table", "half", "cube", "bias", "scale"):
        assert same(loaded[name], tensors[name]), name
        rows, columns = extent(tuple(tensors[name].shape))
        for a in range(0, rows + 1, 2):
            for b in range(a, rows + 1):
                got = store.read_slice("fm", "v1", name, rows=(a, b)) if tensors[name].ndim else tensors[name]
                want = tensors[name][a:b] if tensors[name].ndim else tensors[name]
                assert same(got, want), (name, a, b)
        if tensors[name].ndim >= 2:
            for c in range(columns):
                got = store.read_slice("fm", "v1", name, rows=(1, rows), columns=(c, columns))
                assert same(got, tensors[name][1:, c:]), (name, c)


def test_reading_a_slice_touches_only_files_that_overlap(tmp_path):
    table = model_tensors()["table"]
    writer = SnapshotWriter(tmp_path, "fm", "v1")
    files = [writer.write(0, [part("table", table, (0, 5))]), writer.write(1, [part("table", table, (5, 10))])]
    writer.commit(files)
    (writer.folder / files[1].file).unlink()
    store = SnapshotStore(tmp_path)
    assert same(store.read_slice("fm", "v1", "table", rows=(0, 5)), table[:5])
    with pytest.raises(SnapshotError, match=files[1].file):
        store.read_slice("fm", "v1", "table", rows=(4, 6))
    with pytest.raises(SnapshotError, match="no rows"):
        store.read_slice("fm", "v1", "table", rows=(0, 11))
    with pytest.raises(SnapshotError, match="no tensor 'tabel'"):
        store.read_slice("fm", "v1", "tabel")


@pytest.mark.parametrize(
    ("slices", "complaint"),
    [
        ([((0, 4), None), ((5, 10), None)], "cover 54 of 10 x 6"),
        ([((0, 6), None), ((5, 10), None)], "overlap at row 5, column 0"),
        ([((0, 10), (0, 3)), ((0, 10), (2, 6))], "overlap at row 0, column 2"),
        ([((0, 10), (0, 3))], "cover 30 of 10 x 6"),
        ([((0, 10), None), ((0, 10), None)], "overlap at row 0, column 0"),
        # As many cells as the whole, but one region twice and another never.
        ([((0, 5), None), ((0, 5), (0, 6))], "overlap"),
        ([((0, 5), None), ((3, 5), None), ((5, 8), None)], "overlap at row 3"),
    ],
)
def test_gaps_and_overlaps_are_refused(tmp_path, slices, complaint):
    table = model_tensors()["table"]
    writer = SnapshotWriter(tmp_path, "fm", "v1")
    files = [writer.write(rank, [part("table", table, *place)]) for rank, place in enumerate(slices)]
    with pytest.raises(SnapshotError, match=complaint):
        writer.commit(files)
    assert SnapshotStore(tmp_path).versions("fm") == []


def test_slices_that_do_not_fit_are_refused(tmp_path):
    writer = SnapshotWriter(tmp_path, "fm", "v1")
    for item in (
        TensorSlice("t", torch.ones(3, 2), (8, 0), (10, 2)),
        TensorSlice("t", torch.ones(3, 2), (-1, 0), (10, 2)),
        TensorSlice("t", torch.ones(3), (0, 0), (10, 2)),
        TensorSlice("t", torch.ones(3, 2, 4), (0, 0), (10, 2, 5)),
    ):
        with pytest.raises(SnapshotError, match="does not lie within"):
            writer.write(0, [item])
    files = [
        writer.write(0, [TensorSlice("t", torch.ones(3, 2), (0, 0), (6, 2))]),
        writer.write(1, [TensorSlice("t", torch.ones(3, 2, dtype=torch.float64), (3, 0), (6, 2))]),
    ]
    with pytest.raises(SnapshotError, match="float64"):
        writer.commit(files)


def test_committing_again_is_fine_with_equal_content_and_refused_with_other(tmp_path):
    tensors = model_tensors()
    first = publish(tmp_path, "fm", "v1", tensors, metrics={"ne": 0.5})
    before = {path.name: path.read_bytes() for path in SnapshotStore(tmp_path).folder("fm", "v1").iterdir()}
    assert publish(tmp_path, "fm", "v1", tensors, metrics={"ne": 0.5}) == first
    with pytest.raises(SnapshotError, match="stands with other content"):
        publish(tmp_path, "fm", "v1", {**tensors, "bias": tensors["bias"] + 1}, metrics={"ne": 0.5})
    with pytest.raises(SnapshotError, match="stands with other content"):
        publish(tmp_path, "fm", "v1", tensors, metrics={"ne": 0.6})
    store = SnapshotStore(tmp_path)
    store.verify("fm", "v1")
    assert {name: (store.folder("fm", "v1") / name).read_bytes() for name in before} == before


def test_a_publication_taken_up_after_a_kill_leaves_no_litter(tmp_path):
    writer = SnapshotWriter(tmp_path, "fm", "v1")
    writer.write(0, [TensorSlice.whole("w", torch.zeros(3))])  # killed before the commit; the weights differ by now
    (writer.folder / ".rank-00001.dead.tmp").write_bytes(b"half")
    manifest = publish(tmp_path, "fm", "v1", {"w": torch.ones(3)})
    assert {path.name for path in writer.folder.iterdir()} == {MANIFEST, *manifest.files}


def test_a_rank_whose_file_is_not_there_is_noticed(tmp_path):
    writer = SnapshotWriter(tmp_path, "fm", "v1")
    file = writer.write(0, [TensorSlice.whole("w", torch.zeros(3))])
    shutil.rmtree(writer.folder)
    with pytest.raises(SnapshotError, match="all ranks must see one folder"):
        writer.commit([file])


def test_views_and_shared_tensors_are_stored_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    publish(tmp_path, "fm", "v1", {"base": base, "tied": base, "turned": base.T, "row": base[1]})
    loaded = SnapshotStore(tmp_path).load("fm", "v1")
    assert same(loaded["tied"], base)
    assert same(loaded["turned"], base.T)
    assert same(loaded["row"], base[1])


def test_a_changed_byte_is_refused(tmp_path):
    manifest = publish(tmp_path, "fm", "v1", model_tensors())
    store = SnapshotStore(tmp_path)
    (name,) = manifest.files
    path = store.folder("fm", "v1") / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    for read in (
        lambda: store.verify("fm", "v1"),
        lambda: store.load("fm", "v1"),
        lambda: store.read_slice("fm", "v1", "table"),
    ):
        with pytest.raises(SnapshotError, match=f"{name}: bytes differ"):
            read()
    path.write_bytes(data[:-8])
    with pytest.raises(SnapshotError, match="cannot be read"):
        store.load("fm", "v1", verify=False)
    path.unlink()
    with pytest.raises(SnapshotError, match=f"{name}: a file of snapshot fm@v1 cannot be read"):
        store.load("fm", "v1")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": "fm"', "\x00"])
def test_a_broken_manifest_is_refused(tmp_path, text):
    publish(tmp_path, "fm", "v1", model_tensors())
    store = SnapshotStore(tmp_path)
    (store.folder("fm", "v1") / MANIFEST).write_text(text)
    with pytest.raises(SnapshotError, match="unreadable manifest"):
        store.load("fm", "v1")


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path):
    publish(tmp_path, "fm", "v1", {"w": torch.ones(2)})
    store = SnapshotStore(tmp_path)
    path = store.folder("fm", "v1") / MANIFEST
    manifest = json.loads(path.read_text())
    (name,) = manifest["files"]
    path.write_text(json.dumps(manifest).replace(name, "../../secret.safetensors"))
    with pytest.raises(SnapshotError, match=r"\.\./\.\./secret"):
        store.load("fm", "v1")
    path.write_text(json.dumps(manifest).replace('"version": "v1"', '"version": "v2"'))
    with pytest.raises(SnapshotError, match="manifest of fm@v2"):
        store.manifest("fm", "v1")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../fm", "/etc", "a\\b", "a\n", ".hidden", "x" * 200])
def test_names_cannot_leave_their_folder(tmp_path, name):
    store = SnapshotStore(tmp_path)
    with pytest.raises(SnapshotError, match="use letters"):
        SnapshotWriter(tmp_path, name, "v1")
    with pytest.raises(SnapshotError, match="use letters"):
        store.load("fm", name)
    with pytest.raises(SnapshotError, match="use letters"):
        store.versions(name)


def test_an_unwritable_folder_is_said_plainly(tmp_path):
    (tmp_path / "snapshots").write_text("a file where the folder should be")
    with pytest.raises(SnapshotError, match="cannot write"):
        publish(tmp_path, "fm", "v1", {"w": torch.ones(1)})


@pytest.fixture
def collector(tmp_path, metadata) -> Collector:
    for day in range(1, 6):
        publish(tmp_path, "fm", f"2022-05-0{day}-aa", {"w": torch.ones(1)})
    return Collector(SnapshotStore(tmp_path), metadata, keep=2)


def test_collection_keeps_the_newest_the_held_and_the_pinned(collector):
    lease = collector.hold("fm", "2022-05-01-aa", "label job", 60.0)
    collector.pin("fm", "2022-05-02-aa", "baseline")
    assert collector.expire("fm") == ["2022-05-03-aa"]
    assert collector.store.versions("fm")[2] == "2022-05-03-aa", "expiring deletes no file"
    assert collector.sweep("fm") == ["2022-05-03-aa"]
    assert [version[8:10] for version in collector.store.versions("fm")] == ["01", "02", "04", "05"]
    collector.metadata.release(lease)
    collector.unpin("fm", "2022-05-02-aa")
    assert collector.expire("fm") == ["2022-05-01-aa", "2022-05-02-aa"]
    collector.sweep("fm")
    assert [version[8:10] for version in collector.store.versions("fm")] == ["04", "05"]
    assert collector.tombstones("fm") == []
    assert collector.expire("fm") == []


def test_a_tombstone_lets_no_new_lease_pass_and_waits_for_old_ones(collector):
    version = "2022-05-01-aa"
    assert version in collector.expire("fm")
    # A reader that took its lease before the tombstone was visible to it, as the race allows.
    early = collector.metadata.acquire(f"snapshots/holds/fm/{version}/early", "early", 60.0)
    with pytest.raises(SnapshotError, match="being deleted"):
        collector.hold("fm", version, "late", 60.0)
    assert [lease.owner for lease in collector.holders("fm", version)] == ["early"], "the late lease is given back"
    with pytest.raises(SnapshotError, match="being deleted"):
        collector.pin("fm", version, "late")
    assert version not in collector.sweep("fm")
    collector.store.verify("fm", version)
    collector.metadata.release(early)
    assert collector.sweep("fm") == [version]
    with pytest.raises(SnapshotError, match="not published"):
        collector.hold("fm", version, "later", 60.0)


def test_an_expired_hold_protects_no_more(collector):
    collector.hold("fm", "2022-05-01-aa", "dead", 0.1)
    time.sleep(0.2)
    assert "2022-05-01-aa" in collector.expire("fm")


def test_a_sweep_killed_half_way_is_taken_up(collector):
    collector.expire("fm")
    (collector.store.folder("fm", "2022-05-01-aa") / MANIFEST).unlink()
    assert "2022-05-01-aa" in collector.sweep("fm")
    assert not collector.store.folder("fm", "2022-05-01-aa").exists()


def test_unfinished_publications_are_swept_once_old(collector):
    writer = SnapshotWriter(collector.store.root, "fm", "2022-06-01-aa")
    writer.write(0, [TensorSlice.whole("w", torch.ones(1))])
    assert collector.sweep_unfinished("fm") == []
    assert collector.sweep_unfinished("fm", older_than_s=-1.0) == ["2022-06-01-aa"]
    assert len(collector.store.versions("fm")) == 5


def pause_before_deleting(collector, monkeypatch) -> tuple[threading.Thread, threading.Event, list[object]]:
    """A sweep that has made its checks and deletes nothing before it is let go; and what it says in the end."""
    slow = Collector(collector.store, collector.metadata, keep=2)
    checked, go_on, said = threading.Event(), threading.Event(), []
    current = slow._current

    def pause(model):
        found = current(model)
        checked.set()
        assert go_on.wait(60)
        return found

    monkeypatch.setattr(slow, "_current", pause)

    def sweep() -> None:
        try:
            said.append(slow.sweep("fm"))
        except SnapshotError as error:
            said.append(error)

    thread = threading.Thread(target=sweep)
    thread.start()
    assert checked.wait(60)
    return thread, go_on, said


def test_of_two_sweeps_at_once_one_deletes(collector, monkeypatch):
    expired = collector.expire("fm")
    thread, go_on, said = pause_before_deleting(collector, monkeypatch)
    assert collector.sweep("fm") == []
    assert collector.sweep_unfinished("fm", older_than_s=-1.0) == []
    assert len(collector.store.versions("fm")) == 5
    go_on.set()
    thread.join(60)
    assert said == [expired]
    assert len(collector.store.versions("fm")) == 2
    assert collector.metadata.leases("snapshots/sweeping/") == []


def test_a_sweep_that_was_paused_too_long_deletes_nothing_that_is_published_anew(collector, monkeypatch):
    expired = collector.expire("fm")
    thread, go_on, said = pause_before_deleting(collector, monkeypatch)
    (lease,) = collector.metadata.leases("snapshots/sweeping/")
    collector.metadata.release(lease)  # as when it has ended
    assert collector.sweep("fm") == expired
    publish(collector.store.root, "fm", expired[0], {"w": torch.ones(1)})
    go_on.set()
    thread.join(60)
    assert isinstance(said[0], LeaseLost)
    collector.store.verify("fm", expired[0])


def test_files_that_go_while_they_are_deleted_are_no_failure(collector, monkeypatch):
    """By an older build, which takes no lease."""
    expired = collector.expire("fm")
    unlink = os.unlink

    def both(path, *arguments, **options):
        unlink(path, *arguments, **options)
        if str(path).endswith(".safetensors"):
            raise FileNotFoundError(path)

    monkeypatch.setattr(os, "unlink", both)
    assert collector.sweep("fm") == expired
    assert not any(collector.store.folder("fm", version).exists() for version in expired)


def test_a_publication_whose_files_move_is_not_unfinished(collector, monkeypatch):
    writer = SnapshotWriter(collector.store.root, "fm", "2022-06-01-aa")
    file = writer.write(0, [TensorSlice.whole("w", torch.ones(1))])
    (writer.folder / ".rank-00001.tmp").write_bytes(b"half")
    listed = Path.iterdir

    def rename_meanwhile(path):
        found = list(listed(path))
        if path == writer.folder:
            (path / ".rank-00001.tmp").rename(path / "rank-00001.safetensors")
        return iter(found)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", rename_meanwhile)
        assert collector.sweep_unfinished("fm", older_than_s=-1.0) == []
    assert writer.commit([file]).version == "2022-06-01-aa"


def test_keeping_nothing_is_refused(collector):
    with pytest.raises(SnapshotError, match="keep=0"):
        Collector(collector.store, collector.metadata, keep=0)


def test_metadata_and_labels_do_not_wait_for_torch():
    code = "import sys, rayfm.labels, rayfm.snapshots.metadata; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
