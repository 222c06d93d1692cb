"""Security: TLS, tokens and safe flags, with real servers and certificates."""

import hashlib
import hmac
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from http2 import connected, first_byte
from outcomes import METHODS, ONE_STEP, check, code, outcome
from pydantic import ValidationError
from serving import LONG_JOB, PATIENCE, ROOT, SERVICE, ServerProcess, connect, first_step, request
from tls import LOCAL, Authority, channel, exchange

from server.api import auth, tls
from server.domain import Caller
from server.errors import CredentialsError
from server.settings import Settings
from text_to_image_client import TLS, AsyncTextToImage, ServingStatus, TextToImage, Unauthenticated
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
DETACH = {"onDisconnect": "ON_DISCONNECT_DETACH"}


def line(name: str, token: str, *limits: str) -> str:
    return " ".join([name, hashlib.sha256(token.encode()).hexdigest(), *limits]) + "\n"


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


@dataclass
class SecuredServer:
    """A server with every protection on, and the credentials for it."""

    server: ServerProcess
    authority: Authority
    own: tuple[Path, Path]
    tokens: Path

    def channel(self) -> grpc.Channel:
        return channel(self.server.target, self.authority.file, self.own)

    @property
    def health_target(self) -> str:
        return self.server.wait_for_log(r"health checks on (\S+)")[1]


TOKENS = (
    "# who may draw\n\n"
    + line("one", "token-of-one", "jobs=1  # one job at a time")
    + line("two", "token-of-two", "priority=2")
    + line("two", "next-token-of-two")
)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredServer]:
    authority = Authority(tmp_path_factory.mktemp("tls") / "ours")
    certificate, key = authority.issue("server", *LOCAL)
    own = authority.issue("client", "client@example.org")
    tokens = authority.folder / "tokens"
    tokens.write_text(TOKENS)
    server = ServerProcess(
        *("--tls-certificate", str(certificate), "--tls-key", str(key), "--tls-client-ca", str(authority.file)),
        *("--tokens", str(tokens), "--health-listen", "127.0.0.1:0"),
    )
    yield SecuredServer(server.wait_until_ready(), authority, own, tokens)
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log
    assert "token-of" not in server.log
    assert hashlib.sha256(b"token-of-one").hexdigest() not in server.log


@pytest.fixture
def stub(secured: SecuredServer) -> Iterator[pb_grpc.TextToImageServiceStub]:
    with secured.channel() as open_channel:
        yield pb_grpc.TextToImageServiceStub(open_channel)


