"""The queue in Redis, as Ray Serve's task consumers use it (through Celery): messages that carry a ticket, no rows.

A message only says that a ticket waits. Where one is lost (Redis was killed, a consumer died between taking it and
noting so), the sweeper rings again; where one comes twice, the second finds nothing to do. So Redis needs no particular
durability: ``appendfsync everysec`` is as good as ``always``, only a little less is rung again after a crash.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Set
from typing import Any
from urllib.parse import urlsplit

from rayfm.config import CapacityError, ConfigError
from rayfm.serving.nearline.config import NearLineConfig
from rayfm.serving.nearline.spool import Spool

TASK = "rayfm.nearline.label"
_RUNG = "rayfm-rung"
"""Header of a message: when it was sent, in seconds since 1970."""

_SOCKET_S = 5.0
_VISIBILITY_S = 600
"""Redis gives a message that was taken and not acknowledged to another consumer after this long. The sweeper is
faster; this is for what it does not see."""


def check_installed() -> None:
    """Raises ConfigError where a package of the extra ``nearline`` is missing."""
    for name in ("redis", "celery", "tornado"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise ConfigError(
                f"near-line labelling needs the package {name!r}; run `pip install 'rayfm[nearline]'`"
            ) from None


def task_processor(config: NearLineConfig) -> Any:
    """Ray Serve's configuration of the queue. Raises ConfigError where the extra ``nearline`` is not installed."""
    check_installed()
    from ray.serve.schema import CeleryAdapterConfig, TaskProcessorConfig

    return TaskProcessorConfig(
        queue_name=config.queue,
        adapter_config=CeleryAdapterConfig(
            broker_url=config.broker,
            # Results are files of the spool. The adapter asks the backend after each send; this one asks nobody.
            backend_url="cache+memory://",
            task_custom_config={"ignore_result": True, "retry_backoff_max": max(1, int(config.consumer.sweep_s / 2))},
            app_custom_config={
                "worker_prefetch_multiplier": 1,
                "accept_content": ["json"],  # never pickle
                "worker_hijack_root_logger": False,
                "worker_redirect_stdouts": False,
                "broker_connection_retry_on_startup": True,
                "broker_connection_max_retries": None,  # for ever: a consumer outlives its Redis
                "broker_connection_timeout": _SOCKET_S,
                # A task is safe to run twice, and one that runs is not lost with the connection.
                "worker_cancel_long_running_tasks_on_connection_loss": False,
            },
            broker_transport_options={
                "visibility_timeout": _VISIBILITY_S,
                "socket_timeout": _SOCKET_S,
                "socket_connect_timeout": _SOCKET_S,
                "socket_keepalive": True,
            },
        ),
        max_retries=config.consumer.retries,
        # No queue of failed tasks: Ray's messages there hold the arguments as text and not the rows. The spool's dead
        # letters hold the rows. What is no message of ours is kept.
        failed_task_queue_name=None,
        unprocessable_task_queue_name=f"{config.queue}-unprocessable",
    )


class Doorbell:
    """Sends and counts messages.

    Args:
        config: names the queue.

    Raises:
        ConfigError: the extra ``nearline`` is not installed.
    """

    def __init__(self, config: NearLineConfig) -> None:
        check_installed()
        import redis
        from ray.serve.task_processor import CeleryTaskProcessorAdapter

        self._config = config
        self._adapter: Any = CeleryTaskProcessorAdapter(task_processor(config))
        self._adapter.initialize()
        self._redis: Any = redis.Redis.from_url(
            config.broker, socket_timeout=_SOCKET_S, socket_connect_timeout=_SOCKET_S
        )

    def ring(self, ticket: str) -> None:
        """Send a ticket's message.

        Raises:
            CapacityError: Redis does not take it. The ticket is as safe as before: the sweeper rings later.
        """
        from celery.exceptions import CeleryError
        from kombu.exceptions import KombuError
        from redis.exceptions import RedisError

        try:
            self._adapter.enqueue_task_sync(
                TASK,
                args=[ticket],
                headers={_RUNG: time.time()},
                # Once more, for a connection that Redis's restart has closed.
                retry=True,
                retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0},
            )
        except (KombuError, CeleryError, RedisError, OSError) as error:
            raise self._down(error) from None

    def waiting(self) -> int:
        """Messages that no consumer has taken. Raises CapacityError where Redis does not answer."""
        return int(self._asked("llen"))

    def oldest(self) -> float | None:
        """When the message that is next was sent, in seconds since 1970; None where none waits.

        Messages come out in the order in which they went in: one that was sent before this one, and is not in a
        consumer's hands, is lost.

        Raises:
            CapacityError: Redis does not answer.
        """
        message = self._asked("lindex", -1)
        if message is None:
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return float(json.loads(message)["headers"][_RUNG])
        return 0.0  # not ours: nothing is known

    def close(self) -> None:
        """Let the connections go."""
        with contextlib.suppress(Exception):
            self._redis.close()
            self._adapter._app.close()

    def _asked(self, command: str, *arguments: Any) -> Any:
        from redis.exceptions import RedisError

        try:
            return getattr(self._redis, command)(self._config.queue, *arguments)
        except (RedisError, OSError) as error:
            raise self._down(error) from None

    def _down(self, error: Exception) -> CapacityError:
        parts = urlsplit(self._config.redis)  # no password in a message
        return CapacityError(
            f"Redis at {parts.hostname}:{parts.port or 6379} does not answer ({type(error).__name__}); start it"
        )


def sweep(
    spool: Spool,
    doorbell: Doorbell,
    config: NearLineConfig,
    now_s: float | None = None,
    in_hand: Set[str] = frozenset(),
) -> int:
    """Ring again for tickets whose message was lost; give up what has failed for too long; drop what expired.

    Args:
        spool, doorbell, config: the teacher's.
        now_s: seconds since 1970; by default now.
        in_hand: tickets that this process is working on; their messages are not lost, however long it takes.

    Returns:
        Tickets that were rung for.

    Raises:
        CapacityError: Redis does not answer; nothing was rung.
    """
    from rayfm.serving.nearline.tickets import ticket_time

    now = time.time() if now_s is None else now_s
    spool.sweep(now, config.rejects_ttl_s)
    oldest = doorbell.oldest()
    quiet_since = (now if oldest is None else min(now, oldest)) - config.consumer.sweep_s
    rung = 0
    for ticket, seen in spool.waiting():
        if ticket_time(ticket) < now - config.consumer.give_up_s:
            history = spool.history(ticket)
            # Only what has failed: one that merely waits behind others has not.
            if history.failures and spool.bury(
                ticket, f"{history.reason} (still, {config.consumer.give_up_s:g} s after it was accepted)"
            ):
                continue
        if seen < quiet_since and ticket not in in_hand:
            spool.touch(ticket)
            doorbell.ring(ticket)
            rung += 1
    return rung
