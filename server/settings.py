"""Every knob of the service: its flag, environment variable, default, range and meaning, declared once.

`--max-queue 8` on the command line is `T2I_MAX_QUEUE=8` in the environment; the flag wins. Without `--base` the
embedded mini ensemble is served; with `--base` alone, the base without a refiner.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from server.api import addresses
from server.engine.scheduling import QueueLimits
from server.errors import InvalidSettings

OPEN_NSFW = "open-nsfw"  # the content filter that is shipped
_HUGE = 2**53  # beyond it a float does not hold every whole number
_LONGEST_ECHO = 64  # characters of a value that is shown again
EMBEDDED = Path(__file__).resolve().parent.parent / "weights"


def _sizes(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d{1,4}x[1-9]\d{1,4}(,[1-9]\d{1,4}x[1-9]\d{1,4})*", value):
        raise ValueError("give sizes in pixels as WIDTHxHEIGHT,..., for example 1024x1024,1152x896")
    return value


def _filter(value: str) -> str:
    if value != OPEN_NSFW and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
        raise ValueError(f"give {OPEN_NSFW}, or MODULE:NAME of what makes a filter of your own")
    return value


def _name(value: str) -> str:
    if not (value.strip() and value.isprintable() and len(value) <= 128):
        raise ValueError("give a name of 1 to 128 characters, on one line")
    return value


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("must not be empty")  # which Path takes for the folder that the process is in
    return value


def _file(value: Path) -> Path:
    if not value.name:
        raise ValueError("must be the path of a file")
    return value


_Path = Annotated[Path, BeforeValidator(_not_empty)]


class Settings(BaseSettings):
    """Text to image over gRPC with the Stable Diffusion XL ensemble of experts.

    Every flag can be given as T2I_FLAG in the environment. SIGTERM drains and stops; SIGHUP reads tokens and
    certificates again or, when the terminal is gone, drains. Exit codes: 0 stopped when asked, 1 unexpected error, 2
    bad flags, 3 cannot listen, 4 cannot write the ready file, 5 the model makes no image, 6 the device does not answer
    any more, 7 certificates or tokens cannot be used, 8 no such content filter, 10 an incomplete checkpoint, 11 a
    checkpoint cloned without its weights, 12 a truncated weights file, 13 base and refiner mixed up, 14 not enough
    memory, 15 no such device, 16 other weights than named, 17 networks that cannot be compiled.
    """

    model_config = SettingsConfigDict(
        env_prefix="T2I_",
        frozen=True,
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        protected_namespaces=(),
    )

    listen: Annotated[str, AfterValidator(addresses.checked)] = Field(
        "127.0.0.1:50051",
        description="HOST:PORT or unix:PATH to serve on, or several with commas between; port 0 takes a free one, "
        "which is in --ready-file; who may write to a socket's file, by the umask, may call",
    )
    ready_file: Annotated[_Path, AfterValidator(_file)] | None = Field(
        None,
        description="write the bound addresses into this file, a line each, once the model is ready; removed at the "
        "end",
    )
    health_listen: Annotated[str, AfterValidator(addresses.checked)] | None = Field(
        None,
        description="HOST:PORT or unix:PATH for health checks alone, without TLS or tokens: for Kubernetes' gRPC "
        "probes",
    )
    tls_certificate: _Path | None = Field(
        None, description="certificate chain, PEM, to serve with TLS alone; read anew when it changes"
    )
    tls_key: _Path | None = Field(None, description="the certificate's key, PEM, not encrypted")
    tls_client_ca: _Path | None = Field(
        None, description="certificates of authorities, PEM; only clients with a certificate of theirs can connect"
    )
    tokens: _Path | None = Field(
        None,
        description="file of lines NAME SHA256; only calls with such a token are served; read anew when it changes",
    )
    plaintext_tokens: bool = Field(
        False, description="take tokens without TLS from other machines: for when a proxy in front of this does TLS"
    )
    max_concurrent_streams: int = Field(1000, ge=1, le=100_000, description="calls at once on one connection")
    max_connections: int = Field(500, ge=1, le=1_000_000, description="connections at once")
    max_connection_age_seconds: float = Field(
        3600, ge=1, le=86_400, description="after so long a client is asked to connect anew; its calls go on for a day"
    )
    keepalive_seconds: float = Field(
        60, ge=1, le=7200, description="after so long a silence a peer is asked whether it is there, and else let go"
    )
    base: _Path | None = Field(None, description="folder of the base expert in the diffusers layout; default: embedded")
    refiner: _Path | None = Field(
        None, description="folder of the refiner; default: embedded, or none when --base is given"
    )
    preview_decoder: _Path | None = Field(
        None,
        description="folder of a TAESD (diffusers' AutoencoderTiny) that draws previews; default: a fitted linear map",
    )
    model_name: Annotated[str, AfterValidator(_name)] | None = Field(
        None, description="name that clients see and may ask for; default: the checkpoint's own"
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = Field("auto", description="auto takes the first of cuda, mps, cpu")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="arithmetic of the networks; auto is bf16 on cuda, fp16 on mps, fp32 on cpu; fp8 is bf16 with "
        "most products in fp8, which Ada, Hopper and later have: faster, smaller, and not quite the same picture",
    )
    offload: bool = Field(
        False,
        description="keep on the device only the network that works and the others in the host's memory: slow, for a "
        "device that is too small",
    )
    scheduling_policy: Literal["shortest", "first-come"] = Field(
        "shortest",
        description="shortest: short requests and deadlines first, fair between callers, nobody waits for ever; "
        "first-come: each to its end in the order of arrival",
    )
    max_queue: int = Field(32, ge=1, le=10_000, description="requests admitted at once, the running one included")
    max_queue_per_caller: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="requests of one caller, a host or a token's name, admitted at once; default: --max-queue",
    )
    max_queue_pixels: int = Field(
        2**28, ge=4096, le=_HUGE, description="pixels of all images of the requests admitted at once"
    )
    max_queue_bytes: int = Field(
        2**30,
        ge=2**20,
        le=_HUGE,
        description="memory that the requests admitted at once may need for their images and latents",
    )
    max_batch: int = Field(
        1, ge=1, le=64, description="images that share a network call; every call then costs as much as a full one"
    )
    overlap: bool | None = Field(
        None,
        description="encode prompts and decode images beside the steps of other requests, which needs memory for both; "
        "default: on CUDA",
    )
    compile: Literal["auto", "off", "blocks"] = Field(
        "auto",
        description="how networks run: off: diffusers' own layers; blocks: fused layers, by Triton kernels and CUDA "
        "graphs on CUDA, by C++ kernels on an x86-64 CPU with AVX2 and FMA in fp32, else by torch.compile; auto: "
        "blocks on such a CPU if its kernels are there or can be built, which takes a second and a C++ compiler, else "
        "off",
    )
    compile_cache: _Path | None = Field(
        None, description="folder that keeps what is compiled, so that a later start takes it from there"
    )
    compile_while_serving: bool = Field(
        False,
        description="CUDA only: serve as soon as the weights are loaded and compile at the same time, which needs "
        "memory for both; until then images are slower and can differ in their last bits, each made in one way from "
        "beginning to end",
    )
    compile_sizes: Annotated[str, AfterValidator(_sizes)] | None = Field(
        None,
        description="WIDTHxHEIGHT,...: sizes that are compiled; other sizes run eagerly, but for the C++ kernels of a "
        "CPU, which are for all sizes; default: the size the model was trained on",
    )
    device_timeout_seconds: float = Field(
        300,
        gt=0,
        le=86_400,
        description="after so long in one call of the model the device is given up, and the server with it",
    )
    max_images: int = Field(8, ge=1, le=64, description="largest n of a request")
    max_steps: int = Field(150, ge=1, le=1000, description="largest number of denoising steps of a request")
    max_prompt_characters: int = Field(10_000, ge=1, le=1_000_000, description="longest prompt, in characters")
    max_pixels: int | None = Field(
        None,
        ge=4096,
        le=_HUGE,
        description="largest width x height; default: four times the area the model was trained on",
    )
    max_priority: int = Field(
        0, ge=-2, le=2, description="highest priority of a request; a higher one is lowered to it"
    )
    content_filter: Annotated[str, AfterValidator(_filter)] | None = Field(
        None,
        description="what judges images before they are sent: open-nsfw, of the extra [filter], or MODULE:NAME of what "
        "makes another; an image that it objects to becomes plain grey, and there are no previews; default: none",
    )
    content_filter_threshold: float = Field(
        0.8, gt=0, le=1, description="score, 0 to 1, from which on the content filter objects to an image"
    )
    grace_seconds: float = Field(
        30, ge=0, le=3600, description="how long running jobs may go on after SIGTERM before they are ended"
    )
    slow_reader_seconds: float = Field(
        30, gt=0, le=3600, description="how long a client may leave its stream unread before the call is ended"
    )
    heartbeat_seconds: float = Field(
        15,
        ge=0,
        le=3600,
        description="after so long a silence a stream repeats its newest queued or progress event, so that proxies do "
        "not end it; 0 for never",
    )
    retention_seconds: float = Field(600, ge=0, le=86_400, description="how long a detached job is kept after its end")
    retention_bytes: int = Field(
        256 * 1024 * 1024,
        ge=0,
        le=_HUGE,
        description="memory for detached jobs that have ended; the oldest are forgotten beyond it",
    )
    reflection: bool = Field(True, description="gRPC reflection, so that grpcurl needs no proto file")
    kserve: bool = Field(False, description="serve the Open Inference Protocol, version 2, too, as KServe does")
    instill: bool = Field(
        False,
        description="serve what Instill Core calls its models by, too, and of its public API what draws with them",
    )
    channelz: bool = Field(False, description="gRPC channelz: what connections and sockets are doing, for debugging")
    metrics_listen: Annotated[str, AfterValidator(addresses.checked_port)] | None = Field(
        None, description="HOST:PORT to tell Prometheus metrics on; port 0 takes a free one and tells it in the log"
    )
    log_format: Literal["text", "json"] = Field("text", description="how a line of the log is written")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    @model_validator(mode="after")
    def _contradicts_nothing(self) -> Self:
        if problems := list(self._contradictions()):
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        """A sentence for each group of flags that do not go together. `read` puts the names that were typed."""
        if self.refiner is not None and self.base is None:
            yield "--refiner was given without --base; give both folders, or neither"
        asked = self.compile_while_serving or self.compile_sizes is not None
        if (asked and self.compile == "auto") or (self.compile == "off" and (asked or self.compile_cache is not None)):
            yield "--compile-cache, --compile-while-serving and --compile-sizes are for --compile blocks"
        if self.offload and (self.compile not in ("auto", "off") or self.overlap):
            yield "--offload moves networks about, so leave --compile off, and --overlap too"
        if (self.tls_certificate is None) != (self.tls_key is None):
            yield "--tls-certificate and --tls-key go together; give both files, or neither"
        if self.tls_client_ca is not None and self.tls_certificate is None:
            yield "--tls-client-ca needs --tls-certificate and --tls-key"
        exposed = self.tls_certificate is None and not addresses.are_local(self.listen)
        if self.tokens is not None and exposed and not self.plaintext_tokens:
            yield (
                "--tokens on an address other than loopback needs --tls-certificate and --tls-key, since whoever "
                "hears a token can use it; or --plaintext-tokens, if a proxy in front of this does TLS"
            )
        if self.plaintext_tokens and self.tokens is None:
            yield "--plaintext-tokens was given without --tokens"

    @property
    def queue(self) -> QueueLimits:
        """What may be admitted at once."""
        return QueueLimits(
            jobs=self.max_queue,
            jobs_per_caller=self.max_queue_per_caller or self.max_queue,
            pixels=self.max_queue_pixels,
            bytes=self.max_queue_bytes,
        )

    @property
    def sizes_to_compile(self) -> list[tuple[int, int]]:
        """Width and height of the images that are compiled for; none for the default."""
        sizes = (size.split("x") for size in (self.compile_sizes or "").split(",") if size)
        return [(int(width), int(height)) for width, height in sizes]

    @property
    def experts(self) -> tuple[Path, Path | None]:
        """The folders of the base and the refiner to be served."""
        if self.base is None:
            return EMBEDDED / "base", EMBEDDED / "refiner"
        return self.base, self.refiner


def read(arguments: Sequence[str] = ()) -> Settings:
    """Read the settings from flags and from T2I_... variables. Raises InvalidSettings; --help ends the process."""
    try:
        return Settings(_cli_parse_args=list(arguments), _cli_exit_on_error=False)
    except SettingsError as error:
        words = "".join(
            c if c.isprintable() else ascii(c)[1:-1] for c in str(error).removeprefix("error parsing CLI: ")
        )
        raise InvalidSettings([f"{_shortened(words, 4 * _LONGEST_ECHO)}; --help lists the flags"]) from error
    except ValidationError as error:
        raise InvalidSettings([words for each in error.errors() for words in _words(each, arguments)]) from error


def _words(error: Any, arguments: Sequence[str]) -> list[str]:
    """What is wrong with one field, or with several together, in words of our own."""
    context = error.get("ctx", {})
    bounds = {name: str(bound).removesuffix(".0") for name, bound in context.items()}
    if not error["loc"]:
        names = re.compile("|".join(f"--{field.replace('_', '-')}(?![a-z-])" for field in Settings.model_fields))
        problems = str(context["error"]).split("\n")
        return [names.sub(lambda found: _typed(found[0], arguments), each) for each in problems]
    match error["type"]:
        case "int_parsing" | "int_parsing_size" | "int_from_float" | "int_type":
            words = "must be a whole number"
        case "float_parsing" | "float_type":
            words = "must be a number"
        case "bool_parsing" | "bool_type":
            words = "must be true or false"
        case "greater_than_equal":
            words = f"must be at least {bounds['ge']}"
        case "less_than_equal":
            words = f"must be at most {bounds['le']}"
        case "greater_than":
            words = f"must be above {bounds['gt']}"
        case "literal_error":
            words = f"must be one of {context['expected'].replace(chr(39), '').replace(' or ', ', ')}"
        case "string_unicode":
            words = "must be text in UTF-8"
        case "value_error":
            words = str(context["error"])
        case _:
            words = error["msg"]
    given = error["input"]
    echo = f", is {_shortened(ascii(given), _LONGEST_ECHO)}" if isinstance(given, str) and given else ""
    return [f"{_typed(_flag(str(error['loc'][0])), arguments)}: {words}{echo}"]


def _typed(flag: str, arguments: Sequence[str]) -> str:
    """The flag, or the variable in its place if that was given."""
    typed = {each.partition("=")[0] for each in arguments}
    variable = f"T2I_{flag.removeprefix('--').replace('-', '_').upper()}"
    if flag in typed or f"--no-{flag.removeprefix('--')}" in typed:
        return flag
    return next((name for name in os.environ if name.upper() == variable), flag)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
