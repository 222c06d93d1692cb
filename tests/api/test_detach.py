"""Detached jobs: real server processes, real clients, some of which are killed."""

import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from serving import LONG_JOB, PATIENCE, ServerProcess, connect, digests, first_step, request

from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

SOME_STEPS = {"parameter": {"seed": 5, "n": 2}, "sampling": {"steps": 12}}


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[pb_grpc.TextToImageServiceStub]:
    with connect(server) as channel:
        yield pb_grpc.TextToImageServiceStub(channel)


def detached(name: str, **fields: object) -> pb.GenerateRequest:
    return request(requestId=name, onDisconnect="ON_DISCONNECT_DETACH", **fields)


def stream(stub: pb_grpc.TextToImageServiceStub, asked: pb.GenerateRequest):
    # A deadline that the long jobs cannot meet would have them refused.
    return stub.StreamGenerate(asked, timeout=None if asked.parameter.n == LONG_JOB["parameter"]["n"] else PATIENCE)


def attach(stub: pb_grpc.TextToImageServiceStub, name: str, after: int = 0):
    return stub.Attach(pb.AttachRequest(request_id=name, after=after), timeout=PATIENCE)


def cancel(stub: pb_grpc.TextToImageServiceStub, name: str) -> None:
    stub.Cancel(pb.CancelRequest(request_id=name), timeout=PATIENCE)


def summaries(events: Iterable[pb.StreamGenerateResponse]) -> list[tuple]:
    """Summarize events without times: kind, image, stage and step of each, or the image's digest."""
    return [
        (kind, event.progress.choice_index, event.progress.stage, event.progress.step, *digests_of(event))
        for event in events
        if (kind := event.WhichOneof("event"))
    ]


def digests_of(event: pb.StreamGenerateResponse) -> list[str]:
    return digests([event.choice.choice]) if event.HasField("choice") else []