class TestTls:
    def test_a_client_with_a_certificate_of_the_ca_is_served(self, secured):
        with secured.channel() as known:
            assert check(known, SERVICE) == SERVING

    @pytest.mark.parametrize("who", ["in plaintext", "without a certificate", "with one of another authority"])
    def test_other_clients_cannot_connect(self, secured, tmp_path, who):
        stranger = Authority(tmp_path / "others").issue("client", "client@example.org")
        stranded = {
            "in plaintext": lambda: connect(secured.server),
            "without a certificate": lambda: channel(secured.server.target, secured.authority.file),
            "with one of another authority": lambda: channel(secured.server.target, secured.authority.file, stranger),
        }
        with stranded[who]() as shut_out:
            assert code(lambda: check(shut_out)) == grpc.StatusCode.UNAVAILABLE

    def test_a_new_certificate_serves_the_next_connection_and_a_broken_one_is_ignored(self, secured):
        first = self.shown(secured)
        with secured.channel() as before:
            assert check(before) == SERVING
            certificate, key = secured.authority.issue("server", *LOCAL)
            second = self.shown(secured)
            assert second != first
            assert check(before) == SERVING, "a connection outlives its certificate"
        good = key.read_bytes()
        exchange(key, b"no key at all, but secret")
        assert self.shown(secured) == second
        logged = secured.server.wait_for_log(
            r"WARNING .*the changed certificates cannot be used, keeping the previous ones: (.*)"
        )
        assert logged[1] == f"{certificate} and {key} must be a certificate and its unencrypted key, in PEM"
        assert "secret" not in secured.server.log
        exchange(key, good)
        assert self.shown(secured) == second
        secured.authority.issue("server", *LOCAL)
        assert self.shown(secured) not in (first, second)

    def shown(self, secured: SecuredServer) -> str:
        """Return the serial number of the certificate that a new connection gets."""
        context = ssl.create_default_context(cafile=str(secured.authority.file))
        context.load_cert_chain(*secured.own)
        context.set_alpn_protocols(["h2"])
        host, _, port = secured.server.target.rpartition(":")
        with (
            socket.create_connection((host, int(port)), PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=host) as encrypted,
        ):
            return encrypted.getpeercert()["serialNumber"]

    @pytest.mark.parametrize(("version", "is_spoken"), [(b"\3\3", True), (b"\3\2", False)], ids=["1.2", "1.1"])
    def test_versions_before_tls_1_2_are_rejected(self, secured, version, is_spoken):
        """The hello is written by hand, since Python's ssl may not offer TLS 1.1 any more."""

        def counted(size: int, content: bytes) -> bytes:
            return len(content).to_bytes(size, "big") + content

        ciphers = b"\xc0\x2b\xc0\x09"  # ECDHE-ECDSA with AES 128: in GCM, and in CBC as TLS 1.1 has it
        extensions = (
            b"\0\x0a"
            + counted(2, counted(2, b"\0\x17"))  # the curve P-256
            + b"\0\x0d"
            + counted(2, counted(2, b"\4\3"))  # ECDSA with it
            + b"\0\x10"
            + counted(2, counted(2, counted(1, b"h2")))
        )
        hello = version + bytes(32) + b"\0" + counted(2, ciphers) + b"\1\0" + counted(2, extensions)
        with connected(secured.server.target, b"\x16\3\1" + counted(2, b"\1" + counted(3, hello))) as connection:
            reply = first_byte(connection)
        assert (reply == b"\x16") == is_spoken, "a handshake goes on, or is over"

    @pytest.mark.parametrize(
        ("broken", "words"),
        [
            ({"server.crt": None}, "cannot read .*server.crt: No such file"),
            ({"server.key": b""}, "must be a certificate and its unencrypted key"),
            ({"server.key": "other.key"}, "server.key is not the key of .*server.crt"),
            ({"server.key": "encrypted"}, "must be a certificate and its unencrypted key"),
            ({"authority": b"nothing"}, "must be certificates of authorities"),
        ],
    )
    def test_unusable_files_are_reported_with_the_reason(self, tmp_path, broken, words):
        authority = Authority(tmp_path / "ours")
        certificate, key = authority.issue("server", *LOCAL)
        authority.issue("other", *LOCAL)
        for name, content in broken.items():
            path = authority.folder / name
            if content is None:
                path.unlink()
            elif content == "encrypted":
                subprocess.run(
                    [
                        *"openssl pkcs8 -topk8 -passout pass:secret -in".split(),
                        key,
                        "-out",
                        authority.folder / "locked",
                    ],
                    check=True,
                )
                path.write_bytes((authority.folder / "locked").read_bytes())
            else:
                path.write_bytes((authority.folder / content).read_bytes() if isinstance(content, str) else content)
        wrong = Settings(tls_certificate=certificate, tls_key=key, tls_client_ca=authority.file)
        with pytest.raises(CredentialsError, match=words):
            tls.load_certificates(wrong)

    @pytest.mark.parametrize("wrong", ["certificates", "tokens"])
    def test_unusable_credentials_end_the_server_with_exit_code_7(self, start_server, tmp_path, wrong):
        (tmp_path / "empty").touch()
        empty = str(tmp_path / "empty")
        flags = ["--tls-certificate", empty, "--tls-key", empty] if wrong == "certificates" else ["--tokens", empty]
        server = start_server(*flags)
        assert server.wait() == 7
        assert empty in server.log
        assert "listening" not in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"tls_key": "k"}, "go together"),
        ({"tls_certificate": "c"}, "go together"),
        ({"tls_client_ca": "a"}, "needs --tls-certificate and --tls-key"),
        ({"tokens": "t", "listen": "0.0.0.0:50051"}, "anyone who reads a token can use it"),
        ({"tokens": "t", "listen": "[::]:50051"}, "anyone who reads a token can use it"),
        ({"tokens": "t", "listen": "example.org:50051"}, "anyone who reads a token can use it"),
        ({"plaintext_tokens": True}, "without --tokens"),
    ],
)
def test_incomplete_security_flags_are_rejected(flags, words):
    with pytest.raises(ValidationError, match=words):
        Settings(**flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"listen": "127.0.0.1:50051"},
        {"listen": "[::1]:50051"},
        {"listen": "localhost:50051"},
        {"listen": "0.0.0.0:50051", "tls_certificate": "c", "tls_key": "k"},
        {"listen": "0.0.0.0:50051", "plaintext_tokens": True},
    ],
)
def test_tokens_need_tls_loopback_or_an_explicit_flag(flags):
    assert Settings(tokens="t", **flags).tokens == Path("t")


