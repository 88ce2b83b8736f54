"""Ray Serve's door: one to a cluster, which whoever starts Serve first opens, and which nobody moves later.

``serve.start`` says nothing where Serve runs already, and then listens as it did, perhaps on every interface. So what
is asked for is compared with what runs, before anything gets a route there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
from collections.abc import Iterable, Iterator
from typing import Any

from rayfm.config import CapacityError

log = logging.getLogger(__name__)

QUIET = {"log_level": "ERROR", "enable_access_log": False}
"""What Serve and its deployments log."""

PORT_OPTION = "--set serving.http_port=PORT"

STOP = "stop Ray Serve there first (`serve shutdown`, which ends all that it serves)"


def check_port(host: str, port: int, option: str = PORT_OPTION) -> None:
    """Raises CapacityError where a port cannot be bound; ``option`` chooses another."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CapacityError(
                f"port {port} on {host} cannot be used ({error.strerror}); stop what listens there or choose another "
                f"with {option}"
            ) from None


@dataclasses.dataclass(frozen=True)
class Door:
    """Where Ray Serve takes requests, or is to.

    Attributes:
        host, port: of HTTP.
        location: of its proxies: ``Disabled``, ``HeadOnly`` or ``EveryNode``.
        grpc_port: on every interface; None without gRPC.
        servicers: import paths of the gRPC services.
        reflection: whether gRPC tells anybody what can be called.
    """

    host: str
    port: int
    location: str = "HeadOnly"
    grpc_port: int | None = None
    servicers: tuple[str, ...] = ()
    reflection: bool = False

    def __str__(self) -> str:
        address = f"[{self.host}]" if ":" in self.host else self.host
        http = "nowhere" if self.location == "Disabled" else f"on {address}:{self.port} ({self.location})"
        reflection = " with reflection" if self.reflection else ""
        return http if self.grpc_port is None else f"{http}, and with gRPC{reflection} on port {self.grpc_port}"


def differences(asked: Door, runs: Door) -> list[str]:
    """Why what runs cannot stand for what was asked; empty where it can.

    Proxies on every node do for one on the head: the address is the same. gRPC that was not asked for does no harm, as
    an application answers only what it has a method for.
    """
    if runs.location == "Disabled":
        return ["it takes no HTTP requests at all"]
    found = []
    if runs.host != asked.host:
        found.append(f"its host is {runs.host}, not {asked.host}")
    if runs.port != asked.port:
        found.append(f"its port is {runs.port}, not {asked.port}")
    if asked.location == "EveryNode" != runs.location:
        found.append("its proxy is on the head node alone")
    if asked.grpc_port is not None:
        if runs.grpc_port != asked.grpc_port:
            has = "it has no gRPC" if runs.grpc_port is None else f"its gRPC port is {runs.grpc_port}"
            found.append(f"{has}, not {asked.grpc_port}")
        elif not set(asked.servicers) <= set(runs.servicers):
            found.append("its gRPC does not know rayfm's service")
        elif runs.reflection and not asked.reflection:
            found.append("its gRPC reflection tells anybody what can be called")
    return found


def running_door() -> Door | None:
    """Where the cluster's Ray Serve takes requests; None where it does not run."""
    import ray
    from ray.serve.context import _get_global_client  # Serve's public status has neither host nor port

    client: Any = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    controller = client._controller
    http, location, grpc = ray.get(
        [
            controller.get_http_config.remote(),
            controller.get_proxy_location.remote(),
            controller.get_grpc_config.remote(),
        ]
    )
    servicers = tuple(grpc.grpc_servicer_functions)
    return Door(
        host=str(http.host),
        port=int(http.port),
        location="Disabled" if http.host is None else str(location.value),
        grpc_port=int(grpc.port) if servicers and grpc.port > 0 else None,
        servicers=servicers,
        reflection=bool(grpc.enable_reflection),
    )


def open_door(asked: Door | None, option: str = PORT_OPTION) -> None:
    """Start Ray Serve where it does not run yet, and make sure that it takes requests where it is to, and only there.

    Args:
        asked: None: nothing that is to be deployed has a route, so that any door will do.
        option: of the command, with which to choose another port.

    Raises:
        CapacityError: a port is in use, or Serve runs already and takes requests elsewhere or nowhere. Nothing was
            deployed.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if asked is None:
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        return
    if running_door() is None:
        check_port(asked.host, asked.port, option)
        if asked.grpc_port is not None:
            check_port("0.0.0.0", asked.grpc_port, "--set endpoints.grpc_port=PORT")
    serve.start(
        proxy_location=asked.location,
        http_options={"host": asked.host, "port": asked.port},
        grpc_options=None
        if asked.grpc_port is None
        else {
            "port": asked.grpc_port,
            "grpc_servicer_functions": list(asked.servicers),
            "enable_reflection": asked.reflection,
        },
        logging_config=QUIET,
    )
    # Also where this call started it: somebody else may have been first since.
    runs = running_door()
    if runs is None:
        raise CapacityError("Ray Serve ended while it was started; see Ray's log (ray logs), then start again")
    wrong = differences(asked, runs)
    if wrong:
        raise CapacityError(
            f"Ray Serve runs already on this cluster and listens {runs}; {asked} was asked for, and it cannot be "
            f"changed while it runs: {'; '.join(wrong)}. Nothing was deployed: ask for what runs, use another "
            f"cluster, or {STOP}"
        )


def applications() -> set[str]:
    """Names of the applications on the cluster's Ray Serve, without those that are being removed."""
    from ray import serve

    return {name for name, found in serve.status().applications.items() if found.status != "DELETING"}


def check_free(name: str, what: str) -> None:
    """Refuse to deploy over an application that runs: it would be replaced, and removed with its successor.

    Raises:
        CapacityError: there is one.
    """
    if name in applications():
        raise CapacityError(
            f"{what} runs already on this cluster, as the Serve application {name}; stop it first, or, where its "
            f"command is gone, remove it with ray.serve.delete({name!r})"
        )


@contextlib.contextmanager
def all_or_nothing(names: Iterable[str]) -> Iterator[None]:
    """Where what is started within fails, those of the applications that did not run before are removed again."""
    from ray import serve

    before = applications()
    try:
        yield
    except BaseException:
        for name in names:
            try:
                if name not in before and name in applications():
                    serve.delete(name)
            except Exception as error:  # the reason that the start failed is what counts, also where Serve is gone
                log.error("%s could not be removed again: %s", name, error)
        raise
