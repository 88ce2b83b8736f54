"""A bucket on moto's S3 server, for tests: a real HTTP service with conditional writes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.fs

BUCKET, ID, SECRET = "teachers-labels", "an-id", "a-secret"
"""The server lets every key in; what is signed must be signed with one."""

KEYS = {"AWS_ACCESS_KEY_ID": ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
"""What the environment of a process that reaches the server has."""

ENVIRONMENT = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)  # fmt: skip


@contextlib.contextmanager
def s3_service() -> Iterator[str]:
    """The URL of a service that has `BUCKET`, as long as the block lasts."""
    script = Path(__file__).with_name("s3_server.py")
    server = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
        client(endpoint).create_dir(BUCKET)
        yield endpoint
    finally:
        server.stdin.close()
        server.wait(30)


def client(endpoint: str) -> pyarrow.fs.S3FileSystem:
    """A client of the service that is not the label store's."""
    return pyarrow.fs.S3FileSystem(
        endpoint_override=urlsplit(endpoint).netloc, scheme="http", region="us-east-1", access_key=ID,
        secret_key=SECRET, allow_bucket_creation=True,
    )  # fmt: skip


def objects(endpoint: str, prefix: str = "") -> dict[str, int]:
    """Bytes of each object of `BUCKET` below ``prefix`` (a folder), by key."""
    selector = pyarrow.fs.FileSelector(f"{BUCKET}/{prefix}".rstrip("/"), recursive=True, allow_not_found=True)
    return {
        info.path.removeprefix(f"{BUCKET}/"): info.size
        for info in client(endpoint).get_file_info(selector)
        if info.is_file
    }


def put(endpoint: str, key: str, content: bytes) -> None:
    """Make an object of `BUCKET`."""
    with client(endpoint).open_output_stream(f"{BUCKET}/{key}") as file:
        file.write(content)