@pytest.mark.slow
def test_libraries_send_no_telemetry(start_server, tmp_path: Path):
    server = start_server("--content-filter", "open-nsfw", HOME=str(tmp_path)).wait_until_ready()
    connections = psutil.Process(server.process.pid).net_connections("inet")
    assert {each.status for each in connections} == {psutil.CONN_LISTEN}
    assert list(tmp_path.rglob("*")) == [], "ONNX Runtime keeps a name of the machine for what it tells"


class TestHealthPort:
    def test_the_health_port_serves_health_alone_without_tls_or_token(self, secured):
        with grpc.insecure_channel(secured.health_target) as probe:
            assert check(probe) == check(probe, SERVICE) == SERVING
            for path in (*(f"/{SERVICE}/{method}" for method in METHODS), REFLECTION):
                assert code(lambda: probe.unary_unary(path)(b"")) == grpc.StatusCode.UNIMPLEMENTED  # noqa: B023

    def test_the_health_port_follows_the_server_from_loading_to_its_end(self, start_server):
        server = start_server("--health-listen", "127.0.0.1:0")
        with grpc.insecure_channel(server.wait_for_log(r"health checks on (\S+)")[1]) as probe:
            watch = health_pb2_grpc.HealthStub(probe).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            assert next(watch).status == NOT_SERVING
            assert next(watch).status == SERVING
            server.terminate()
            assert next(watch).status == NOT_SERVING
        assert server.wait() == 0

    def test_a_health_port_in_use_ends_the_server_with_exit_code_3(self, start_server, secured):
        server = start_server("--health-listen", secured.health_target)
        assert server.wait() == 3
        assert f"cannot listen on {secured.health_target}" in server.log


WRONG_TOKENS = {
    "none": [],
    "unknown": bearer("token-of-nobody"),
    "empty": bearer(""),
    "its digest": bearer(hashlib.sha256(b"token-of-one").hexdigest()),
    "cut short": bearer("token-of-on"),
    "with a space": bearer("token-of-one "),
    "another scheme": [("authorization", "Basic token-of-one")],
    "no scheme": [("authorization", "token-of-one")],
    "two": bearer("token-of-one") + bearer("token-of-two"),
    "elsewhere": [("token", "token-of-one")],
    "huge": bearer("x" * 7000),
}


