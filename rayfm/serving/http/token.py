"""The bearer token: where it comes from, and a check whose time says nothing about it."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from pathlib import Path

from rayfm.config import ConfigError
from rayfm.serving.http.config import EndpointsConfig

MIN_LENGTH = 16
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
"""What RFC 6750 allows in a bearer token."""


class TokenCheck:
    """Compares bearer tokens. Keeps the token's hash alone, so that replicas are never sent the token.

    Args:
        token: the right one; None lets everybody in (loopback).
    """

    def __init__(self, token: str | None) -> None:
        self._digest = None if token is None else _digest(token.encode())

    @property
    def required(self) -> bool:
        """Whether a token is asked for."""
        return self._digest is not None

    def allows(self, authorization: bytes | str | None) -> bool:
        """Whether an ``Authorization`` header's value lets its request in.

        Digests of equal length are compared in constant time, so neither a common prefix nor the length shows.
        """
        if self._digest is None:
            return True
        value = authorization.encode("utf-8", "surrogateescape") if isinstance(authorization, str) else authorization
        scheme, _, given = (value or b"").partition(b" ")
        same = hmac.compare_digest(_digest(given.strip()), self._digest)
        return same and scheme.lower() == b"bearer"


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def read_token(config: EndpointsConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token of the config's file or environment variable; None where there is neither.

    Raises:
        ConfigError: the file cannot be read or others may read it; the token is short or has odd characters.
    """
    if config.token_file is not None:
        path, where = Path(config.token_file), f"endpoints.token_file {config.token_file}"
        try:
            mode, token = path.stat().st_mode, path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(f"{where}: cannot be read ({reason}); name a file that holds the token alone") from None
        if mode & 0o077:
            raise ConfigError(f"{where}: others may read it; run `chmod 600 {config.token_file}`")
    else:
        token, where = environment.get(config.token_env, "").strip(), f"environment variable {config.token_env}"
        if not token:
            return None
    if len(token) < MIN_LENGTH or not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{where}: a token has at least {MIN_LENGTH} letters, digits or any of ._~+/=- ; make one with "
            "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
        )
    return token


def check_bind(config: EndpointsConfig, token: str | None, production: bool = False) -> None:
    """Refuse to listen where others can reach it without a token.

    Raises:
        ConfigError: the host is not loopback, or gRPC or the production profile is asked for, and there is no token.
    """
    if token is not None:
        return
    make = f"put one in the environment variable {config.token_env}, or in a file that endpoints.token_file names"
    if not config.loopback:
        raise ConfigError(f"endpoints.host {config.host} can be reached from other machines and needs a token; {make}")
    if config.grpc_port is not None:
        raise ConfigError(
            f"endpoints.grpc_port: Ray Serve opens {config.grpc_port} on every interface, so it needs a token; {make}"
        )
    if production:
        raise ConfigError(f"--production listens on every interface (HAProxy), so it needs a token; {make}")
