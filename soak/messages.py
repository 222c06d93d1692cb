"""Call every method of every protocol with messages generated from the descriptors, and with random bytes.

One server takes all calls: the real one with the model of tests/support/steady_server.py, default limits and every
protocol. A call must not end with INTERNAL or UNKNOWN, have an answer or trailers above callers' limits, or outlive its
deadline. The server must log no traceback, stay SERVING, have no jobs at the end, and not grow in memory.
"""

import base64
import re
import shlex
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from multiprocessing import get_context
from statistics import median
from typing import Any
from urllib.request import urlopen

import grpc
import hypothesis
import psutil
from google.protobuf import descriptor_pool, json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import strategies as st
from serving import PATIENCE, ROOT, ServerProcess

from server import lifecycle  # noqa: F401  # imports the descriptors of every protocol
from server.api import open_inference
from server.domain import ASPECT_RATIOS
from server.observability.interceptor import REQUEST_ID
from soak import strategies

SERVICES = (
    "text_to_image.v1.TextToImageService",
    "inference.GRPCInferenceService",
    "model.ray.v1alpha.UserDefinedService",
    "model.model.v1alpha.ModelPublicService",
    "grpc.health.v1.Health",
    "grpc.channelz.v1.Channelz",
    "grpc.reflection.v1alpha.ServerReflection",
)
FLAGS = ("--kserve", "--instill", "--channelz", "--metrics-listen", "127.0.0.1:0", "--retention-seconds", "5")

PROGRAM = ("tests/support/steady_server.py",)
_UNKNOWN_METHODS = ("/text_to_image.v1.TextToImageService/Nothing", "/nothing.v1.Nothing/At", "/nothing", "/")
_ENDLESS = ("/grpc.health.v1.Health/Watch",)  # streams that only the caller ends
_TRAILER_BYTES = 8 * 1024  # gRPC's default limit for the metadata that a caller receives
_ANSWER_BYTES = 4 * 1024 * 1024  # gRPC's default limit; images of the steady model are far smaller
_LATE_SECONDS = 60  # after the deadline: more than a busy machine needs, less than a hanging call
_GROWTH_BYTES = 24 * 2**20  # of memory, which an allocator may keep
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
_CHUNK = 500  # messages of one hypothesis run, which remembers its examples
_FORBIDDEN = re.compile(rf"Traceback|{re.escape(str(ROOT))}|object at 0x|site-packages|\.py\b|NoneType|Exception\b")

# Valid values of many fields, so that the server admits some of the messages.
WORDS = (
    "",
    " ",
    "a cat",
    "steady",
    "1",
    "euler",
    "dpmpp_2m",
    "job-1",
    "job-2",
    "job-3",
    "jpeg",
    "png",
    "webp",
    "\0",
    "%",
    "ä" * 200,
    "👩‍🎨",
    "data",
    "parameter",
    "prompt",
    "aspect-ratio",
    "negative-prompt",
    "negativePrompt",
    "n",
    "seed",
    *sorted(ASPECT_RATIOS),
    *open_inference._INPUTS,
    *open_inference._OUTPUTS,
    *open_inference._DATATYPES,
    *SERVICES,
    "text_to_image.proto",
    "google/protobuf/struct.proto",
)
_INPUT = {"data": {"prompt": "a cat"}, "parameter": {"n": 1, "seed": 7}}
_VALID: dict[str, list[dict[str, Any]]] = {
    "text_to_image.v1.GenerateRequest": [
        {"data": {"prompt": "a cat"}, "sampling": {"steps": 2}},
        {"data": {"prompt": "a cat"}, "output": {"raw": True, "previewInterval": 1}, "parameter": {"n": 2}},
        *(
            {"data": {"prompt": "a cat"}, "requestId": name, "onDisconnect": "ON_DISCONNECT_DETACH"}
            for name in ("job-1", "job-2", "job-3")
        ),
    ],
    "text_to_image.v1.AttachRequest": [{"requestId": "job-1"}, {"requestId": "job-2"}],
    "text_to_image.v1.CancelRequest": [{"requestId": "job-1"}, {"requestId": "job-3"}],
    "inference.ModelInferRequest": [
        {
            "modelName": "steady",
            "inputs": [
                {"name": "prompt", "shape": [1], "datatype": "BYTES", "contents": {"bytesContents": ["YSBjYXQ="]}}
            ],
        },
        {"modelName": "steady", "parameters": {"prompt": {"stringParam": "a cat"}, "steps": {"int64Param": 2}}},
        {
            "modelName": "steady",
            "inputs": [{"name": "prompt", "shape": [2], "datatype": "BYTES"}],
            "rawInputContents": [
                base64.b64encode(strategies.encoded_element("a cat") + strategies.encoded_element("a dog")).decode()
            ],
        },
    ],
    "inference.ModelMetadataRequest": [{"name": "steady"}],
    "inference.ModelReadyRequest": [{"name": "steady", "version": "1"}],
    "model.ray.v1alpha.CallRequest": [{"taskInputs": [_INPUT]}],
    "model.model.v1alpha.TriggerNamespaceModelRequest": [{"modelId": "steady", "taskInputs": [_INPUT, _INPUT]}],
    "model.model.v1alpha.TriggerNamespaceLatestModelRequest": [{"modelId": "steady", "taskInputs": [_INPUT]}],
}


