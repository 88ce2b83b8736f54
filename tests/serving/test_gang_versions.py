"""The versions of a gang, with members that are threads: swapped whole, kept to a request's end, dropped together."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from example_store import every_feature_rows
from pydantic import ValidationError
from served_models import publish_model

from rayfm.config import CapacityError, ConfigError, DataError, SnapshotError
from rayfm.serving import lane_task
from rayfm.serving.application import start_teacher
from rayfm.serving.endpoints import EndpointsPlan, ServedTeacher, TeacherPlan, check_room, start_endpoints
from rayfm.serving.gang import service as service_module
from rayfm.serving.gang.errors import GangBroken, MemberLost
from rayfm.serving.gang.service import GangTeacherService
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.http.problems import Problem
from rayfm.serving.nearline.labeller import is_lasting
from rayfm.serving.replicas import Replicas
from rayfm.serving.teacher import Answer, TeacherServiceConfig
from rayfm.snapshots import Collector, SnapshotStore, load_failures, open_metadata, read_current, refusals

MODEL = "fm.teacher.0"
WORLD = 2
ROWS = every_feature_rows(31, seed=3)


class Member:
    """Answers with the number in its version's name."""

    def __init__(self) -> None:
        self.versions: dict[int, str] = {}
        self.broken: dict[str, Exception] = {}
        """What a method, or the load of a version, raises."""
        self.pause: Callable[[], None] | None = None
        self.rows = 0

    def load(self, number: int, version: str) -> None:
        if version in self.broken:
            raise self.broken[version]
        self.versions[number] = version

    def warm(self, number: int) -> None:
        self._fail("warm")
        assert number in self.versions

    def drop(self, number: int) -> None:
        self.versions.pop(number, None)

    def alive(self) -> bool:
        self._fail("alive")
        return True

    def encode(self, table: pa.Table, number: int) -> None:
        self._fail("encode")
        assert number in self.versions
        self.rows = table.num_rows

    def score(self, number: int, steps: int, rows_at_once: int, representation: bool) -> pa.Table:
        self._fail("score")
        if self.pause is not None:
            self.pause()
        return pa.table({"click": [float(self.versions[number][1:])] * self.rows})

    def _fail(self, method: str) -> None:
        if method in self.broken:
            raise self.broken[method]


class ThreadMembers:
    """Members with a thread for the forwards and one beside, as the actors have."""

    def __init__(self) -> None:
        self.members = [Member() for _ in range(WORLD)]
        self.pools = [{beside: ThreadPoolExecutor(1) for beside in (False, True)} for _ in self.members]

    def ask(self, method: str, arguments: Any) -> list[Future[Any]]:
        beside = method not in ("encode", "score")
        return [
            pools[beside].submit(getattr(member, method), *own)
            for member, pools, own in zip(self.members, self.pools, arguments, strict=True)
        ]

    def held(self) -> list[list[str]]:
        """Versions in each member's memory."""
        return [sorted(member.versions.values()) for member in self.members]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    publish_model(tmp_path, MODEL, "v1", 1)
    return tmp_path


@pytest.fixture
def members() -> ThreadMembers:
    return ThreadMembers()


@pytest.fixture
def url(root) -> str:
    return f"sqlite://{root}/metadata.sqlite"


@pytest.fixture
def ended(monkeypatch) -> list[bool]:
    """Whether the replica was to end itself."""
    ended: list[bool] = []
    monkeypatch.setattr(service_module, "_end_soon", lambda: ended.append(True))
    return ended


@pytest.fixture
def make(root, members, ended):
    made = []

    def start(**changes: Any) -> GangTeacherService:
        config = {"root": str(root), "model": MODEL, "members": WORLD, "predict_rows": 8, **changes}
        made.append(GangTeacherService(config, members))
        return made[-1]

    yield start
    for service in made:
        service.close()


@pytest.fixture
def following(make, url) -> GangTeacherService:
    return make(metadata=url, poll_s=0.02)


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def clicks(found: pa.Table) -> set[float]:
    return set(found["click"].to_pylist())


