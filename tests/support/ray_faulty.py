"""A replica around a model that does as a failing device does: see faulty_server.py."""

from collections.abc import Callable

from faulty_server import Faulty

from deploy.ray import replica
from server.engine.interface import AnyServedModel
from server.settings import Settings


def faulty(load: Callable[[Settings], AnyServedModel]) -> Callable[[Settings], Faulty]:
    return lambda settings: Faulty(load(settings))


class FaultyReplica(replica.Replica):
    async def __init__(self) -> None:
        replica.load = faulty(replica.load)
        await super().__init__()


application = replica.deployment.options(func_or_class=FaultyReplica).bind()