@dataclass(frozen=True)
class Call:
    """One call: its method, its encoded messages, its deadline in seconds, its metadata."""

    method: str
    messages: tuple[bytes, ...]
    seconds: float
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    def command(self) -> str:
        """Return the command that repeats this call alone."""
        words = [f"--method={self.method}", f"--deadline={self.seconds}"]
        words += (f"--message={base64.b64encode(each).decode()}" for each in self.messages)
        for key, value in self.metadata:
            encoded = value.encode() if isinstance(value, str) else value
            words.append(f"--metadata={key}={base64.b64encode(encoded).decode()}")
        return shlex.join(["python", "-m", "soak", "messages", *words])


class Violation(Exception):
    """A call ended as no call may."""


@dataclass
class Report:
    """The results of a campaign."""

    seed: int
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)  # by method and status
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)  # bytes, after each chunk

    @property
    def levels(self) -> tuple[float, float]:
        """The median memory of the second and of the last quarter: garbage makes single values rise and fall."""
        if not self.memory:
            return 0, 0
        quarter = max(1, len(self.memory) // 4)
        return median(self.memory[quarter : 2 * quarter] or self.memory), median(self.memory[-quarter:])

    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        warm, end = (each / 2**20 for each in self.levels)
        lines = [
            f"messages: {self.ends.total()} calls in {self.seconds:.0f} s, seed {self.seed}; "
            f"memory {warm:.1f} MiB in the second quarter, {end:.1f} MiB in the last; {len(self.violations)} violations"
        ]
        for method in sorted({method for method, _ in self.ends}):
            ends = (f"{count} {code}" for (name, code), count in sorted(self.ends.items()) if name == method)
            lines.append(f"  {method}: {', '.join(ends)}")
        return "\n".join([*lines, *self.violations])


def campaign(count: int, seed: int, seconds: float, workers: int = 3) -> Report:
    """Make `count` calls, or as many as `seconds` allow, from `workers` processes with one connection each."""
    report = Report(seed)
    began = time.monotonic()
    server = ServerProcess(*FLAGS, program=PROGRAM, cold=True).wait_until_ready()
    try:
        process = psutil.Process(server.process.pid)
        statuses: list[str] = []
        watched = threading.Thread(target=_watch_health, args=(server.target, statuses), daemon=True)
        watched.start()
        sizes = [min(_CHUNK, count - first) for first in range(0, count, _CHUNK)]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            waiting = iter(enumerate(sizes))
            running = {pool.submit(_chunk, server.target, seed + n, size) for n, size in islice(waiting, workers)}
            while running:
                done = next(as_completed(running))
                running.discard(done)
                ends, violation = done.result()
                report.ends += ends
                report.violations += violation
                if server.process.poll() is None:
                    report.memory.append(process.memory_info().rss)
                if time.monotonic() - began < seconds and not report.violations and server.process.poll() is None:
                    running |= {pool.submit(_chunk, server.target, seed + n, size) for n, size in islice(waiting, 1)}
        report.violations += _violations_of_server(server, process, statuses)
        warm, end = report.levels
        if end > warm + _GROWTH_BYTES:
            report.violations.append(f"memory grew from {warm:.0f} to {end:.0f} bytes")
    finally:
        code = server.stop()
    if code != 0 or "Traceback" in server.log:
        report.violations.append(f"the server ended with {code}:\n" + "\n".join(server.lines[-60:]))
    report.seconds = time.monotonic() - began
    return report


def _watch_health(target: str, statuses: list[str]) -> None:
    """Collect every health status of the service until the server ends."""
    with grpc.insecure_channel(target) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # types-grpcio-health-checking declares no methods
            for response in stub.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0])):
                statuses.append(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))
        except grpc.RpcError:
            return