class TestTokens:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_needs_a_token(self, secured, method):
        with secured.channel() as open_channel:
            call = open_channel.unary_stream(f"/{SERVICE}/{method}")
            ended = outcome(lambda: call(b"", timeout=PATIENCE))
        assert ended == (
            grpc.StatusCode.UNAUTHENTICATED,
            'a token is needed here: send it as metadata, "authorization: Bearer TOKEN"',
        )

    @pytest.mark.parametrize("wrong", WRONG_TOKENS.values(), ids=WRONG_TOKENS.keys())
    def test_a_wrong_token_is_unauthenticated_and_not_repeated(self, stub, wrong):
        ended, text = outcome(lambda: stub.GetModel(pb.GetModelRequest(), metadata=wrong, timeout=PATIENCE))
        assert ended == grpc.StatusCode.UNAUTHENTICATED
        assert "token-of" not in text

    def test_all_tokens_of_a_name_are_served(self, stub):
        for token in ("token-of-one", "token-of-two", "next-token-of-two"):
            assert code(lambda: stub.GetModel(pb.GetModelRequest(), metadata=bearer(token))) == grpc.StatusCode.OK  # noqa: B023

    def test_a_call_without_a_token_ends_before_its_message(self, secured):
        over = threading.Event()
        with secured.channel() as open_channel:
            call = open_channel.stream_unary(f"/{SERVICE}/Generate")
            silent = (b"" for _ in iter(lambda: over.wait(PATIENCE), True))
            assert code(lambda: call(silent, timeout=PATIENCE)) == grpc.StatusCode.UNAUTHENTICATED
        over.set()

    def test_health_and_reflection_need_no_token(self, secured):
        with secured.channel() as open_channel:
            assert check(open_channel, SERVICE) == SERVING
            reflected = reflection_pb2_grpc.ServerReflectionStub(open_channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=PATIENCE
            )
            assert SERVICE in {each.name for each in next(reflected).list_services_response.service}

    def test_every_token_is_compared(self, tmp_path, monkeypatch):
        (tmp_path / "tokens").write_text(TOKENS)
        gate = auth.TokenAuthInterceptor(tmp_path / "tokens")
        compared: list[bytes] = []
        real = hmac.compare_digest
        monkeypatch.setattr(hmac, "compare_digest", lambda known, given: compared.append(known) or real(known, given))
        for token in ("token-of-one", "next-token-of-two"):
            compared.clear()
            gate._authenticate(bearer(token))
            assert len(compared) == 3

    def test_a_detached_job_is_invisible_to_other_owners(self, stub):
        mine, other = bearer("token-of-one"), bearer("token-of-two")
        asked = request(requestId="private", **DETACH, **ONE_STEP)
        list(stub.StreamGenerate(asked, metadata=mine, timeout=PATIENCE))

        def attach(metadata, name="private"):
            return lambda: stub.Attach(pb.AttachRequest(request_id=name), metadata=metadata, timeout=PATIENCE)

        def cancel(metadata, name="private"):
            return lambda: stub.Cancel(pb.CancelRequest(request_id=name), metadata=metadata, timeout=PATIENCE)

        for call in (attach, cancel):
            found, never = outcome(call(other)), outcome(call(other, "never-was"))
            assert found[0] == grpc.StatusCode.NOT_FOUND
            assert found[1] == never[1].replace("never-was", "private"), "its existence must not be revealed"
        another = request("a dog", requestId="private", **DETACH, **ONE_STEP)
        assert code(lambda: stub.StreamGenerate(another, metadata=other, timeout=PATIENCE)) == grpc.StatusCode.OK
        assert code(cancel(other)) == grpc.StatusCode.OK
        assert code(attach(mine)) == grpc.StatusCode.OK
        assert code(cancel(mine)) == grpc.StatusCode.OK

    def test_the_job_limit_of_a_name_holds_for_all_of_its_connections(self, secured, stub):
        running = stub.StreamGenerate(request(requestId="the-only-one", **LONG_JOB), metadata=bearer("token-of-one"))
        first_step(running)
        with secured.channel() as elsewhere:
            again = pb_grpc.TextToImageServiceStub(elsewhere)
            ended, text = outcome(lambda: again.Generate(request(**ONE_STEP), metadata=bearer("token-of-one")))
            assert ended == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "1 requests of this caller are waiting already" in text
            served = code(lambda: again.Generate(request(**ONE_STEP), metadata=bearer("token-of-two")))
            assert served == grpc.StatusCode.OK, "another name has a turn, from the same host"
        running.cancel()
        secured.server.wait_for_log("the-only-one: Cancelled")

    def test_a_name_can_have_its_own_highest_priority(self, stub):
        for token, highest in (("token-of-two", 2), ("token-of-one", 0)):
            metadata = bearer(token)
            assert stub.GetModel(pb.GetModelRequest(), metadata=metadata).limits.max_priority == highest
            done = stub.Generate(request(priority=2, **ONE_STEP), metadata=metadata, timeout=PATIENCE)
            lowered = [each for each in done.metadata.warnings if each.code == pb.Warning.CODE_PRIORITY_LOWERED]
            assert len(lowered) == (highest < 2)

    def test_a_changed_token_file_is_reloaded_and_a_broken_one_is_ignored(self, secured, stub):
        def known(token: str) -> bool:
            ended = code(lambda: stub.GetModel(pb.GetModelRequest(), metadata=bearer(token), timeout=PATIENCE))
            return ended != grpc.StatusCode.UNAUTHENTICATED

        exchange(secured.tokens, line("three", "token-of-three").encode())
        assert (known("token-of-three"), known("token-of-one")) == (True, False)
        exchange(secured.tokens, TOKENS.encode() + b"four token-of-four-in-clear\n")
        assert (known("token-of-three"), known("token-of-one")) == (True, False)
        logged = secured.server.wait_for_log(
            "WARNING .*the changed tokens cannot be used, keeping the previous ones: (.*)"
        )[1]
        assert logged.startswith(f"line 6 of {secured.tokens} must be NAME SHA256")
        secured.tokens.unlink()
        assert known("token-of-three")
        exchange(secured.tokens, TOKENS.encode())
        assert (known("token-of-three"), known("token-of-one")) == (False, True)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("# nobody\n", "has no tokens"),
            (line("one", "a") + "two\n", "line 2 of .* must be NAME SHA256"),
            ("one token\n", "line 1 of"),
            (line("o/ne", "a"), "line 1 of"),
            (line("one", "a", "jobs=0"), "line 1 of"),
            (line("one", "a", "priority=3"), "line 1 of"),
            (line("one", "a", "jbos=1"), "line 1 of"),
            (line("one", "a") + line("two", "a"), "line 2 of .* has the token of an earlier line"),
        ],
    )
    def test_an_unusable_token_file_is_reported_with_its_line(self, tmp_path, content, words):
        (tmp_path / "tokens").write_text(content)
        with pytest.raises(CredentialsError, match=words):
            auth.TokenAuthInterceptor(tmp_path / "tokens")

    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/full"])
    def test_a_file_without_end_is_rejected(self, device):
        with pytest.raises(CredentialsError, match=f"{device} has more than 16777216 bytes"):
            auth.TokenAuthInterceptor(Path(device))
        with pytest.raises(CredentialsError, match=f"{device} has more than 16777216 bytes"):
            tls.load_certificates(Settings(tls_certificate=Path(device), tls_key=Path(device)))

    def test_the_commands_in_the_docs_make_usable_certificates_and_tokens(self, tmp_path):
        section = (ROOT / "docs/security.md").read_text("utf-8").split("## TLS and tokens")[1]
        commands = section.split("```sh\n")[1].split("```")[0]
        made = subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True, capture_output=True, text=True)
        files = {"tls_certificate": tmp_path / "server.crt", "tls_key": tmp_path / "server.key"}
        assert tls.server_credentials(tls.load_certificates(Settings(**files)), False) is not None
        caller = auth.TokenAuthInterceptor(tmp_path / "tokens")._authenticate(bearer(made.stdout.strip()))
        assert caller == Caller("alice", "alice", jobs=4, max_priority=1)


