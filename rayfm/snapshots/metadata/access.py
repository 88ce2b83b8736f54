"""How a process shows ZooKeeper who it is, and how it checks whom it talks to.

From the environment: the URL of a metadata store stands in configs, and a config holds no secret.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kazoo.security import make_digest_acl

from rayfm.config import ConfigError

AUTH = "RAYFM_ZOOKEEPER_AUTH"
"""``USER:PASSWORD``: shown to the servers (ZooKeeper's scheme ``digest``); who shows another can neither read nor write
what this process makes."""
CA = "RAYFM_ZOOKEEPER_CA"
"""PEM file of the authorities that sign the servers' certificates; by default those that the machine trusts."""
CERTIFICATE, KEY = "RAYFM_ZOOKEEPER_CERTIFICATE", "RAYFM_ZOOKEEPER_KEY"
"""PEM files of this process's certificate and its key, for servers that ask for one (as they do by default)."""


def client_options(tls: bool) -> dict[str, Any]:
    """Arguments of a ``KazooClient``, beside its hosts.

    Raises:
        ConfigError: a variable is malformed, names no file, or asks for TLS where the URL does not.
    """
    options: dict[str, Any] = {}
    auth = os.environ.get(AUTH)
    if auth:
        user, _, password = auth.partition(":")
        if not user or not password:
            raise ConfigError(f"{AUTH} is not of the form USER:PASSWORD; set it so, or unset it")
        options["auth_data"] = [("digest", auth)]
        options["default_acl"] = [make_digest_acl(user, password, all=True)]
    files = {name: os.environ[name] for name in (CA, CERTIFICATE, KEY) if os.environ.get(name)}
    if not tls:
        for name in files:
            raise ConfigError(
                f"{name} is set, but the metadata store's URL asks for no TLS; write zookeeper+tls://HOST:PORT/ROOT, "
                "or unset it"
            )
        return options
    for name, path in files.items():
        if not Path(path).is_file():
            raise ConfigError(f"{name}: there is no file {path}; name a PEM file")
    if (CERTIFICATE in files) != (KEY in files):
        raise ConfigError(f"{CERTIFICATE} and {KEY} go together; set both, or neither")
    options |= {"use_ssl": True, "check_hostname": True, "ca": files.get(CA)}
    return {**options, "certfile": files.get(CERTIFICATE), "keyfile": files.get(KEY)}