def _violations_of_server(server: ServerProcess, process: psutil.Process, statuses: list[str]) -> list[str]:
    """Return the violations of the server after all calls."""
    if server.process.poll() is not None:
        return [f"the server ended, exit code {server.process.poll()}"]
    found = []
    if statuses != ["SERVING"]:
        found.append(f"health was {statuses}")
    found += [f"in the log: {line[:500]}" for line in server.lines if " ERROR " in line or " CRITICAL " in line]
    address = server.wait_for_log(r"metrics on (http://\S+)")[1]
    until = time.monotonic() + PATIENCE
    left = None
    while time.monotonic() < until:  # detached jobs outlive their callers
        metrics = urlopen(address).read().decode()
        left = re.findall(r"^(t2i_queue_jobs\{[^}]*\}) (?!0\.0$)(.*)$", metrics, re.MULTILINE)
        if not left:
            return found
        time.sleep(0.5)
    return [*found, f"jobs left after {PATIENCE} s: {left}"]


def _chunk(target: str, seed: int, count: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Make `count` calls on one connection. Returns the counts of statuses, and the violation of the smallest call."""
    ends: Counter[tuple[str, str]] = Counter()
    failed: list[tuple[Call, str]] = []
    with grpc.insecure_channel(target, _OPTIONS) as channel:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(calls_of_all())
        def each(call: Call) -> None:
            try:
                ends[call.method, make(channel, call)] += 1
            except Violation as violation:
                failed.append((call, str(violation)))
                raise

        try:
            each()
        except Exception as error:
            if not failed:
                raise
            call, words = failed[-1]  # hypothesis ends with the smallest
            return ends, [f"{words}\n  {call.command()}\n  seed {seed} ({type(error).__name__})"]
    return ends, []


def make(channel: grpc.Channel, call: Call) -> str:
    """Make a call; the name of its status. Raises Violation."""
    began = time.monotonic()
    method = _methods().get(call.method)
    ask: Any = channel.stream_stream(call.method) if method is None or method.client_streaming else None
    answers = (
        ask(iter(call.messages), timeout=call.seconds, metadata=call.metadata)
        if ask
        else channel.unary_stream(call.method)(call.messages[0], timeout=call.seconds, metadata=call.metadata)  # type: ignore[arg-type]
    )
    size = 0
    try:
        for answer in answers:
            size += len(answer)
            if len(answer) > _ANSWER_BYTES:
                raise Violation(f"{call.method}: an answer of {len(answer)} bytes")
            if size > 4 * _ANSWER_BYTES:
                answers.cancel()
    except grpc.RpcError:
        pass
    code, details = answers.code(), answers.details() or ""
    took = time.monotonic() - began
    trailers = sum(len(key) + len(value) + 32 for key, value in answers.trailing_metadata() or ())
    trailers += sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in details.encode())
    violations = []
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        violations.append(code.name)
    if code is grpc.StatusCode.UNIMPLEMENTED and method is not None:
        violations.append("UNIMPLEMENTED")
    if method is None and code is not grpc.StatusCode.UNIMPLEMENTED:
        violations.append(f"{code.name} of an unknown method")
    if trailers > _TRAILER_BYTES:
        violations.append(f"trailers of {trailers} bytes")
    if _FORBIDDEN.search(details):
        violations.append("internal details in the message")
    if took > call.seconds + _LATE_SECONDS:
        violations.append(f"took {took:.0f} s with a deadline of {call.seconds} s")
    if violations:
        raise Violation(f"{call.method}: {', '.join(violations)}; {code.name} {details[:500]!r}")
    return str(code.name)


# The strategies for calls.


@cache
def _methods() -> dict[str, MethodDescriptor]:
    pool = descriptor_pool.Default()
    found = (method for service in SERVICES for method in pool.FindServiceByName(service).methods)
    return {f"/{method.containing_service.full_name}/{method.name}": method for method in found}


@cache
def calls_of_all() -> st.SearchStrategy[Call]:
    """Return calls of every method, more often of those that start jobs, and of unknown methods."""
    methods = [
        _calls(name, method)
        for name, method in sorted(_methods().items())
        for _ in range(5 if method.input_type.full_name in _VALID else 1)
    ]
    unknown = st.builds(
        Call, st.sampled_from(_UNKNOWN_METHODS), st.tuples(st.binary(max_size=20)), st.just(5.0), _metadata()
    )
    return st.one_of([*methods, unknown])


def _calls(name: str, method: MethodDescriptor) -> st.SearchStrategy[Call]:
    one = _encoded(method)
    several = st.lists(one, max_size=4).map(tuple) if method.client_streaming else st.tuples(one)
    seconds = st.sampled_from([0.01, 0.05] if name in _ENDLESS else [0.05, 5.0, 5.0, 5.0, 30.0])
    return st.builds(Call, st.just(name), several, seconds, _metadata())


def _encoded(method: MethodDescriptor) -> st.SearchStrategy[bytes]:
    kind = method.input_type
    generated: st.SearchStrategy[Message] = strategies.messages(kind, WORDS)
    choices = [generated, generated]
    if valid := _VALID.get(kind.full_name):
        patterns = [json_format.ParseDict(each, GetMessageClass(kind)()) for each in valid]
        choices += [st.builds(_merged, st.sampled_from(patterns), generated), st.sampled_from(patterns)]
    encoded = st.one_of(choices).map(lambda message: message.SerializeToString(deterministic=True))
    return st.one_of(
        encoded, encoded, encoded, strategies.corrupted(encoded), st.binary(max_size=60), strategies.deep(kind)
    )


def _merged(pattern: Message, generated: Message) -> Message:
    both = type(pattern)()
    both.CopyFrom(pattern)
    both.MergeFrom(generated)
    return both


def _metadata() -> st.SearchStrategy[tuple[tuple[str, str | bytes], ...]]:
    """Return metadata, in two of three cases empty."""
    names = st.sampled_from([REQUEST_ID, "traceparent", "tracestate", "authorization", "x-anything"])
    texts = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60).map(str.strip)
    pairs = st.tuples(names, texts) | st.tuples(st.just("anything-bin"), st.binary(max_size=60))
    return st.just(()) | st.just(()) | st.lists(pairs, max_size=3).map(tuple)


def repeat(call: Call) -> list[str]:
    """Make one call to a new server and return its violations."""
    server = ServerProcess(*FLAGS, program=PROGRAM, cold=True).wait_until_ready()
    try:
        with grpc.insecure_channel(server.target, _OPTIONS) as channel:
            make(channel, call)
    except Violation as violation:
        return [str(violation)]
    finally:
        server.stop()
    return [server.log] if "Traceback" in server.log else []
