"""Every overlay of cluster/kubernetes, rendered once."""

from __future__ import annotations

import kustomized
import pytest
from overlays import KUBERNETES, OVERLAYS, Object


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[Object]]:
    return {overlay: kustomized.render(KUBERNETES / "overlays" / overlay) for overlay in OVERLAYS}


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest, rendered: dict[str, list[Object]]) -> list[Object]:
    return rendered[request.param]
