from __future__ import annotations

import pytest

from rayfm.config import ConfigError
from rayfm.serving.http.config import EndpointsConfig
from rayfm.serving.http.token import TokenCheck, check_bind, read_token

TOKEN = "a-token-of-some-length"


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer {TOKEN}", True),
        (f"Bearer  {TOKEN} ", True),
        (f"Bearer {TOKEN}x", False),
        (f"Bearer {TOKEN[:-1]}", False),
        ("Bearer ", False),
        ("", False),
        (None, False),
        (TOKEN, False),
        (f"Basic {TOKEN}", False),
        ("Bearer \udcff\udcfe", False),
    ],
)
def test_only_the_token_passes(header, allowed):
    assert TokenCheck(TOKEN).allows(header) is allowed
    if header is not None and "\udcff" not in header:
        assert TokenCheck(TOKEN).allows(header.encode()) is allowed


def test_without_a_token_everybody_passes():
    assert TokenCheck(None).allows(None)
    assert not TokenCheck(None).required


def test_tokens_are_compared_by_digests_of_one_length(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((len(a), len(b))) or False)
    for given in ("x", TOKEN, "y" * 10_000):
        assert not TokenCheck(TOKEN).allows(f"Bearer {given}")
    assert compared == [(32, 32)] * 3
    assert TOKEN not in repr(vars(TokenCheck(TOKEN)))


def test_a_token_comes_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    assert read_token(EndpointsConfig(token_file=str(file)), {"RAYFM_TOKEN": "other"}) == TOKEN
    assert read_token(EndpointsConfig(), {"RAYFM_TOKEN": TOKEN}) == TOKEN
    assert read_token(EndpointsConfig(token_env="MINE"), {"RAYFM_TOKEN": TOKEN}) is None


def test_a_token_that_others_can_read_is_refused(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it; run `chmod 600"):
        read_token(EndpointsConfig(token_file=str(file)))
    with pytest.raises(ConfigError, match=r"token_file .*none: cannot be read \(No such file"):
        read_token(EndpointsConfig(token_file=str(tmp_path / "none")))


@pytest.mark.parametrize("token", ["short", "two words of a length", "tökentökentökentöken"])
def test_a_weak_token_is_refused(token):
    with pytest.raises(ConfigError, match=r"RAYFM_TOKEN: a token has at least 16 .*secrets\.token_urlsafe"):
        read_token(EndpointsConfig(), {"RAYFM_TOKEN": token})


def test_only_loopback_needs_no_token():
    check_bind(EndpointsConfig(), None)
    check_bind(EndpointsConfig(host="::1"), None)
    check_bind(EndpointsConfig(host="0.0.0.0", grpc_port=9000), TOKEN, production=True)
    with pytest.raises(ConfigError, match=r"endpoints\.host 0\.0\.0\.0 can be reached .* RAYFM_TOKEN.*token_file"):
        check_bind(EndpointsConfig(host="0.0.0.0"), None)
    with pytest.raises(ConfigError, match=r"endpoints\.grpc_port: .* 9000 on every interface"):
        check_bind(EndpointsConfig(grpc_port=9000), None)
    with pytest.raises(ConfigError, match="--production listens on every interface"):
        check_bind(EndpointsConfig(), None, production=True)


def test_the_token_cannot_stand_in_the_config():
    with pytest.raises(ValueError, match="token"):
        EndpointsConfig.model_validate({"token": TOKEN})