def test_all_members_swap_between_requests_that_run_side_by_side(root, url, members, following):
    async def ask(seen: list[tuple[str, pa.Table]], stop: threading.Event) -> None:
        while not stop.is_set():
            seen.append(await following.score(ROWS))

    async def main() -> list[tuple[str, pa.Table]]:
        seen: list[tuple[str, pa.Table]] = []
        stop = threading.Event()
        asking = [asyncio.ensure_future(ask(seen, stop)) for _ in range(4)]
        for number in (2, 3, 4):
            await asyncio.to_thread(publish_model, root, MODEL, f"v{number}", number)
            await asyncio.to_thread(until, lambda n=number: seen and seen[-1][0] == f"v{n}")
        stop.set()
        await asyncio.gather(*asking)
        return seen

    seen = asyncio.run(main())
    assert {version for version, _ in seen} >= {"v2", "v3", "v4"}
    for version, found in seen:
        assert found.num_rows == len(ROWS)
        assert clicks(found) == {float(version[1:])}, "no mixture"
    until(lambda: members.held() == [["v3", "v4"]] * WORLD)
    (lease,) = Collector(SnapshotStore(root), open_metadata(url)).holders(MODEL, "v4")
    assert lease.owner.startswith(f"gang of 2, {MODEL} on ")
    assert asyncio.run(following.score(ROWS, "v3"))[0] == "v3"
    assert asyncio.run(following.current_version()) == "v4"
    assert asyncio.run(following.score_request(ROWS)).version == "v4"


@pytest.mark.parametrize("what", ["v2", "warm"])
def test_a_member_that_cannot_load_leaves_the_gang_with_what_it_has(
    root, url, members, following, ended, monkeypatch, what
):
    monkeypatch.setattr("rayfm.snapshots.loader.MAX_PAUSE_S", 0.02)
    members.members[1].broken[what] = MemoryError("no memory")
    publish_model(root, MODEL, "v2", 2)
    metadata = open_metadata(url)
    until(lambda: refusals(metadata, MODEL))
    assert "1 of 2 members; member 1: MemoryError: no memory" in refusals(metadata, MODEL)["v2"].reason
    assert list(load_failures(metadata, MODEL)) == ["v2"]
    until(lambda: read_current(metadata, MODEL).version == "v1")
    version, found = asyncio.run(following.score(ROWS))
    assert (version, clicks(found)) == ("v1", {1.0})
    until(lambda: members.held() == [["v1"]] * WORLD)
    members.members[1].broken.clear()
    publish_model(root, MODEL, "v3", 3)
    until(lambda: asyncio.run(following.current_version()) == "v3")
    assert not ended


def test_a_request_under_way_keeps_its_version_in_all_members(root, members, following):
    publish_model(root, MODEL, "v2", 2)
    until(lambda: following._follower.loader.version == "v2")
    publish_model(root, MODEL, "v3", 3)
    entered, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        entered.set()
        assert go_on.wait(60)

    members.members[0].pause = pause

    def v2_is_the_spare_one() -> bool:
        # Asked for until it is: the swap to v3 may let go of it, used longest ago, while this asks for it.
        following._versions.get("v2")
        return "v1" not in following._follower.loader.versions()

    async def main() -> tuple[str, pa.Table]:
        asked = asyncio.ensure_future(following.score(ROWS, "v1"))
        await asyncio.to_thread(entered.wait, 60)
        await asyncio.to_thread(until, lambda: following._follower.loader.version == "v3")
        await asyncio.to_thread(until, v2_is_the_spare_one)
        assert all("v1" in held for held in members.held())
        members.members[0].pause = None
        go_on.set()
        return await asked

    version, found = asyncio.run(main())
    assert (version, clicks(found)) == ("v1", {1.0})
    until(lambda: all("v1" not in held for held in members.held()))