def code_of(call: Iterable[object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code()


class TestAttach:
    def test_an_interrupted_stream_continues_with_every_event_once_and_the_same_bytes(self, server, stub):
        undisturbed = list(stream(stub, request(**SOME_STEPS)))
        with connect(server) as channel:
            left = stream(pb_grpc.TextToImageServiceStub(channel), detached("left", **SOME_STEPS))
            heard = [next(left) for _ in range(5)]
        heard += attach(stub, "left", after=heard[-1].number)
        assert [event.number for event in heard] == list(range(1, len(undisturbed) + 1))
        assert summaries(heard) == summaries(undisturbed)
        assert list(attach(stub, "left", after=len(heard))) == []
        assert list(attach(stub, "left")) == heard

    def test_another_process_gets_the_images_of_a_killed_client(self, server, stub, tmp_path):
        begin = f"""
from text_to_image_client import TextToImage
for event in TextToImage("{server.target}").stream("pizza", seed=3, n=2, request_id="killed", on_disconnect="detach"):
    print(event.number, flush=True)
"""
        with subprocess.Popen([sys.executable, "-c", begin], stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            while int(client.stdout.readline()) < 5:
                pass
            client.send_signal(signal.SIGKILL)
        t2i = [sys.executable, "-m", "text_to_image_client", "--target", server.target]
        output = tmp_path / "pizza.jpg"
        subprocess.run([*t2i, "attach", "killed", "-o", output], check=True, timeout=PATIENCE, capture_output=True)
        raw = stub.Generate(
            request("pizza", parameter={"seed": 3, "n": 2}, output={"raw": True}), timeout=PATIENCE
        ).data.choices
        assert [(tmp_path / f"pizza-{index}.jpg").read_bytes() for index in range(2)] == [each.raw for each in raw]

    def test_t2i_detaches_attaches_and_cancels(self, server, stub, tmp_path):
        def t2i(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "text_to_image_client", "--target", server.target, *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

        begun = t2i("generate", "a cat", "--seed", "7", "--detach", "--request-id", "by-hand")
        assert (begun.returncode, begun.stdout) == (0, "by-hand\n"), begun.stderr
        other = t2i("generate", "a dog", "--detach", "--request-id", "by-hand")
        assert other.returncode == 10
        assert other.stderr == (
            f"Error: another job has the name by-hand; end it with `t2i --target {server.target} cancel by-hand`, "
            "or use another --request-id\n"
        )
        brought = t2i("attach", "by-hand", "-o", str(tmp_path / "cat.jpg"))
        assert brought.returncode == 0, brought.stderr
        drawn = stub.Generate(request(parameter={"seed": 7}, output={"raw": True}), timeout=PATIENCE)
        assert (tmp_path / "cat.jpg").read_bytes() == drawn.data.choices[0].raw
        assert t2i("cancel", "by-hand").returncode == 0
        assert t2i("attach", "by-hand", "-o", str(tmp_path / "cat.jpg")).returncode == 9

    def test_two_streams_of_one_job_get_the_same_events(self, stub):
        first = stream(stub, detached("two", **SOME_STEPS))
        head = [next(first) for _ in range(4)]
        with ThreadPoolExecutor(2) as pool:
            second = pool.submit(lambda: list(attach(stub, "two", after=2)))
            rest = pool.submit(lambda: list(first))
            assert [*head, *rest.result()] == [*head[:2], *second.result()]

    def test_a_number_beyond_the_newest_event_is_invalid(self, stub):
        list(stream(stub, detached("short", sampling={"steps": 1})))
        assert code_of(attach(stub, "short", after=100)) == grpc.StatusCode.INVALID_ARGUMENT

    @pytest.mark.parametrize("name", ["nobody", "", "not a name"])
    def test_an_unknown_job_is_not_found(self, stub, name: str):
        assert code_of(attach(stub, name)) == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as caught:
            cancel(stub, name)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


class TestJoin:
    def test_the_same_request_joins_by_either_method_and_makes_no_second_image(self, stub):
        drawn_once = detached("joined", sampling={"steps": 8})  # and its seed, too: the request has none
        events = stream(stub, drawn_once)
        next(events)
        answer = stub.Generate(drawn_once, timeout=PATIENCE)
        rest = list(events)
        again = list(stream(stub, drawn_once))
        assert summaries(again)[1:] == summaries(rest)
        assert answer.metadata == again[-1].done.metadata == rest[-1].done.metadata
        assert digests(answer.data.choices) == digests([again[-2].choice.choice])

    def test_a_stream_joins_a_job_of_generate(self, stub):
        asked = detached("begun-whole", sampling={"steps": 2})
        answer = stub.Generate(asked, timeout=PATIENCE)
        assert [event.WhichOneof("event") for event in stream(stub, asked)][-2:] == ["choice", "done"]
        assert digests(answer.data.choices) == digests([list(attach(stub, "begun-whole"))[-2].choice.choice])

    def test_generate_reports_that_the_images_of_a_stream_do_not_fit(self, stub):
        asked = detached(
            "larger-than-its-message",
            parameter={"n": 3, "seed": 1},
            sampling={"steps": 1},
            output={"format": "FORMAT_PNG", "maxMessageBytes": 150_000},
        )
        images = [event.choice.choice for event in stream(stub, asked) if event.HasField("choice")]
        assert sum(image.ByteSize() for image in images) > 150_000
        with pytest.raises(grpc.RpcError, match="use Attach") as caught:
            stub.Generate(asked, timeout=PATIENCE)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    def test_another_request_of_the_same_name_already_exists(self, stub):
        list(stream(stub, detached("taken", sampling={"steps": 1})))
        other = detached("taken", sampling={"steps": 2})
        assert code_of(stream(stub, other)) == grpc.StatusCode.ALREADY_EXISTS
        with pytest.raises(grpc.RpcError, match="another job has the name taken; cancel it") as caught:
            stub.Generate(other, timeout=PATIENCE)
        assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS

    def test_a_request_id_alone_does_not_make_a_job_detached(self, stub):
        named = request(requestId="only-a-name", sampling={"steps": 1})
        first, second = (stub.Generate(named, timeout=PATIENCE) for _ in range(2))
        assert first.metadata.images[0].seed != second.metadata.images[0].seed, "each drew its own"
        assert code_of(attach(stub, "only-a-name")) == grpc.StatusCode.NOT_FOUND


class TestEnd:
    def test_cancel_frees_the_device_and_the_name_and_ends_attached_streams(self, server, stub):
        following = stream(stub, detached("unwanted", **LONG_JOB))
        first_step(following)
        cancel(stub, "unwanted")
        with pytest.raises(grpc.RpcError, match="the job unwanted was cancelled by another call") as ended:
            list(following)
        assert ended.value.code() == grpc.StatusCode.CANCELLED
        assert int(server.wait_for_log(r"unwanted: Cancelled after (\d+) model calls")[1]) < 100  # of 1209
        assert code_of(attach(stub, "unwanted")) == grpc.StatusCode.NOT_FOUND
        list(stream(stub, detached("unwanted", sampling={"steps": 1})))

    def test_by_default_a_job_ends_with_its_caller(self, server, stub):
        events = stream(stub, request(requestId="not-detached", **LONG_JOB))
        first_step(events)
        events.cancel()
        assert int(server.wait_for_log(r"not-detached: Cancelled after (\d+) model calls")[1]) < 100

    def test_the_deadline_of_the_first_call_is_the_jobs_and_is_reported_to_later_calls(self, start_server):
        server = start_server(program=("tests/support/faulty_server.py",)).wait_until_ready()
        with connect(server) as channel:
            stub = pb_grpc.TextToImageServiceStub(channel)
            asked = detached("too-late", sampling={"steps": 1})
            asked.data.prompt = "slow"
            assert code_of(stub.StreamGenerate(asked, timeout=5)) == grpc.StatusCode.DEADLINE_EXCEEDED
            server.wait_for_log("too-late: DeadlineExceeded after 1 model calls")
            assert code_of(attach(stub, "too-late")) == grpc.StatusCode.DEADLINE_EXCEEDED
            assert list(stream(stub, detached("too-late", sampling={"steps": 1}))), "the name is free again"

    def test_the_deadline_of_an_attach_call_is_its_own(self, stub):
        begun = stream(stub, detached("patient", **LONG_JOB))
        first_step(begun)
        late = stub.Attach(pb.AttachRequest(request_id="patient"), timeout=0.5)
        assert code_of(late) == grpc.StatusCode.DEADLINE_EXCEEDED
        assert next(begun).HasField("progress")
        cancel(stub, "patient")

    def test_a_slow_reader_loses_its_stream_but_not_the_job(self, start_server):
        server = start_server("--slow-reader-seconds", "1").wait_until_ready()
        asked = detached(
            "unread",
            parameter={"n": 8},
            sampling={"steps": 1, "guidanceScale": 1},
            output={"format": "FORMAT_PNG", "raw": True},
        )
        # Without probing, the client's window stays at the 64 KiB that HTTP/2 begins with.
        with connect(server, ("grpc.http2.bdp_probe", 0)) as channel, connect(server) as other:
            unread = stream(pb_grpc.TextToImageServiceStub(channel), asked)
            server.wait_for_log("unread: its stream is left unread")
            assert code_of(unread) == grpc.StatusCode.CANCELLED
            events = list(attach(pb_grpc.TextToImageServiceStub(other), "unread"))
            assert sum(event.HasField("choice") for event in events) == 8

    @pytest.mark.parametrize("flag", ["--retention-seconds", "--retention-bytes"])
    def test_without_retention_a_job_is_known_only_while_it_runs(self, start_server, flag: str):
        server = start_server(flag, "0").wait_until_ready()
        with connect(server) as channel:
            stub = pb_grpc.TextToImageServiceStub(channel)
            events = stream(stub, detached("brief", sampling={"steps": 5}))
            next(events)
            assert [event.WhichOneof("event") for event in attach(stub, "brief")][-1] == "done"
            assert [event.WhichOneof("event") for event in events][-1] == "done"
            assert code_of(attach(stub, "brief")) == grpc.StatusCode.NOT_FOUND

    def test_attach_works_while_the_server_drains(self, start_server):
        server = start_server().wait_until_ready()
        with connect(server) as channel:
            stub = pb_grpc.TextToImageServiceStub(channel)
            left = stream(stub, detached("drained", sampling={"steps": 60}))
            first_step(left)
            left.cancel()
            server.terminate()
            server.wait_for_log("draining")
            assert [event.WhichOneof("event") for event in attach(stub, "drained")][-2:] == ["choice", "done"]
        assert server.wait() == 0
        assert "drained: finished after" in server.log
        assert "Traceback" not in server.log

    def test_a_draining_server_waits_for_detached_jobs(self, start_server):
        server = start_server().wait_until_ready()
        with connect(server) as channel:
            events = stream(pb_grpc.TextToImageServiceStub(channel), detached("alone", sampling={"steps": 60}))
            first_step(events)
        server.terminate()
        assert server.wait() == 0
        assert "alone: finished after" in server.log

    def test_the_end_of_the_grace_period_ends_detached_jobs_too(self, start_server):
        server = start_server("--grace-seconds", "0").wait_until_ready()
        with connect(server) as channel:
            events = stream(pb_grpc.TextToImageServiceStub(channel), detached("cut-off", **LONG_JOB))
            first_step(events)
            events.cancel()
            server.terminate()
            assert server.wait() == 0
        assert "cut-off: Draining after" in server.log
        assert "Traceback" not in server.log


def test_a_priority_above_the_limit_is_lowered_with_a_warning_in_the_answer(stub):
    limits = stub.GetModel(pb.GetModelRequest(), timeout=9).limits
    assert (limits.max_priority, limits.retention.ToSeconds()) == (0, 600)
    answer = stub.Generate(request(priority=2, sampling={"steps": 5}), timeout=PATIENCE)
    assert [warning.code for warning in answer.metadata.warnings] == [pb.Warning.CODE_PRIORITY_LOWERED]
