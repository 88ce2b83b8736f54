"""What near-line labelling of one teacher needs to know."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, urlsplit

from pydantic import Field, field_validator, model_validator

from rayfm.config import Config, RayfmError, read_yaml, validate
from rayfm.config.nodes import NodeLabels
from rayfm.labels.columns import check_part
from rayfm.serving.nearline.rows import PeriodLength
from rayfm.snapshots.manifest import check_name
from rayfm.snapshots.metadata.url import FORMS

BROKERS = ("redis", "rediss")

REDIS_PASSWORD = "RAYFM_REDIS_PASSWORD"
"""Environment variable of Redis' password, so that no config holds it."""


class PostLimitsConfig(Config):
    """What is refused at the door, so that a client's mistake costs the others nothing."""

    body_mb: float = Field(16.0, gt=0)
    """Megabytes of a post's body; more is answered with 413."""

    rows: int = Field(10_000, ge=1)
    """Rows of a post; more is answered with 413."""

    periods: int = Field(32, ge=1)
    """Periods that a post's rows may be of, each a file of its own in the label table; more is answered with 400."""

    ahead_s: float = Field(86_400.0, ge=0)
    """Seconds that a row's ``time`` may lie in the future; a row beyond is refused."""

    timeout_s: float = Field(30.0, gt=0)
    """Seconds in which a post's body must have come; then the answer is 504. A request may ask for less."""

    queued: int = Field(10_000, ge=1)
    """Tickets that may wait; beyond them a post is answered with 429."""

    queued_mb: float = Field(4096.0, gt=0)
    """Megabytes of rows on disk, those that wait and those that were refused; beyond them as well."""

    retry_after_s: int = Field(5, ge=1)
    """What a 429 tells the client to wait."""


class NearLineSupervisionConfig(Config):
    """Students take near-line labels where the teacher's bulk labels of a period say nothing."""

    table_version: int | None = Field(None, ge=0)
    """The version of the near-line label table to read; by default the newest when the period is labelled in bulk.
    Either way the period's ticket records it, and every student reads that one."""


class ConsumerConfig(Config):
    """Who labels the accepted rows, and when they are given up."""

    replicas: int = Field(1, ge=1)
    """Consumers that always run."""

    max_replicas: int = Field(1, ge=1)
    """With more than ``replicas``, consumers come and go with the length of the queue."""

    queue_per_replica: int = Field(64, ge=1)
    """Messages in the queue that ask for another consumer."""

    poll_s: float = Field(5.0, gt=0)
    """How often the queue's length is looked at, for the number of consumers."""

    cpus: float = Field(0.25, ge=0)
    nodes: NodeLabels = {}
    """Labels of the nodes that consumers run on; none named: those of ``ray.nodes.serving``."""
    tickets: int = Field(32, ge=1)
    """Tickets of a batch at most, and that a consumer holds at once."""

    rows: int = Field(8192, ge=1)
    """Rows at which a batch is full."""

    delay_s: float = Field(0.05, ge=0)
    """How long a batch waits for more tickets, after its first."""

    score_timeout_s: float = Field(120.0, gt=0)
    """How long a forward of the teacher service may take, with the time that it waits for its turn; then it is
    cancelled, and its tickets are tried again."""

    retries: int = Field(3, ge=0)
    """Tries after the first for an error that seems to last (a row that the teacher cannot take, a snapshot that is
    gone); then the rows become a dead letter."""

    crashes: int = Field(10, ge=1)
    """Processes that died with a ticket in hand, after which it is taken to kill its consumers and becomes a dead
    letter."""

    give_up_s: float = Field(86_400.0, gt=0)
    """Age at which a ticket that only fails (the teacher service is down, the disk is full) becomes a dead letter."""

    sweep_s: float = Field(60.0, gt=0)
    """Seconds without news after which a ticket's message is taken for lost and sent again."""

    stall_s: float = Field(120.0, gt=0)
    """A consumer that gets no message for so long while some wait, or works so long on a batch, reports itself dead.
    """

    health_s: float = Field(5.0, gt=0)
    """How often Ray Serve asks."""

    @model_validator(mode="after")
    def _consistent(self) -> ConsumerConfig:
        if self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is less than replicas ({self.replicas}); raise it")
        if self.stall_s <= self.score_timeout_s / 2:
            raise ValueError(
                f"stall_s ({self.stall_s:g}) is too short for a forward of score_timeout_s ({self.score_timeout_s:g}); "
                "raise it above half of that"
            )
        return self


