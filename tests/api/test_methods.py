"""Every method, served or not, ends with a plain message, and metadata has one limit."""

import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from serving import PATIENCE, SERVICE, ServerProcess, connect

import server.lifecycle as _  # noqa: F401  # all that a server imports, and with it every descriptor
from server.api.connections import METADATA_BYTES
from server.api.standard_services import OPEN_METHODS
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

STEADY = ("tests/support/steady_server.py",)
PYTHONS_WORDS = ("Error", "Exception", "exception", "Traceback", ".py", "object at", "NoneType", "not implemented!")


def known_methods() -> list[MethodDescriptor]:
    """Yield every method of every service of every file that this process has imported."""
    files = {id(each): each for each in (getattr(module, "DESCRIPTOR", None) for module in list(sys.modules.values()))}
    return sorted(
        (
            method
            for file in files.values()
            if isinstance(file, FileDescriptor)
            for service in file.services_by_name.values()
            for method in service.methods
        ),
        key=lambda method: method.full_name,
    )


METHODS = known_methods()
PATHS = sorted({*OPEN_METHODS, *(f"/{each.containing_service.full_name}/{each.name}" for each in METHODS)})
MADE_UP = [
    f"/{SERVICE}/NoSuchMethod",
    "/grpc.health.v1.Health/NoSuchMethod",
    "/no.such.Service/Method",
    "/",
    "//",
    "/x" * 3000,
]


@pytest.fixture(scope="module")
def steady() -> Iterator[ServerProcess]:
    """Yield a server with every protocol on."""
    server = ServerProcess(
        "--kserve", "--instill", "--channelz", "--health-listen", "127.0.0.1:0", program=STEADY, cold=True
    ).wait_until_ready()
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Yield the same with tokens."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"one {'0' * 64}\n")
    server = ServerProcess("--kserve", "--instill", "--channelz", "--tokens", str(tokens), program=STEADY, cold=True)
    yield server.wait_until_ready()
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log


def answer(channel: grpc.Channel, path: str, timeout: float = PATIENCE) -> tuple[grpc.StatusCode, str]:
    """Return the end of a call with one empty message, for a method of any kind."""
    call = channel.stream_stream(path)(iter([b""]), timeout=timeout)
    try:
        for _ in call:
            if path.endswith("/Watch"):
                call.cancel()
    except grpc.RpcError:
        pass
    return call.code(), call.details() or ""


def test_the_list_of_methods_covers_every_protocol():
    services = {method.containing_service.name for method in METHODS}
    assert services >= {
        *("TextToImageService", "GRPCInferenceService", "UserDefinedService", "ModelPublicService"),
        *("Health", "ServerReflection", "Channelz"),
    }
    assert len(METHODS) >= 27


@pytest.mark.parametrize("path", [*PATHS, *MADE_UP], ids=lambda path: path[:80])
def test_every_method_ends_with_a_status_and_a_plain_message(steady, path):
    with connect(steady) as channel:
        code, words = answer(channel, path)
    assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), words
    for each in PYTHONS_WORDS:
        assert each not in words
    assert len(words) < 2000


@pytest.mark.parametrize("path", [*PATHS, *MADE_UP[:4]])
def test_every_path_needs_a_token_whether_it_is_served_or_not(guarded, path):
    open_methods = {*OPEN_METHODS}
    open_methods |= {f"/inference.GRPCInferenceService/{each}" for each in ("ServerLive", "ServerReady")}
    open_methods |= {f"/model.model.v1alpha.ModelPublicService/{each}" for each in ("Liveness", "Readiness")}
    with connect(guarded) as channel:
        code, words = answer(channel, path)
    assert (code == grpc.StatusCode.UNAUTHENTICATED) == (path not in open_methods), words


@pytest.mark.parametrize("path", MADE_UP)
def test_a_missing_method_is_unimplemented_with_a_shortened_path(steady, path):
    with connect(steady) as channel:
        code, words = answer(channel, path)
    assert code == grpc.StatusCode.UNIMPLEMENTED
    assert words == f"{path[:200]} is not served here; GetModel and reflection show what is"


@pytest.mark.parametrize("port", ["main", "health"])
def test_health_lists_every_service_by_its_name(steady, port):
    target = steady.target if port == "main" else steady.wait_for_log(r"health checks on (\S+)")[1]
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        listed = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=PATIENCE)
    assert {name: each.status for name, each in listed.statuses.items()} == dict.fromkeys(
        (
            *("", SERVICE, "inference.GRPCInferenceService"),
            *("model.ray.v1alpha.UserDefinedService", "model.model.v1alpha.ModelPublicService"),
        ),
        health_pb2.HealthCheckResponse.SERVING,
    )


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_the_contract_and_itself_in_both_versions(steady, version):
    """The test builds the messages of v1 from the descriptors that reflection returns."""
    name = f"grpc.reflection.{version}.ServerReflection"
    with connect(steady) as channel:
        ask = channel.stream_stream(
            f"/{name}/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=name),
        ]
        listed, contract, itself = ask(iter(asked), timeout=PATIENCE)
    services = {each.name for each in listed.list_services_response.service}
    assert services >= {SERVICE, "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"}
    pool = descriptor_pool.DescriptorPool()
    for described in (contract, itself):
        files = [*described.file_descriptor_response.file_descriptor_proto]
        for each in reversed(files):
            file = descriptor_pb2.FileDescriptorProto.FromString(each)
            pool.AddSerializedFile(file.SerializeToString())
    assert [each.name for each in pool.FindServiceByName(SERVICE).methods] == [
        each.name for each in pb.DESCRIPTOR.services_by_name["TextToImageService"].methods
    ]
    (method,) = pool.FindServiceByName(name).methods
    response = message_factory.GetMessageClass(method.output_type).FromString(listed.SerializeToString())
    assert {each.name for each in response.list_services_response.service} == services


def size(metadata: list[tuple[str, str]]) -> int:
    return sum(len(key) + len(value) + 32 for key, value in metadata)


@pytest.mark.parametrize("port", ["main", "health"])
@pytest.mark.parametrize(("spare", "expected"), [(1024, "OK"), (0, "RESOURCE_EXHAUSTED")])
def test_the_metadata_limit_is_exact(steady, port, spare, expected):
    """A call's own headers take a few hundred bytes of the limit."""
    target = steady.target if port == "main" else steady.wait_for_log(r"health checks on (\S+)")[1]
    metadata = [("x-padding", "x" * (METADATA_BYTES - spare - size([("x-padding", "")])))]
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel, ThreadPoolExecutor(25) as pool:
        check = health_pb2_grpc.HealthStub(channel).Check
        calls = [
            pool.submit(check.with_call, health_pb2.HealthCheckRequest(), metadata=metadata, timeout=PATIENCE)
            for _ in range(100)
        ]
        codes = Counter("OK" if (error := each.exception()) is None else error.code().name for each in calls)
    assert codes == {expected: 100}


def test_rejected_metadata_leaves_the_connection_usable(steady):
    with connect(steady) as channel:
        stub = pb_grpc.TextToImageServiceStub(channel)
        for size_of_value in (20_000, 60_000, 200_000):
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetModel(pb.GetModelRequest(), metadata=[("x-padding", "x" * size_of_value)], timeout=PATIENCE)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE).name == "steady"
