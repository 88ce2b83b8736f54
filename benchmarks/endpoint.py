"""The student endpoint over HTTP against the exported module: ``python -m benchmarks.endpoint STORE dlrm|dcnv2
[haproxy]``.

Ours is one replica behind Ray Serve's proxy, or behind HAProxy as with ``rayfm serve --production``, asked over Arrow
IPC by a few clients that keep it busy: 1,000 candidates of one user, the user's half of the features sent once.
Theirs is the exported module called in this process, in one thread, on requests that are encoded batches in memory
already. Before the last line, for people: the endpoint against the whole call in this process (decode, encode, score,
reply), and its latencies at half and at nine tenths of the rate that keeps it busy, with requests that come at random
times and do not wait for one another.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch

from benchmarks.data import DENSE, SHORT, SPARSE
from benchmarks.labelling import VERSION, publish
from benchmarks.measure import Outcome, in_turns, rates, report, timed
from rayfm.client.wire import ARROW, write_stream, write_streams
from rayfm.data.batch import Batch
from rayfm.data.store import ExampleStore
from rayfm.export.config import CompileConfig
from rayfm.serving.broadcast import encode_candidates
from rayfm.serving.endpoints import EndpointsPlan, start_endpoints, stop_endpoints
from rayfm.serving.exported import load_exported
from rayfm.serving.http.codecs import Payload
from rayfm.serving.http.config import EndpointsConfig, LimitsConfig
from rayfm.serving.production import enable_production
from rayfm.serving.student import score_candidates
from rayfm.serving.teacher import LoadedVersion
from rayfm.snapshots.load import SnapshotStore

CANDIDATES, HELD = 1_000, 16
REQUESTS = 200
"""Of one timed piece of work."""
CLIENTS = 4
LATENCY_S = 15.0
"""How long each rate is held."""
USER = [f"i{i}" for i in range(DENSE)] + [f"c{i}" for i in range(SPARSE // 2)]
ITEM = [f"c{i}" for i in range(SPARSE // 2, SPARSE)]


def requests(store: ExampleStore) -> list[bytes]:
    """HELD requests of real rows: one row is the user, 1,000 rows are the candidates."""
    table = store.open_lane(SHORT, "impression", 0).read(columns=["traffic", *USER, *ITEM])
    bodies = []
    for number in range(HELD):
        rows = table.slice(number * CANDIDATES, CANDIDATES)
        bodies.append(write_streams([rows.slice(0, 1).select(["traffic", *USER]), rows.select(ITEM)]))
    return bodies


def payload(body: bytes) -> Payload:
    """A request as the endpoint gets it."""
    return Payload(body, ARROW, LimitsConfig())


def encoded(loaded: LoadedVersion, body: bytes) -> Batch:
    """A request as the module gets it."""
    user, candidates = payload(body).student()
    chunk = encode_candidates(loaded.encoder, user, candidates, LimitsConfig().max_list_values)
    return loaded.encoder.batch(chunk, 0, CANDIDATES)


class Endpoint:
    """Clients of the running endpoint: of the standard library's, which cost least, since they share its cores."""

    def __init__(self, port: int, name: str, bodies: list[bytes]) -> None:
        self._port, self._path, self._bodies = port, f"/v1/models/{name}:score", bodies
        self._clients = threading.local()
        self._pool = ThreadPoolExecutor(32)

    def ask(self, body: bytes) -> None:
        """One request; its reply is read whole."""
        client = getattr(self._clients, "one", None)
        if client is None:
            client = self._clients.one = HTTPConnection("127.0.0.1", self._port, timeout=30.0)
        client.request("POST", self._path, body, {"content-type": ARROW, "accept": ARROW})
        response = client.getresponse()
        reply = response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {reply[:200]!r}")
        if pa.ipc.open_stream(reply).read_all().num_rows != CANDIDATES:
            raise RuntimeError("a reply lacks candidates")

    def busy(self) -> float:
        """REQUESTS requests by CLIENTS clients; returns candidates."""

        def one(number: int) -> None:
            for body in islice(cycle(self._bodies[number:] + self._bodies[:number]), REQUESTS // CLIENTS):
                self.ask(body)

        list(self._pool.map(one, range(CLIENTS)))
        return float(REQUESTS // CLIENTS * CLIENTS * CANDIDATES)

    def latencies(self, rate: float, seed: int = 1) -> np.ndarray:
        """Seconds from when a request was due to its reply, at ``rate`` requests a second that come at random."""
        draw = random.Random(seed)
        start, due, waiting = time.perf_counter(), 0.0, []

        def one(at: float, body: bytes) -> float:
            self.ask(body)
            return time.perf_counter() - at

        while due < LATENCY_S:
            due += draw.expovariate(rate)
            time.sleep(max(0.0, start + due - time.perf_counter()))
            waiting.append(self._pool.submit(one, start + due, self._bodies[len(waiting) % HELD]))
        return np.array([reply.result() for reply in waiting])


def compare(store: ExampleStore, name: str, folder: Path) -> Outcome:
    """Candidates a second of both, in turns."""
    publish(folder, name)
    config = CompileConfig.model_validate({"compile": "torchscript"})
    loaded = load_exported(SnapshotStore(folder), name, VERSION, config)
    bodies = requests(store)
    batches = [encoded(loaded, body) for body in bodies]
    port = _free_port()
    plan = EndpointsPlan(
        run="bench",
        root=str(folder),
        students=(name,),
        teachers=(),
        endpoints=EndpointsConfig(http_port=port, compile=config, poll_s=60.0),
    )

    def module() -> float:
        with torch.inference_mode():
            for batch in islice(cycle(batches), REQUESTS):
                loaded.model(batch)
        return float(REQUESTS * CANDIDATES)

    def whole() -> float:
        for body in islice(cycle(bodies), REQUESTS):
            scored = score_candidates(loaded, payload(body))
            write_stream(scored.predictions, scored.version)
        return float(REQUESTS * CANDIDATES)

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        start_endpoints(plan, None)
        endpoint = Endpoint(port, name, bodies)
        call = rates(in_turns(lambda: timed(endpoint.busy), lambda: timed(whole), repeats=3), "candidates")
        print(f"against the whole call in process: {call.ours}, {call.theirs}, ratio {call.ratio:.2f}")
        outcome = rates(
            in_turns(lambda: timed(endpoint.busy, children=True), lambda: timed(module), repeats=5), "candidates"
        )
        most = float(outcome.ours.split()[0].replace(",", "")) / CANDIDATES
        for share in (0.5, 0.9):
            seconds = endpoint.latencies(share * most)
            p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
            print(f"{share:.0%} of {most:.0f} requests/s: p50 {p50:.1f} ms, p99 {p99:.1f} ms of {len(seconds)}")
        stop_endpoints(plan)
    finally:
        from ray import serve

        serve.shutdown()
        ray.shutdown()
    return outcome


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "haproxy" in sys.argv[3:]:
        enable_production()
    with tempfile.TemporaryDirectory() as place:
        report(compare(ExampleStore(Path(sys.argv[1])), sys.argv[2], Path(place)))