def test_a_caller_who_leaves_takes_no_version_from_members_at_work(members, make):
    service = make()
    entered, go_on = threading.Event(), threading.Event()
    members.members[0].pause = lambda: (entered.set(), go_on.wait(60))[0]

    async def main() -> None:
        asked = asyncio.ensure_future(service.score(ROWS, "v1"))
        await asyncio.to_thread(entered.wait, 60)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        loaded = service._named.get("v1")
        loaded.retire()
        assert members.held() == [["v1"]] * WORLD
        go_on.set()
        await asyncio.to_thread(until, lambda: members.held() == [[]] * WORLD)

    asyncio.run(main())


def test_a_gang_that_follows_nothing_keeps_the_versions_that_are_named(root, members, make):
    for number in (2, 3):
        publish_model(root, MODEL, f"v{number}", number)
    service = make()
    assert asyncio.run(service.current_version()) is None
    with pytest.raises(ValueError, match="name one"):
        asyncio.run(service.score(ROWS))

    async def main() -> None:
        for version in ("v1", "v2", "v1", "v3"):
            assert (await service.score(ROWS, version))[0] == version
        assert service.gang.world == WORLD
        await asyncio.to_thread(until, lambda: members.held() == [["v1", "v3"]] * WORLD)
        await service.reconfigure({"version": "v2"})
        for version in ("v1", "v3"):
            assert (await service.score(ROWS, version))[0] == version
        assert (await service.score(ROWS))[0] == "v2"
        await asyncio.to_thread(until, lambda: members.held() == [["v2", "v3"]] * WORLD)
        with pytest.raises(SnapshotError, match="not published"):
            await service.reconfigure({"version": "v9"})
        assert (await service.score(ROWS))[0] == "v2"

    asyncio.run(main())


def test_what_a_row_is_wrong_in_leaves_the_members_in_step(members, make, ended):
    service = make()
    members.members[1].broken["encode"] = DataError("row 3: no such id")

    async def main() -> None:
        with pytest.raises(DataError, match="row 3"):
            await service.score(ROWS, "v1")
        members.members[1].broken.clear()
        assert (await service.score(ROWS, "v1"))[0] == "v1"
        await service.check_health()

    asyncio.run(main())
    assert not ended


@pytest.mark.parametrize(
    ("method", "error"),
    [("score", MemberLost("gone")), ("score", RuntimeError("connection closed")), ("encode", MemberLost("gone"))],
)
def test_a_member_that_is_lost_breaks_the_gang(members, make, ended, method, error):
    service = make()

    async def main() -> None:
        await service.score(ROWS, "v1")
        members.members[0].broken[method] = error
        with pytest.raises(GangBroken, match="ask again"):
            await service.score(ROWS, "v1")
        members.members[0].broken.clear()
        for call in (service.score(ROWS, "v1"), service.check_health()):
            with pytest.raises(GangBroken):
                await call

    asyncio.run(main())
    assert ended == [True]


def test_a_member_that_is_lost_in_a_load_breaks_the_gang(root, url, members, following, ended):
    members.members[1].broken["v2"] = MemberLost("killed")
    publish_model(root, MODEL, "v2", 2)
    until(lambda: ended)
    assert "member 1 was lost while it loaded v2" in following.gang.broken
    with pytest.raises(GangBroken):
        asyncio.run(following.score(ROWS))


def test_a_member_that_does_not_answer_is_noticed(members, make, ended):
    service = make()
    members.members[1].broken["alive"] = MemberLost("gone")
    with pytest.raises(GangBroken, match="does not answer"):
        asyncio.run(service.check_health())
    assert ended == [True]


def test_a_gang_without_a_version_says_so(tmp_path, members, ended):
    config = {"root": str(tmp_path), "model": MODEL, "members": 2, "metadata": f"sqlite://{tmp_path}/m.db"}
    service = GangTeacherService({**config, "poll_s": 0.02}, members)
    assert asyncio.run(service.current_version()) is None
    with pytest.raises(SnapshotError, match="no version that can be served yet"):
        asyncio.run(service.score(ROWS))
    publish_model(tmp_path, MODEL, "v1", 1)
    until(lambda: asyncio.run(service.current_version()) == "v1")
    service.close()


