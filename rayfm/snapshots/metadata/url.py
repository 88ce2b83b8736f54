"""A metadata store by its URL, as configs and commands name it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rayfm.config import ConfigError
from rayfm.snapshots.metadata.base import MetadataStore
from rayfm.snapshots.metadata.sqlite import SQLiteMetadataStore

FORMS = "sqlite:///absolute/path or zookeeper://host:port,host:port/root (zookeeper+tls:// over TLS)"
_ZOOKEEPER, _TLS = "zookeeper", "zookeeper+tls"

_HOST = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")
_ROOT = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")


def check_metadata_url(url: str) -> str:
    """``url`` if it names a metadata store; looks at nothing but the text.

    Raises:
        ValueError: it does not, with what to write instead.
    """
    _parse(url)
    return url


def open_metadata(url: str) -> MetadataStore:
    """The store that ``url`` names: ``sqlite:///path`` (one machine) or ``zookeeper://host:port,.../root`` (a cluster),
    ``zookeeper+tls://`` over TLS.

    ZooKeeper is connected to by the first operation; the root is ``/rayfm`` where the URL has none. Credentials come
    from the environment: `rayfm.snapshots.metadata.access`.

    Raises:
        ConfigError: the URL is neither, kazoo is not installed, or the credentials are malformed; SnapshotError: the
            file is no such store.
    """
    try:
        scheme, hosts, path = _parse(url)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if scheme == "sqlite":
        return SQLiteMetadataStore(Path(path))
    try:
        from rayfm.snapshots.metadata.zookeeper import DEFAULT_ROOT, ZooKeeperMetadataStore
    except ImportError as error:
        if (error.name or "").split(".")[0] != "kazoo":
            raise
        raise ConfigError(f"metadata store {url!r} needs kazoo: pip install 'rayfm[cluster]'") from None
    return ZooKeeperMetadataStore(hosts, path or DEFAULT_ROOT, tls=scheme == _TLS)


def _parse(url: str) -> tuple[str, str, str]:
    """Scheme, hosts (none for SQLite) and path. Raises ValueError where there is none."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ValueError(f"metadata store {url!r}: {error}; write {FORMS}") from None
    if parts.query or parts.fragment:
        raise ValueError(f"metadata store {url!r}: no '?' or '#' here; write {FORMS}")
    if parts.scheme == "sqlite":
        if parts.netloc or parts.path in ("", "/"):
            raise ValueError(f"metadata store {url!r}: write sqlite:///absolute/path (three slashes)")
        return "sqlite", "", unquote(parts.path)
    if parts.scheme not in (_ZOOKEEPER, _TLS):
        raise ValueError(f"metadata store {url!r}: write {FORMS}")
    for host in parts.netloc.split(","):
        found = _HOST.fullmatch(host)
        if found is None or not 0 < int(found[1]) < 65_536:
            raise ValueError(f"metadata store {url!r}: {host!r} is not host:port; ZooKeeper's port is 2181 by default")
    root = parts.path.rstrip("/")
    if root and not _ROOT.fullmatch(root):
        raise ValueError(f"metadata store {url!r}: the root is a path of letters, digits, '_', '.', '-'")
    if root.split("/")[1:2] == ["zookeeper"]:
        raise ValueError(f"metadata store {url!r}: /zookeeper is ZooKeeper's own; choose another root")
    return parts.scheme, parts.netloc, root
