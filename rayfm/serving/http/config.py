"""The endpoints' part of a pipeline's config."""

from __future__ import annotations

from pydantic import Field, field_validator

from rayfm.config import Config
from rayfm.export.config import CompileConfig
from rayfm.serving.nearline.config import NearLineOptions
from rayfm.serving.replicas import Scale
from rayfm.serving.retrieval_config import RetrievalConfig
from rayfm.snapshots.metadata import check_metadata_url

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


class LimitsConfig(Config):
    """What a request may ask for."""

    max_body_mb: float = Field(16.0, gt=0, le=1024)
    """Size of a request's body, in MiB; beyond it the answer is 413."""
    max_candidates: int = Field(10_000, ge=1)
    """Candidates of one request to a student."""
    max_rows: int = Field(65_536, ge=1)
    """Rows of one request to a teacher."""
    max_list_values: int = Field(4_000_000, ge=1)
    """Values of one list feature in a request, after the user's lists were given to every candidate."""
    max_id_bytes: int = Field(1024, ge=1)
    """Length of an id that is text."""
    max_queue: int = Field(32, ge=1)
    """Requests that a replica holds at once, waiting or running; beyond it the answer is 429 with Retry-After."""
    timeout_s: float = Field(10.0, gt=0)
    """Seconds in which a request is answered, or refused with 504. A request may ask for less."""

    @property
    def max_body_bytes(self) -> int:
        """The body's limit in bytes."""
        return int(self.max_body_mb * 2**20)


class EndpointsConfig(Scale):
    """What `rayfm serve` starts."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs a token."""
    http_port: int = Field(8000, ge=1, le=65535)
    grpc_port: int | None = Field(None, ge=1, le=65535)
    """Also answer over gRPC on this port. Ray Serve opens it on every interface, so it needs a token."""
    token_file: str | None = None
    """File that holds the bearer token, alone. Readable by its owner only."""
    token_env: str = "RAYFM_TOKEN"
    """Environment variable that holds the bearer token, read where there is no `token_file`."""
    students: tuple[str, ...] | None = None
    """Keys of the students to serve (``<student>.<variant>.<seed>``), as soon as they are published. By default all of
    the run that are published at the start."""
    teachers: tuple[str, ...] | None = None
    """Names of the teachers to serve, as with students."""
    cpus: float = Field(0.5, gt=0)
    """CPUs that each replica reserves; each scores students itself."""
    threads: int = Field(1, ge=1)
    """Torch's threads in each of them."""
    max_loaded: int = Field(8, ge=1)
    """Students that a process keeps in memory; the one used longest ago leaves."""
    poll_s: float = Field(2.0, gt=0)
    """Seconds between looks for a newer version."""
    metadata: str | None = None
    """Metadata store, as a URL (``sqlite:///PATH``, ``zookeeper://HOST:PORT/ROOT``, ``zookeeper+tls://`` over TLS):
    teachers and students follow the version that is `current` there, with leases, pins and rollbacks. By default the
    run's own."""
    compile: CompileConfig = CompileConfig()
    """In what form students are served."""
    near_line: NearLineOptions | None = None
    """Also take rows that the teachers label as they are posted (docs/nearline.md); needs a Redis."""
    retrieval: dict[str, RetrievalConfig] = {}
    """Key of a two-tower -> which items it retrieves: it answers ``:retrieve`` too."""
    limits: LimitsConfig = LimitsConfig()

    @field_validator("metadata")
    @classmethod
    def _metadata(cls, url: str | None) -> str | None:
        return None if url is None else check_metadata_url(url)

    @property
    def loopback(self) -> bool:
        """Whether the host is this machine alone."""
        return self.host in LOOPBACK_HOSTS
