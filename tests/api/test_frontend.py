"""The frontend without any protocol: the same queue, limits and errors for whichever protocol holds it."""

import ast
import asyncio
from collections.abc import AsyncIterator

import pytest
from serving import ROOT
from stepped_model import MODEL_INFO, SteppedModel

from server.api import errors
from server.api.frontend import Frontend
from server.api.requests import in_one_message
from server.domain import Caller
from server.engine.engine import Engine
from server.engine.events import DeadlineExceeded, ResourceExhausted
from server.engine.scheduling import QueueLimits
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb

ME = Caller("me", "me")


@pytest.fixture
def model() -> SteppedModel:
    return SteppedModel()


@pytest.fixture
async def blocked_frontend(model: SteppedModel) -> AsyncIterator[Frontend]:
    """A frontend with room for two jobs, over a model that makes a call only when a test allows it."""
    engine = Engine(QueueLimits(jobs=2))
    frontend = Frontend(engine, Settings())
    frontend.open((await asyncio.wrap_future(engine.start(lambda: model))).info)
    yield frontend
    model.allow(1000)
    engine.stop()
    assert await asyncio.to_thread(engine.join, 60)


@pytest.fixture
def frontend(blocked_frontend: Frontend, model: SteppedModel) -> Frontend:
    """A frontend with room for two jobs, over a model that never waits."""
    model.allow(1000)
    return blocked_frontend


def request(seed: int = 7, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(data=pb.TaskData(prompt="a cat"), parameter=pb.TaskParameter(seed=seed), **fields)


async def admitted() -> None:
    pass


def test_only_the_grpc_side_of_the_api_and_the_error_table_import_grpc():
    def imports_grpc(source: str) -> bool:
        nodes = list(ast.walk(ast.parse(source)))
        names = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        return any(name.partition(".")[0].startswith("grpc") for name in names)

    files = [*(ROOT / "server/api").glob("*.py"), *(ROOT / "server/engine").glob("*.py"), ROOT / "server/domain.py"]
    assert {file.name for file in files if imports_grpc(file.read_text())} == {
        "auth.py",
        "decode_errors.py",
        "errors.py",
        "grpc_calls.py",
        "standard_services.py",
        "tls.py",
    }


async def test_until_the_model_is_open_requests_raise_loading():
    frontend = Frontend(Engine(QueueLimits(jobs=1)), Settings())
    assert not frontend.ready
    with pytest.raises(errors.Loading):
        frontend.parse(request(), "id", ME)


async def test_an_answer_has_all_images_in_the_order_of_the_requests(frontend: Frontend):
    batch = [in_one_message(frontend.parse(request(seed), f"id-{seed}", ME)) for seed in (1, 2)]
    answers = await frontend.answer(batch, admitted)
    assert [answer.metadata.images[0].seed for answer in answers] == [1, 2]
    assert [answer.metadata.request_id for answer in answers] == ["id-1", "id-2"]


async def test_on_admitted_is_awaited_only_if_all_jobs_are_admitted(blocked_frontend: Frontend, model: SteppedModel):
    frontend, calls = blocked_frontend, []

    async def on_admitted() -> None:
        calls.append("admitted")

    batch = [in_one_message(frontend.parse(request(seed), "id", ME)) for seed in (1, 2, 3)]
    with pytest.raises(ResourceExhausted):
        await frontend.answer(batch, on_admitted)
    assert calls == []
    model.allow(1000)
    await frontend.wait_until_idle()
    await frontend.answer(batch[:1], on_admitted)
    assert calls == ["admitted"]


async def test_an_attached_stream_has_the_events_of_the_first_one(frontend: Frontend):
    parsed = frontend.parse(request(request_id="mine", on_disconnect=pb.ON_DISCONNECT_DETACH), "mine", ME)
    with frontend.stream(parsed) as messages:
        events = [message async for message in messages]
    with frontend.attach("mine", events[0].number, ME) as messages:
        assert [message async for message in messages] == events[1:]
    assert events[-1].HasField("done")
    with pytest.raises(errors.UnknownJob):
        frontend.attach("mine", 0, Caller("me", "another"))


async def test_a_timeout_ends_the_job(frontend: Frontend):
    with pytest.raises(DeadlineExceeded):
        await frontend.answer([in_one_message(frontend.parse(request(), "id", ME, timeout=0))], admitted)


async def test_a_batch_reports_its_violations_by_the_names_of_its_protocol(frontend: Frontend):
    bad = request()
    bad.data.prompt = " "
    with pytest.raises(errors.InvalidRequest) as caught:
        frontend.parse_batch(
            [request(), bad, bad],
            "id",
            ME,
            name_of=lambda field, indices: f"{field}@{indices}",
            count_field="n",
            violations=[errors.Violation("header", "is unreadable")],
        )
    assert [each.field for each in caught.value.violations] == ["header", "data.prompt@1-2"]


async def test_a_caller_has_its_own_highest_priority(frontend: Frontend):
    _, limits = frontend.model(Caller("me", max_priority=-1))
    assert limits.max_priority == -1
    assert frontend.model(ME)[0] == MODEL_INFO


async def test_waiting_until_idle_includes_calls_that_are_still_answered(frontend: Frontend):
    frontend.call_began("call")
    waiting = asyncio.create_task(frontend.wait_until_idle())
    done, _ = await asyncio.wait((waiting,), timeout=0.01)
    assert not done
    frontend.call_ended("call")
    await asyncio.wait_for(waiting, 60)
