"""What schemathesis makes of the OpenAPI document, asked of a real server: no 5xx, answers conform.

It sends what fits the document and, where that is possible, what does not; without the key, which
must be refused; and with other methods. Names in addresses are those of a task that is there for
half of it, so that not every answer is a 404. The draws are the same each time.
"""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import positive_data_acceptance

from service.access import RULES
from service.wire.headers import MIN_GENERATION_HEADER, TIMEOUT_HEADER
from tests.service.conftest import MakeBundle, StartServer
from tests.service.made import image_bytes

KEY = {"Authorization": "Bearer admin"}
NAMES = {"task": "pets", "model": "pets", "version": "1", "alias": "canary"}
OPERATIONS = [
    (method, path)
    for path, methods in RULES.items()
    for method in methods
    if path not in ("/docs", "/openapi.json")
]
WITH_BODIES = [
    (method, path)
    for method, path in OPERATIONS
    if method in ("POST", "PUT") and not path.endswith(("pin", ":rollback", ":promote"))
]
schemathesis.openapi.media_type("image/*", st.binary(max_size=200) | st.just(image_bytes()))


@pytest.fixture(scope="module")
def locked(
    start_server: StartServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client, with the key, of a server that has one."""
    store = tmp_path_factory.mktemp("api")
    settings = ("admin_key=admin", "generation_wait_s=0.01")  # it draws generations, too
    with start_server(store, *settings) as server, server.client() as client:
        client.headers.update(KEY)
        yield client


@pytest.fixture(scope="module")
def document(locked: httpx.Client) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{locked.base_url}/openapi.json")


@pytest.fixture
def api(locked: httpx.Client, document: BaseSchema, make: MakeBundle) -> BaseSchema:
    """The document of a server that has a task with two versions, whatever was asked before."""
    for version in ("1", "2"):
        data = make(version=version, seed=int(version))[1]
        put = locked.put(f"/v1/tasks/pets/versions/{version}", content=data)
        assert put.status_code in (200, 201)
    return document


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_fits_the_document_gets_an_answer_that_fits_it(
    api: BaseSchema, method: str, path: str
) -> None:
    ask(api, method, path, GenerationMode.POSITIVE)


@pytest.mark.parametrize(("method", "path"), WITH_BODIES)
def test_what_does_not_fit_the_document_is_refused_by_a_problem(
    api: BaseSchema, method: str, path: str
) -> None:
    ask(api, method, path, GenerationMode.NEGATIVE)


def ask(api: BaseSchema, method: str, path: str, mode: GenerationMode) -> None:
    cases = api[path][method].as_strategy(generation_mode=mode)

    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, known=st.booleans())
    def each(case: schemathesis.Case[Any], known: bool) -> None:
        if known:
            case.path_parameters |= {k: v for k, v in NAMES.items() if k in case.path_parameters}
            case.headers.pop(MIN_GENERATION_HEADER, None)
        response = case.call(headers=KEY)
        if response.status_code == 504:  # it drew a time in which nothing can be answered
            assert TIMEOUT_HEADER in case.headers
        elif response.status_code == 503:  # or a generation that there has never been
            assert '"behind"' in response.text
            assert MIN_GENERATION_HEADER in case.headers
        elif response.status_code != 431:  # or headers that no route gets to see
            # What fits may still be refused: labels must differ, and a bundle must be one.
            case.validate_response(
                response,
                excluded_checks=[positive_data_acceptance],
                transport_kwargs={"headers": KEY},
            )

    each()
