"""What an operator sees: real servers, a real collector of traces, and Prometheus' own tools where they are there."""

import http.server
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from scraping import scrape
from serving import LONG_JOB, PATIENCE, ROOT, SERVICE, ServerProcess, connect, first_step, request

from server.observability import logs
from server.observability.traces import traces_from_environment
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

SHORT = {"sampling": {"steps": 5}}
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = ("traceparent", f"00-{TRACE}-{CALLER}-01")
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector of traces, which keeps every span with the name of the service that sent it."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Span]] = []
        self._changed = threading.Condition()
        self._start()

    def _start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request, context) -> trace_service_pb2.ExportTraceServiceResponse:  # noqa: N802
        with self._changed:
            for resource in request.resource_spans:
                (service,) = (
                    each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
                )
                self._spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def call(self, request_id: str) -> tuple[str, Span, list[Span]]:
        """The service, the call's span and its children by their beginnings, once the call's, the last, is here."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._find(request_id), PATIENCE)
            service, span = self._find(request_id)[0]
            children = [each for _, each in self._spans if each.parent_span_id == span.span_id]
        return service, span, sorted(children, key=lambda each: each.start_time_unix_nano)

    def _find(self, request_id: str) -> list[tuple[str, Span]]:
        return [each for each in self._spans if attributes(each[1]).get("t2i.request_id") == request_id]

    def stop(self) -> None:
        self._server.stop(None).wait()


class HttpCollector(Collector):
    """The same over HTTP, as OTLP has it: POST of the message to /v1/traces."""

    def _start(self) -> None:
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf":
                    collector.Export(trace_service_pb2.ExportTraceServiceRequest.FromString(body), None)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.target = f"127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def attributes(span: Span) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def watched(collector: Collector) -> Iterator[ServerProcess]:
    """A server with everything on."""
    server = ServerProcess(
        "--metrics-listen",
        "127.0.0.1:0",
        "--log-format",
        "json",
        "--channelz",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{collector.target}",
        OTEL_BSP_SCHEDULE_DELAY="50",
    ).wait_until_ready()
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture
def stub(watched: ServerProcess) -> Iterator[pb_grpc.TextToImageServiceStub]:
    with connect(watched) as channel:
        yield pb_grpc.TextToImageServiceStub(channel)


class TestMetrics:
    def test_request_is_counted_with_duration_steps_images_and_device_time(self, watched, stub):
        before = scrape(watched)
        image = stub.Generate(request(**SHORT, output={"raw": True}), timeout=PATIENCE).data.choices[0].raw
        after = scrape(watched)

        def grown(name: str, **labels: str) -> float:
            return after(name, **labels) - before(name, **labels)

        assert grown("t2i_requests_total", method="Generate", code="OK") == 1
        took = grown("t2i_request_duration_seconds_sum", method="Generate")
        assert 0 < grown("t2i_queue_wait_seconds_sum") < took
        assert grown("t2i_jobs_total", outcome="finished") == 1
        assert grown("t2i_steps_total", stage="base") == 4
        assert grown("t2i_steps_total", stage="refiner") == 1
        assert grown("t2i_network_call_images_bucket", stage="base", le="1.0") == 4
        busy = sum(
            grown("t2i_model_call_duration_seconds_sum", stage=stage)
            for stage in ("encode", "base", "refiner", "decode")
        )
        assert grown("t2i_device_seconds_total", use="delivered") == pytest.approx(busy)
        assert grown("t2i_device_seconds_total", use="wasted") == 0
        assert busy < took
        assert grown("t2i_eta_ratio_count") == 1
        assert grown("t2i_image_size_bytes_sum") == len(image)
        assert grown("t2i_image_size_pixels_sum") == 256 * 256

    def test_a_call_that_fails_is_counted_by_its_status(self, watched, stub):
        before = scrape(watched)
        for call in (lambda: stub.Generate(request(" ")), lambda: list(stub.Attach(pb.AttachRequest(request_id="x")))):
            with pytest.raises(grpc.RpcError):
                call()
        for labels in ({"method": "Generate", "code": "INVALID_ARGUMENT"}, {"method": "Attach", "code": "NOT_FOUND"}):
            # A caller hears a status a moment before the call is counted.
            after = scrape(watched)
            while after("t2i_requests_total", **labels) == before("t2i_requests_total", **labels):
                after = scrape(watched)
            assert after("t2i_requests_total", **labels) - before("t2i_requests_total", **labels) == 1

    def test_waiting_and_running_jobs_are_exported_and_cancelled_time_is_wasted(self, watched, stub):
        before = scrape(watched)
        running = stub.StreamGenerate(request(**LONG_JOB))
        first_step(running)
        waiting = stub.StreamGenerate(request(**LONG_JOB))
        assert next(waiting).HasField("queued")
        during = scrape(watched)
        assert {state: during("t2i_queue_jobs", state=state) for state in ("waiting", "running")} == {
            "waiting": 1,
            "running": 1,
        }
        waiting.cancel()
        running.cancel()
        stub.Generate(request(**SHORT), timeout=PATIENCE)  # which ends after both
        after = scrape(watched)
        assert after("t2i_jobs_total", outcome="cancelled") - before("t2i_jobs_total", outcome="cancelled") == 2
        assert after("t2i_device_seconds_total", use="wasted") > before("t2i_device_seconds_total", use="wasted")
        labels = {"method": "StreamGenerate", "code": "CANCELLED"}
        assert after("t2i_requests_total", **labels) - before("t2i_requests_total", **labels) == 2
        assert after("t2i_queue_jobs", state="waiting") == after("t2i_queue_jobs", state="running") == 0

    def test_detached_jobs_that_are_kept_are_told_with_their_bytes(self, watched, stub):
        list(stub.StreamGenerate(request(requestId="kept", onDisconnect="ON_DISCONNECT_DETACH", **SHORT)))
        kept = scrape(watched)
        stub.Cancel(pb.CancelRequest(request_id="kept"))
        forgotten = scrape(watched)
        assert (kept("t2i_detached_jobs", state="kept"), forgotten("t2i_detached_jobs", state="kept")) == (1, 0)
        assert kept("t2i_retained_bytes") > 10_000 > forgotten("t2i_retained_bytes") == 0

    def test_the_server_its_model_and_its_memory_are_told(self, watched, stub):
        model = stub.GetModel(pb.GetModelRequest(), timeout=9)
        told = scrape(watched)
        assert told("t2i_server_state", t2i_server_state="serving") == 1
        assert told("t2i_queue_limit_jobs") == 32
        names = {"name": model.name, "device": model.device, "precision": model.precision}
        assert told("t2i_model_info", fingerprint=model.fingerprint, **names) == 1
        is_compiled = model.environment.compiled != "off"
        assert told("t2i_compiled_calls") == (3 if is_compiled else 0)
        assert (told("t2i_compile_seconds") > 0) == is_compiled
        assert told("process_resident_memory_bytes") == pytest.approx(
            psutil.Process(watched.process.pid).memory_info().rss, rel=0.2
        )

    def test_no_label_tells_who_asked_or_for_what(self, watched, stub):
        metadata = (("x-request-id", "a-strange-call"),)
        stub.Generate(request("a strange prompt", requestId="a-strange-job", **SHORT), metadata=metadata)
        values = {value for _, labels in scrape(watched).samples for _, value in labels}
        assert not [value for value in values if "strange" in value or "127.0.0.1" in value]

    def test_metrics_of_dashboard_and_alerts_are_exported_after_one_request(self, watched, stub):
        stub.Generate(request(**SHORT), timeout=PATIENCE)
        told = scrape(watched)
        expressions = re.findall(r'"(?:expr|query)": "(.*)"', DASHBOARD.read_text())
        expressions += re.findall(r"expr: (?:\|\n)?((?:.*\n)+?) +for:", ALERTS.read_text())
        named = {name for each in expressions for name in re.findall(r"\b(?:t2i|process)_\w+", each)}
        assert len(named) > 20
        samples = {name for name, _ in told.samples}
        only_on_cuda = {"t2i_device_memory_bytes"}
        assert named - samples - only_on_cuda == set()
        assert only_on_cuda <= told.families

    def test_a_port_for_them_that_is_taken_ends_the_server_with_3(self, watched, start_server):
        taken = watched.wait_for_log(r"metrics on http://([^/]+)/")[1]
        server = start_server("--metrics-listen", taken)
        assert server.wait() == 3
        assert f"cannot listen on {taken}" in server.log
        assert "Traceback" not in server.log


class TestTraces:
    def test_span_of_a_call_has_its_caller_as_parent_and_stages_as_children(self, collector, stub):
        events = stub.StreamGenerate(
            request(requestId="traced-job", parameter={"n": 2}, **SHORT),
            metadata=(TRACEPARENT, ("x-request-id", "traced")),
            timeout=PATIENCE,
        )
        assert [event for event in events if event.HasField("done")]
        service, call, children = collector.call("traced")
        assert service == "text-to-image"
        assert (call.name, call.kind) == (f"{SERVICE}/StreamGenerate", Span.SPAN_KIND_SERVER)
        assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, CALLER)
        assert attributes(call) == {
            "rpc.system": "grpc",
            "rpc.service": SERVICE,
            "rpc.method": "StreamGenerate",
            "rpc.grpc.status_code": 0,
            "t2i.request_id": "traced",
            "t2i.job": "traced-job",
        }
        stages = [each for each in children if each.name != "code image"]
        assert [each.name for each in stages] == ["queue", "encode", *["base", "refiner", "decode"] * 2]
        assert [attributes(each).get("t2i.calls") for each in stages] == [None, 1, *[4, 1, 1] * 2]
        assert [attributes(each).get("t2i.image") for each in stages] == [None, 0, 0, 0, 0, 1, 1, 1]
        assert len(children) - len(stages) == 2
        for each in children:
            assert each.trace_id == call.trace_id
            assert call.start_time_unix_nano <= each.start_time_unix_nano <= each.end_time_unix_nano
            assert each.end_time_unix_nano <= call.end_time_unix_nano
        for earlier, later in itertools.pairwise(stages):
            assert earlier.end_time_unix_nano <= later.start_time_unix_nano

    def test_call_of_an_untraced_caller_starts_a_trace_with_its_status(self, collector, stub):
        with pytest.raises(grpc.RpcError):
            list(stub.Attach(pb.AttachRequest(request_id="nobody"), metadata=(("x-request-id", "untraced"),)))
        _, call, children = collector.call("untraced")
        assert call.parent_span_id == b""
        assert attributes(call)["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
        assert children == []

    @pytest.mark.parametrize(
        "environment",
        [
            {},
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
        ],
    )
    def test_no_traces_without_a_collector_or_when_disabled(self, monkeypatch, caplog, environment):
        for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert traces_from_environment() is None
        assert caplog.text == ""

    @pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
    def test_traces_are_sent_by_http_without_a_proxy_if_so_set(self, start_server, variable):
        collector = HttpCollector()
        protocols = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"} | {variable: "http/protobuf"}
        server = start_server(
            program=("tests/support/steady_server.py",),
            cold=True,
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{collector.target}",
            OTEL_BSP_SCHEDULE_DELAY="50",
            http_proxy="http://127.0.0.1:9",
            no_proxy="",
            NO_PROXY="",
            **protocols,
        ).wait_until_ready()
        with connect(server) as channel:
            stub = pb_grpc.TextToImageServiceStub(channel)
            stub.Generate(request(), metadata=(TRACEPARENT, ("x-request-id", "by-http")), timeout=PATIENCE)
        service, call, children = collector.call("by-http")
        assert (service, call.trace_id.hex()) == ("text-to-image", TRACE)
        assert "decode" in {each.name for each in children}
        collector.stop()

    @pytest.mark.parametrize(
        ("variables", "words"),
        [
            ({"PROTOCOL": "http/json"}, "'http/json'; supported are grpc and http/protobuf"),
            (
                {"TRACES_PROTOCOL": "carrier pigeon", "PROTOCOL": "grpc"},
                "'carrier pigeon'; supported are grpc",
            ),
            ({"TIMEOUT": "soon"}, "no traces: OpenTelemetry cannot use its variables: .*soon"),
            ({"COMPRESSION": "zip"}, "no traces: OpenTelemetry cannot use its variables: .*zip"),
            (
                {"PROTOCOL": "http/protobuf", "ENDPOINT": "http://[::1"},
                "no traces: OpenTelemetry cannot use its variables",
            ),
        ],
    )
    def test_invalid_variables_are_one_warning(self, monkeypatch, caplog, variables, words):
        for name, value in {"ENDPOINT": "http://127.0.0.1:9", **variables}.items():
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
        assert traces_from_environment() is None
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert re.search(words, record.getMessage())

    def test_variable_that_fails_an_import_is_one_warning(self):
        look = "from server.observability.traces import traces_from_environment; print(traces_from_environment())"
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_PROPAGATORS": "pigeon"}
        done = subprocess.run(
            [sys.executable, "-c", look],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "None\n"
        assert "OpenTelemetry cannot use its variables: Propagator pigeon not found" in done.stderr

    def test_missing_packages_log_what_to_install(self, monkeypatch, caplog):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.delitem(sys.modules, "server.observability.spans", raising=False)
        monkeypatch.setitem(sys.modules, "opentelemetry", None)
        assert traces_from_environment() is None
        assert "install the extra [telemetry]" in caplog.text


class TestNamesOfCalls:
    @pytest.mark.parametrize("given", ["of-the-caller/1", None, "two words", "x" * 129])
    def test_trailers_have_the_callers_request_id_or_a_new_one(self, stub, given):
        metadata = (("x-request-id", given),) if given else ()
        _, call = stub.GetModel.with_call(pb.GetModelRequest(), metadata=metadata)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(request(" "), metadata=metadata)
        stream = stub.StreamGenerate(request(**SHORT), metadata=metadata)
        list(stream)
        ids = [dict(each.trailing_metadata())["x-request-id"] for each in (call, caught.value, stream)]
        if given == "of-the-caller/1":
            assert ids == [given] * 3
        else:
            assert len(set(ids)) == 3
            assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
        assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata())


class TestLog:
    def test_disconnect_during_the_response_logs_no_traceback(self):
        gone, another = grpc.aio.InternalError('Failed "execute_batch"'), ValueError("a fault")
        records = [
            logging.LogRecord("grpc._cython.cygrpc", logging.ERROR, "", 0, "", None, (type(each), each, None))
            for each in (gone, another)
        ]
        assert list(map(logs._has_caller, records)) == [False, True]

    def test_log_lines_are_json_with_request_id_job_and_trace_id(self, watched, stub):
        metadata = (TRACEPARENT, ("x-request-id", "logged"))
        prompt = "a secret " + "and long " * 100 + "wish"
        stub.Generate(request(prompt, requestId="logged-job", **SHORT), metadata=metadata, timeout=PATIENCE)
        watched.wait_for_log("Generate logged-job OK")
        lines = [json.loads(line) for line in watched.lines]
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
        of_call = [line for line in lines if line.get("request_id") == "logged"]
        assert [(line["logger"], line["job"], line["trace_id"]) for line in of_call] == [
            ("server.engine.engine", "logged-job", TRACE),
            ("server.api.grpc_calls", "logged-job", TRACE),
        ]
        assert [line for line in lines if "logged-job" in line["message"]] == of_call
        assert "secret" not in watched.log

    def test_error_is_one_line_with_traceback_and_call_ids(self, start_server):
        server = start_server("--log-format", "json", program=("tests/support/faulty_server.py",)).wait_until_ready()
        with connect(server) as channel, pytest.raises(grpc.RpcError):
            pb_grpc.TextToImageServiceStub(channel).Generate(
                request("broken", requestId="broken-job", **SHORT), metadata=(("x-request-id", "faulty"), TRACEPARENT)
            )
        server.wait_for_log("broken on purpose")  # the answer can be here before the line is
        (fault,) = (line for line in map(json.loads, server.lines) if line["level"] == "error")
        assert (fault["request_id"], fault["job"], fault["trace_id"]) == ("faulty", "broken-job", TRACE)
        assert "RuntimeError: broken on purpose" in fault["exception"]


def test_channelz_tells_of_the_servers_connections(watched):
    with connect(watched) as channel:
        servers = channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest(), timeout=9)
    assert servers.server[0].data.calls_started > 0


def test_defaults_are_one_port_no_channelz_and_a_text_log(server):
    listening = [each for each in psutil.Process(server.process.pid).net_connections() if each.status == "LISTEN"]
    assert [each.laddr.port for each in listening] == [int(server.target.rpartition(":")[2])]
    with connect(server) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest(), timeout=9)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        pb_grpc.TextToImageServiceStub(channel).GetModel(
            pb.GetModelRequest(), metadata=(("x-request-id", "plain"), TRACEPARENT)
        )
    server.wait_for_log(
        rf"(?m)^[-0-9]+ [:,0-9]+ INFO server\.api\.grpc_calls: GetModel OK \d\.\d+ s "
        rf"\[request_id=plain trace_id={TRACE}\]$"
    )


def test_absent_collector_affects_neither_calls_nor_shutdown(
    start_server: Callable[..., ServerProcess],
):
    server = start_server(
        "--metrics-listen", "127.0.0.1:0", OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="http://127.0.0.1:9"
    ).wait_until_ready()
    with connect(server) as channel:
        stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request(sampling={"steps": 50}))
        first_step(stream)
        server.terminate()
        server.wait_for_log("draining")
        assert scrape(server)("t2i_server_state", t2i_server_state="draining") == 1
        assert [event for event in stream if event.HasField("done")]
    assert server.wait() == 0
    assert "Traceback" not in server.log


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, is not installed")
@pytest.mark.parametrize("arguments", [("check", "rules", "alerts.yaml"), ("test", "rules", "alerts_test.yaml")])
def test_the_alerts_are_right_and_fire_when_they_should(arguments: tuple[str, ...]):
    done = subprocess.run(["promtool", *arguments], cwd=ALERTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
