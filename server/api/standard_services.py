"""gRPC's own services: health with every method of its protocol, and reflection under both its names."""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection, reflection_pb2

HEALTH = "grpc.health.v1.Health"
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

# Exact paths: any other path asks for a token, whatever it begins with.
OPEN_METHODS = (
    *(f"/{HEALTH}/{method}" for method in ("Check", "List", "Watch")),
    *(f"/{service}/ServerReflectionInfo" for service in REFLECTION),
)
"""Methods that need no token: probes have none, and reflection shows no more than the published proto files."""


class HealthServicer(health.HealthServicer):
    """Adds `List` to the library's servicer. `services` are the names whose health is set; "" is the server.

    Older versions of the library lack the messages of `List`; the method is then unimplemented.
    """

    def __init__(self, services: Sequence[str]) -> None:
        super().__init__()
        self._services = services

    async def List(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:  # noqa: N802
        """Return the health of every service, the same as Check."""
        statuses = {
            service: await self.Check(health_pb2.HealthCheckRequest(service=service), context)
            for service in self._services
        }
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # newer than the stubs


def add_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Serve reflection of these services and of itself, as v1 and v1alpha, which differ only in their names."""
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer((*services, *REFLECTION))
    answer = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in REFLECTION:
        handlers = {"ServerReflectionInfo": answer}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def _describe_v1() -> None:
    """Add the descriptors of v1 to the pool, derived from v1alpha, which is all that grpcio-reflection has."""
    pool = descriptor_pool.Default()
    alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    v1 = text_format.Parse(
        text_format.MessageToString(alpha).replace("v1alpha", "v1"), descriptor_pb2.FileDescriptorProto()
    )
    try:
        pool.FindFileByName(v1.name)
    except KeyError:
        pool.AddSerializedFile(v1.SerializeToString())