class TestClients:
    def test_the_python_client_uses_tls_and_a_token_in_every_call(self, secured):
        tls = TLS(secured.authority.file, *secured.own)
        with TextToImage(secured.server.target, tls=tls, token="token-of-two") as client:
            assert client.health() is ServingStatus.SERVING
            assert client.model().limits.max_priority == 2
            assert client.generate("a cat", steps=1).images
            with client.stream("a cat", steps=1, request_id="of-the-library", on_disconnect="detach") as events:
                list(events)
            assert list(client.attach("of-the-library"))
            client.cancel("of-the-library")

    async def test_the_asyncio_client_uses_tls_and_a_token_in_every_call(self, secured):
        tls = TLS(secured.authority.file, *secured.own)
        async with AsyncTextToImage(secured.server.target, tls=tls, token="token-of-two") as client:
            assert await client.health() is ServingStatus.SERVING
            assert (await client.model()).limits.max_priority == 2
            assert (await client.generate("a cat", steps=1)).images
            async with client.stream("a cat", steps=1, request_id="async-job", on_disconnect="detach") as events:
                assert [event async for event in events]
            assert [event async for event in client.attach("async-job")]
            await client.cancel("async-job")

    def test_a_wrong_or_missing_token_has_its_own_error(self, secured):
        for token in ("token-of-nobody", None):
            tls = TLS(secured.authority.file, *secured.own)
            with TextToImage(secured.server.target, tls=tls, token=token) as client, pytest.raises(Unauthenticated):
                client.model()

    def test_invalid_client_credentials_are_reported_at_once_and_not_repeated(self, secured):
        with pytest.raises(ValueError, match="go together"):
            TextToImage("x:1", tls=TLS(certificate=secured.own[0]))
        with pytest.raises(ValueError, match="visible ASCII") as caught:
            TextToImage("x:1", token="sécret")
        assert "cret" not in str(caught.value)

    def test_t2i_takes_flags_or_variables_and_never_repeats_the_token(self, secured, tmp_path):
        def t2i(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "text_to_image_client", "--target", secured.server.target, *arguments]
            ended = subprocess.run(
                command, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
            assert "token-of" not in ended.stdout + ended.stderr
            return ended

        authority, certificate, key = str(secured.authority.file), *map(str, secured.own)
        flags = ("--tls-ca", authority, "--tls-client-certificate", certificate, "--tls-client-key", key)
        variables = {
            "T2I_TLS_CA": authority,
            "T2I_TLS_CLIENT_CERTIFICATE": certificate,
            "T2I_TLS_CLIENT_KEY": key,
            "T2I_TOKEN": "token-of-two",
        }
        image = tmp_path / "cat.jpg"
        drawn = t2i("generate", "a cat", "--steps", "1", "-o", str(image), **variables)
        assert drawn.returncode == 0, drawn.stderr
        assert image.read_bytes()
        assert "SERVING" in t2i(*flags, "health").stdout
        assert "priority 2" in t2i(*flags, "--token", "token-of-two", "model").stdout
        refused = t2i(*flags, "--token", "token-of-nobody", "model")
        assert (refused.returncode, refused.stderr.strip()) == (11, "Error: this token is not known here")
        assert t2i("--tls-client-key", key, "health").returncode == 2
        assert t2i("--token", "token-of-two ", "health").returncode == 2
        assert t2i("--help", **variables).returncode == 0