class NearLineOptions(Config):
    """How posted rows are labelled, whatever the teacher."""

    redis: str = "redis://127.0.0.1:6379/0"
    """The queue. What is accepted does not depend on it: it may lose everything. Where the URL has no password, that of
    the environment variable ``RAYFM_REDIS_PASSWORD`` is taken, if there is one."""

    period: PeriodLength = "day"
    """How long the teacher's periods are: names the label table's partitions, and decides what a leak is."""

    ticket_ttl_s: float = Field(86_400.0, gt=0)
    """How long a committed ticket can be asked for; its labels stay."""

    rejects_ttl_s: float = Field(604_800.0, gt=0)
    """How long refused rows are kept with their reasons."""

    limits: PostLimitsConfig = PostLimitsConfig()
    consumer: ConsumerConfig = ConsumerConfig()

    @field_validator("redis")
    @classmethod
    def _broker(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in BROKERS or not parts.hostname:
            raise ValueError(f"{url!r} is no Redis; write redis://HOST:PORT/NUMBER (or rediss:// for TLS)")
        return url

    @property
    def broker(self) -> str:
        """``redis`` with the password of this process' environment, where it has none of its own."""
        parts, password = urlsplit(self.redis), os.environ.get(REDIS_PASSWORD)
        if not password or parts.password:
            return self.redis
        place = parts.netloc.rpartition("@")[2]
        return parts._replace(netloc=f"{parts.username or ''}:{quote(password, safe='')}@{place}").geturl()

    @property
    def hold_s(self) -> float:
        """How long a snapshot stays after a process that held it for accepted rows died. Its successor may have to wait
        for a machine, and a snapshot that is gone by then makes dead letters of rows that only had to wait."""
        return max(600.0, 4 * self.consumer.sweep_s)


class NearLineConfig(NearLineOptions):
    """Near-line labelling by one teacher."""

    run: str
    """Name of the run; the teacher's service is looked for under it."""

    teacher: str
    """The teacher's name in the label store and in the URL."""

    root: str
    """Folder that holds ``snapshots/``; spool and labels go to ``nearline/`` below it. All machines must see it."""

    model: str
    """The teacher's key in the snapshot store, e.g. ``fm.teacher.0``."""

    version: str | None = None
    """The snapshot that labels what is posted; by default the newest that is published when it is posted, or the one
    that is `current` then (see ``metadata``)."""

    metadata: str | None = None
    """URL of the snapshots' metadata store. With it, the version that is `current` labels (where ``version`` names
    none), and snapshots that accepted rows name are held until they are labelled."""

    @field_validator("teacher", "run", "model")
    @classmethod
    def _safe(cls, name: str) -> str:
        try:
            return check_name("name", check_part("name", name))
        except RayfmError as error:
            raise ValueError(str(error)) from None

    @field_validator("metadata")
    @classmethod
    def _metadata(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("sqlite:///", "zookeeper://", "zookeeper+tls://")):
            raise ValueError(f"metadata store {url!r}: write {FORMS}")
        return url

    @property
    def queue(self) -> str:
        """Name of the queue in Redis."""
        return f"rayfm-{self.run}-{self.teacher}-nearline"


def load_nearline(path: str | Path) -> NearLineConfig:
    """The config in a YAML file. Raises ConfigError naming the key at fault."""
    return validate(NearLineConfig, read_yaml(path), str(path))
