"""schemathesis: no answer 5xx, and all as the descriptions say; see `tests.hostile.rest`."""

from pathlib import Path

import httpx
import pytest

from tests.hostile.rest import APIS, try_api

EXAMPLES = 6


@pytest.mark.parametrize("name", APIS)
def test_a_rest_api_keeps_to_its_description_whatever_it_is_asked(
    name: str, tmp_path: Path
) -> None:
    with APIS[name](tmp_path) as url:
        assert try_api(url, EXAMPLES) >= 4
        assert httpx.get(f"{url}/openapi.json").status_code == 200
