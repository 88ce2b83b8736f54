"""A ZooKeeper that asks who one is, and one that is talked to over TLS."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterator

import pytest
import servers
from kazoo.client import KazooClient
from kazoo.exceptions import NoAuthError

from rayfm.config import ConfigError
from rayfm.snapshots.metadata import MetadataStore, StoreUnavailable, open_metadata
from rayfm.snapshots.metadata.access import AUTH, CA, CERTIFICATE, KEY, client_options
from rayfm.snapshots.metadata.zookeeper import ZooKeeperMetadataStore

SECURE = tuple[servers.Server, str, servers.TLSFiles]


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SECURE]:
    """A real server with a plain port and one for TLS."""
    server, address, files = servers.zookeeper_tls(tmp_path_factory.mktemp("zookeeper-tls"))
    with servers.running(server):
        yield server, address, files


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (AUTH, CA, CERTIFICATE, KEY):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root() -> str:
    return f"/access-{uuid.uuid4().hex}"  # not below one that all share: what is made above it is its maker's too


def use(store: MetadataStore) -> None:
    """A write, a read, a lease."""
    revision = store.compare_and_set("a/b", b"value", None)
    entry = store.get("a/b")
    assert entry is not None
    assert (entry.value, entry.revision) == (b"value", revision)
    lease = store.acquire("job", "me", 30.0)
    assert [found.token for found in store.leases("")] == [lease.token]
    store.release(lease)
    assert [found.key for found in store.list("")] == ["a/b"]


def test_what_one_made_nobody_else_may_read(secure: SECURE, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = secure[0]
    monkeypatch.setenv(AUTH, "ads:secret:with colon")
    store = open_metadata(f"zookeeper://{server.address}{root}")
    use(store)
    use_again = pickle.loads(pickle.dumps(store))
    assert use_again.get("a/b") is not None
    assert b"secret" not in pickle.dumps(store)
    store.close(), use_again.close()

    stranger = KazooClient(server.address)
    stranger.start()
    try:
        for path in ("", "/entries", "/entries/a", "/leases", "/clients"):
            with pytest.raises(NoAuthError):
                stranger.get_children(f"{root}{path}")
    finally:
        stranger.stop(), stranger.close()

    for other in ("ads:wrong", None):
        monkeypatch.delenv(AUTH) if other is None else monkeypatch.setenv(AUTH, other)
        refused = open_metadata(f"zookeeper://{server.address}{root}")
        with pytest.raises(StoreUnavailable, match=rf"who made {root}, .* lets nobody else in; set {AUTH}"):
            refused.get("a/b")


def test_tls_with_a_certificate_on_both_sides(secure: SECURE, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, address, files = secure
    for name, path in ((CA, files.ca), (CERTIFICATE, files.certificate), (KEY, files.key)):
        monkeypatch.setenv(name, str(path))
    store = open_metadata(f"zookeeper+tls://{address}{root}")
    use(store)
    other = pickle.loads(pickle.dumps(store))
    assert other.get("a/b") is not None
    store.close(), other.close()


@pytest.mark.parametrize("why", ["no certificate", "an authority that is not ours", "another host"])
def test_tls_refuses(secure: SECURE, root: str, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    _, address, files = secure
    settings = {CA: files.ca, CERTIFICATE: files.certificate, KEY: files.key}
    if why == "no certificate":
        settings = {CA: files.ca}
    elif why == "an authority that is not ours":
        del settings[CA]
    else:
        address = address.replace("127.0.0.1", "localhost")  # the certificate names the address alone
    for name, path in settings.items():
        monkeypatch.setenv(name, str(path))
    store = ZooKeeperMetadataStore(address, root, wait_s=1.0, tls=True)
    with pytest.raises(StoreUnavailable, match=r"does not answer for 1 s .* and the certificates"):
        store.get("a/b")


def test_credentials_that_cannot_be_meant_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("ads", "ads:", ":secret"):
        monkeypatch.setenv(AUTH, wrong)
        with pytest.raises(ConfigError, match=f"{AUTH} is not of the form USER:PASSWORD") as error:
            open_metadata("zookeeper://localhost:1")
        assert "secret" not in str(error.value)
    monkeypatch.delenv(AUTH)
    there = tmp_path / "there.pem"
    there.touch()
    monkeypatch.setenv(CERTIFICATE, str(there))
    with pytest.raises(ConfigError, match=f"{CERTIFICATE} is set, but the metadata store's URL asks for no TLS"):
        open_metadata("zookeeper://localhost:1")
    with pytest.raises(ConfigError, match=f"{CERTIFICATE} and {KEY} go together"):
        client_options(tls=True)
    monkeypatch.setenv(KEY, str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match=f"{KEY}: there is no file .*none.pem"):
        open_metadata("zookeeper+tls://localhost:1")


def test_tls_is_in_the_url() -> None:
    assert repr(open_metadata("zookeeper+tls://a:1,b:2/x")) == "ZooKeeperMetadataStore('a:1,b:2', '/x', tls=True)"
    assert client_options(tls=False) == {}