def plan(root: Path, metadata: str | None = None, **teacher: Any) -> EndpointsPlan:
    endpoints = EndpointsConfig(metadata=metadata, cpus=0.5, http_port=18999)
    teachers = (TeacherPlan(name="fm", model=MODEL, **teacher),)
    return EndpointsPlan(run="r", root=str(root), students=(), teachers=teachers, endpoints=endpoints)


@pytest.mark.parametrize(
    ("metadata", "teacher", "said"),
    [
        (None, {"members": 2}, "a gang follows `current` of a metadata store"),
        ("sqlite:///m.db", {"members": 2, "member_gpus": 0.5}, "member_gpus: 0.5; a member has a GPU of its own"),
    ],
)
def test_a_gang_that_cannot_be_is_refused_before_anything_starts(tmp_path, metadata, teacher, said):
    with pytest.raises(ConfigError, match=said):
        start_endpoints(plan(tmp_path, metadata, **teacher), None)


def test_a_gang_of_members_without_a_share_of_a_cpu_is_no_plan(tmp_path):
    with pytest.raises(ValidationError, match="member_cpus\n  Input should be greater than 0"):
        plan(tmp_path, "sqlite:///m.db", members=2, member_cpus=0)


def test_a_gang_has_no_port_of_its_own(tmp_path):
    config = TeacherServiceConfig(root=str(tmp_path), model=MODEL)
    with pytest.raises(ConfigError, match=r"http_port goes with serving\.members: 1"):
        start_teacher("r", "fm", config, Replicas(members=2), http_port=8000)


def test_what_ray_could_never_place_is_refused_with_the_arithmetic(tmp_path):
    gangs = plan(tmp_path, replicas=2, cpus=0.25, members=3, member_cpus=0.5, member_gpus=1)
    check_room(gangs, 4.0, 6.0)
    with pytest.raises(CapacityError) as error:
        check_room(gangs, 3.0, 6.0)
    assert "need 4 CPUs and Ray has 3: 0.5 endpoints (1 x 0.5) + 3.5 teacher fm (2 x (0.25 + 3 x 0.5))" in str(
        error.value
    )
    with pytest.raises(CapacityError, match="need 6 GPUs and Ray has 0"):
        check_room(gangs, 4.0)
    check_room(plan(tmp_path, replicas=2, cpus=0.25), 1.0)


def told_by_ray() -> Exception:
    """A broken gang's error as Ray hands it to callers."""
    from ray.exceptions import RayTaskError

    error: Exception = RayTaskError("score", "trace", GangBroken("gang of fm: gone; ask again")).as_instanceof_cause()
    return error


def test_jobs_ask_another_gang(monkeypatch):
    monkeypatch.setattr("rayfm.serving.lane_task.ASK_AGAIN_S", (0.0,))
    answer = ("v1", ROWS)

    class Broken:
        def result(self) -> Any:
            raise told_by_ray()

    assert lane_task._result(Broken(), lambda: Answer(answer)) == answer
    with pytest.raises(CapacityError, match="asked 2 times"):
        lane_task._result(Broken(), Broken)
    assert not is_lasting(told_by_ray()), "rows that were posted are tried again"


def test_a_broken_gang_is_unavailable_to_callers_from_outside(monkeypatch):
    class Handle:
        class score_request:
            @staticmethod
            async def remote(*_arguments: Any) -> None:
                raise told_by_ray()

    monkeypatch.setattr("rayfm.serving.endpoints.teacher_handle", lambda *_: Handle)
    with pytest.raises(Problem) as problem:
        asyncio.run(ServedTeacher("r", "fm").score(ROWS, None, False))
    assert problem.value.status == 503
    assert "Retry-After" in problem.value.headers
