"""Every setting of the server, declared once: its flag, environment variable, default, range and meaning.

`--max-queue 8` on the command line is `T2I_MAX_QUEUE=8` in the environment; the flag wins. Without `--base` the server
loads the embedded ensemble; with `--base` alone, the base without a refiner.
"""

import difflib
import os
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

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
        raise ValueError(f"give {OPEN_NSFW}, or MODULE:NAME of a function that creates a filter")
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

    Each flag is also an environment variable: --max-queue is T2I_MAX_QUEUE. SIGTERM drains and stops. SIGHUP reloads
    tokens and certificates, or drains if the terminal is gone. Exit codes: 0 stopped when asked, 1 unexpected error, 2
    bad flags, 3 cannot listen, 4 cannot write the ready file, 5 the model makes no image, 6 the device does not answer
    any more, 7 certificates or tokens cannot be used, 8 no such content filter, 10 a missing or incomplete checkpoint,
    11 a checkpoint cloned without its weights, 12 a truncated weights file, 13 base and refiner mixed up, 14 not enough
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

    # Network. GROUPS, below, has the headings in --help.

    listen: Annotated[str, AfterValidator(addresses.checked)] = Field(
        "127.0.0.1:50051",
        description="Addresses to serve on, HOST:PORT or unix:PATH, separated by commas. Port 0 picks a free port, "
        "which --ready-file names. The umask decides who may call a Unix socket.",
    )
    ready_file: Annotated[_Path, AfterValidator(_file)] | None = Field(
        None,
        description="File to write the bound addresses to, one a line, once health is SERVING. It is removed at exit.",
    )
    health_listen: Annotated[str, AfterValidator(addresses.checked)] | None = Field(
        None,
        description="HOST:PORT or unix:PATH that serves only health checks, without TLS and tokens, for Kubernetes' "
        "gRPC probes.",
    )
    tls_certificate: _Path | None = Field(
        None, description="Certificate chain in PEM. The server then accepts only TLS, and reloads the file on change."
    )
    tls_key: _Path | None = Field(None, description="Private key of the certificate in PEM, not encrypted.")
    tls_client_ca: _Path | None = Field(
        None, description="CA certificates in PEM. Only clients with a certificate of these CAs can connect."
    )
    tokens: _Path | None = Field(
        None,
        description="File of lines NAME SHA256. Calls need one of these tokens. The file is reloaded on change.",
    )
    plaintext_tokens: bool = Field(
        False, description="Accept tokens without TLS from other machines, if a proxy in front terminates TLS."
    )
    max_concurrent_streams: int = Field(1000, ge=1, le=100_000, description="Maximum number of calls per connection.")
    max_connections: int = Field(500, ge=1, le=1_000_000, description="Maximum number of connections.")
    max_connection_age_seconds: float = Field(
        3600,
        ge=1,
        le=86_400,
        description="Age at which the server asks a client to reconnect. Calls in flight may go on for a day.",
    )
    keepalive_seconds: float = Field(
        60,
        ge=1,
        le=7200,
        description="Idle time after which a connection is pinged. It is closed if the ping is not answered.",
    )
    slow_reader_seconds: float = Field(
        30, gt=0, le=3600, description="Time a client may leave its stream unread before the call ends."
    )
    heartbeat_seconds: float = Field(
        15,
        ge=0,
        le=3600,
        description="Idle time after which a stream repeats its last queued or progress event, so that proxies keep it "
        "open. 0 disables it.",
    )
    reflection: bool = Field(True, description="Serve gRPC reflection, so that grpcurl needs no proto files.")
    kserve: bool = Field(False, description="Also serve the Open Inference Protocol v2, as KServe and Triton do.")
    instill: bool = Field(
        False,
        description="Also serve the services by which Instill Core calls its models, and the image generation of its "
        "public API.",
    )

    # Model.

    base: _Path | None = Field(
        None, description="Folder of the base expert in the diffusers layout. Default: the embedded ensemble."
    )
    refiner: _Path | None = Field(
        None, description="Folder of the refiner. Default: the embedded one, or none if --base is given."
    )
    preview_decoder: _Path | None = Field(
        None,
        description="Folder of a TAESD (diffusers' AutoencoderTiny) that decodes previews. Default: a fitted linear "
        "map.",
    )
    model_name: Annotated[str, AfterValidator(_name)] | None = Field(
        None, description="Name of the model in the API. Default: the checkpoint's own."
    )
    content_filter: Annotated[str, AfterValidator(_filter)] | None = Field(
        None,
        description="Filter of finished images: open-nsfw, of the extra [filter], or MODULE:NAME of a function that "
        "creates one. A rejected image becomes plain grey, and there are no previews. Default: none.",
    )
    content_filter_threshold: float = Field(
        0.8, gt=0, le=1, description="Score, 0 to 1, at which the content filter rejects an image."
    )

    # Speed.

    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        "auto", description="Device of the networks. auto: the first available of cuda, mps, cpu."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="Precision of the networks. auto: bf16 on cuda, fp16 on mps, fp32 on cpu. fp8: bf16 with most "
        "matrix products in fp8, on GPUs from Ada and Hopper on; faster and smaller, with slightly different images.",
    )
    offload: bool = Field(
        False,
        description="Keep only the running network on the device and the others in host memory. Slow, for a device "
        "with too little memory.",
    )
    compile: Literal["auto", "off", "blocks"] = Field(
        "auto",
        description="How to accelerate the networks. off: diffusers' own layers. blocks: fused kernels (Triton and "
        "CUDA graphs on CUDA, C++ on x86-64 CPUs with AVX2 and FMA in fp32), elsewhere torch.compile. auto: blocks on "
        "such a CPU if its kernels are prebuilt or a C++ compiler can build them, which takes a second, otherwise off.",
    )
    compile_cache: _Path | None = Field(
        None, description="Folder that keeps compiled code, so that later starts load it instead of compiling."
    )
    compile_while_serving: bool = Field(
        False,
        description="CUDA only: serve eager networks as soon as the weights are loaded, and compile at the same time, "
        "with memory for both. Until then images are slower and can differ in their last bits; none mixes the two.",
    )
    compile_sizes: Annotated[str, AfterValidator(_sizes)] | None = Field(
        None,
        description="Sizes to compile, WIDTHxHEIGHT,... Other sizes run eagerly; a CPU's C++ kernels run all sizes. "
        "Default: the size the model was trained on.",
    )
    overlap: bool | None = Field(
        None,
        description="Encode prompts and decode images while other requests denoise, with memory for both. Default: on "
        "CUDA.",
    )
    max_batch: int = Field(
        1,
        ge=1,
        le=64,
        description="Maximum number of images per network call. With more than 1, every call is padded to that many "
        "images and costs as much.",
    )
    device_timeout_seconds: float = Field(
        300, gt=0, le=86_400, description="Time after which a model call counts as hung and the server exits."
    )

    # Limits.

    scheduling_policy: Literal["shortest", "first-come"] = Field(
        "shortest",
        description="Order of the queue. shortest: short jobs and deadlines first, fair between callers, with bounded "
        "waiting. first-come: one job after the other in order of arrival.",
    )
    max_queue: int = Field(
        32, ge=1, le=10_000, description="Maximum number of admitted requests, including the running one."
    )
    max_queue_per_caller: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Maximum number of admitted requests per caller, which is a host or a token's name. Default: "
        "--max-queue.",
    )
    max_queue_pixels: int = Field(
        2**28, ge=4096, le=_HUGE, description="Maximum number of pixels in all images of admitted requests."
    )
    max_queue_bytes: int = Field(
        2**30,
        ge=2**20,
        le=_HUGE,
        description="Maximum memory, in bytes, for images and latents of admitted requests.",
    )
    max_images: int = Field(8, ge=1, le=64, description="Maximum n of a request.")
    max_steps: int = Field(150, ge=1, le=1000, description="Maximum number of denoising steps of a request.")
    max_prompt_characters: int = Field(
        10_000, ge=1, le=1_000_000, description="Maximum length of a prompt in characters."
    )
    max_pixels: int | None = Field(
        None,
        ge=4096,
        le=_HUGE,
        description="Maximum width x height. Default: four times the area the model was trained on.",
    )
    max_priority: int = Field(
        0, ge=-2, le=2, description="Maximum priority of a request. A higher one is lowered to it."
    )

    # Jobs.

    grace_seconds: float = Field(
        30, ge=0, le=3600, description="Time that running jobs may take after SIGTERM before they end with an error."
    )
    retention_seconds: float = Field(
        600, ge=0, le=86_400, description="Time that a detached job is retained after its end."
    )
    retention_bytes: int = Field(
        256 * 1024 * 1024,
        ge=0,
        le=_HUGE,
        description="Maximum memory, in bytes, for ended detached jobs. Above it the oldest are dropped.",
    )

    # Observability.

    metrics_listen: Annotated[str, AfterValidator(addresses.checked_port)] | None = Field(
        None,
        description="HOST:PORT that serves Prometheus metrics. Port 0 picks a free port, which the log names.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Format of the log, which goes to stderr.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level to log.")
    channelz: bool = Field(False, description="Serve gRPC channelz, for debugging connections and sockets.")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        checks = self._check_experts, self._check_compile_flags, self._check_tls, self._check_token_transport
        if problems := [problem for check in checks for problem in check()]:
            raise ValueError("\n".join(problems))
        return self

    # Each check yields a sentence for each conflict of flags. `read` replaces flags by the variables that were set.

    def _check_experts(self) -> Iterator[str]:
        if self.refiner is not None and self.base is None:
            yield "--refiner was given without --base; give both folders, or neither"

    def _check_compile_flags(self) -> Iterator[str]:
        asked = self.compile_while_serving or self.compile_sizes is not None
        if (asked and self.compile == "auto") or (self.compile == "off" and (asked or self.compile_cache is not None)):
            yield "--compile-cache, --compile-while-serving and --compile-sizes are for --compile blocks"
        if self.offload and (self.compile not in ("auto", "off") or self.overlap):
            yield "--offload moves the networks, so it excludes --compile blocks and --overlap"

    def _check_tls(self) -> Iterator[str]:
        if (self.tls_certificate is None) != (self.tls_key is None):
            yield "--tls-certificate and --tls-key go together; give both files, or neither"
        if self.tls_client_ca is not None and self.tls_certificate is None:
            yield "--tls-client-ca needs --tls-certificate and --tls-key"

    def _check_token_transport(self) -> Iterator[str]:
        exposed = self.tls_certificate is None and not addresses.are_local(self.listen)
        if self.tokens is not None and exposed and not self.plaintext_tokens:
            yield (
                "--tokens on an address other than loopback needs --tls-certificate and --tls-key, since anyone who "
                "reads a token can use it; or --plaintext-tokens, if a proxy in front of this does TLS"
            )
        if self.plaintext_tokens and self.tokens is None:
            yield "--plaintext-tokens was given without --tokens"

    @property
    def queue(self) -> QueueLimits:
        """The limits of the queue."""
        return QueueLimits(
            jobs=self.max_queue,
            jobs_per_caller=self.max_queue_per_caller or self.max_queue,
            pixels=self.max_queue_pixels,
            bytes=self.max_queue_bytes,
        )

    @property
    def sizes_to_compile(self) -> list[tuple[int, int]]:
        """The width and height of each size to compile; empty for the default."""
        sizes = (size.split("x") for size in (self.compile_sizes or "").split(",") if size)
        return [(int(width), int(height)) for width, height in sizes]

    @property
    def experts(self) -> tuple[Path, Path | None]:
        """The folders of the base and of the refiner, if there is one."""
        if self.base is None:
            return EMBEDDED / "base", EMBEDDED / "refiner"
        return self.base, self.refiner


GROUPS = {
    "listen": "network",
    "base": "model",
    "device": "speed",
    "scheduling_policy": "limits",
    "grace_seconds": "jobs",
    "metrics_listen": "observability",
}
"""The groups of settings, by their first one."""


def read(arguments: Sequence[str] = ()) -> Settings:
    """Read the settings from flags and T2I_... variables. --help ends the process. Raises InvalidSettings."""
    try:
        source = CliSettingsSource[Any](Settings, add_argument_method=_grouped(), cli_exit_on_error=False)
        return Settings(_cli_settings_source=source(args=list(arguments)))
    except SettingsError as error:
        words = "".join(
            c if c.isprintable() else ascii(c)[1:-1] for c in str(error).removeprefix("error parsing CLI: ")
        )
        words = _shortened(words, 4 * _LONGEST_ECHO)
        raise InvalidSettings([f"{words}{_unknown_flags(arguments)}; --help lists the flags"]) from error
    except ValidationError as error:
        raise InvalidSettings([words for each in error.errors() for words in _words(each, arguments)]) from error


def _grouped() -> Callable[..., None]:
    """Return an `ArgumentParser.add_argument` that opens a group of GROUPS with its first flag."""
    group: Any = None

    def add_argument(parser: ArgumentParser, *names: str, **options: Any) -> None:
        nonlocal group
        if title := GROUPS.get(options.get("dest", "")):
            group = parser.add_argument_group(title)
        if field := Settings.model_fields.get(options.get("dest", "")):
            default = default_text(field.default)
            options["help"] = f"{field.description} Default: {default}." if default else field.description
            if metavar := options.get("metavar"):
                options["metavar"] = _metavar(options["dest"], metavar)
        (group or parser).add_argument(*names, **options)

    return add_argument


def default_text(default: Any) -> str:
    """Return a default as the help text and the documentation show it; empty for None."""
    match default:
        case None:
            return ""
        case bool():
            return "on" if default else "off"
        case _:
            return str(default)


def _metavar(field: str, kind: str) -> str:
    """Return the placeholder of a flag's value for --help, or `kind` if that lists the choices."""
    if kind not in ("int", "float", "str", "Path"):
        return kind
    last_word = field.rpartition("_")[2].upper()
    return {"int": "N", "Path": "PATH"}.get(kind, "ADDRESS" if last_word == "LISTEN" else last_word)


# Variables of the client, which has the same prefix.
_CLIENT_VARIABLES = frozenset(
    {"T2I_TARGET", "T2I_TOKEN", "T2I_TLS", "T2I_TLS_CA", "T2I_TLS_CLIENT_CERTIFICATE", "T2I_TLS_CLIENT_KEY"}
)


def unknown_variables() -> list[str]:
    """Return the T2I_... variables that are set and that neither the server nor the client reads, sorted.

    Each comes with the name that was probably meant, if one is near.
    """
    known = {f"T2I_{field.upper()}" for field in Settings.model_fields} | _CLIENT_VARIABLES
    unknown = sorted(name for name in os.environ if name.upper().startswith("T2I_") and name.upper() not in known)
    return [f"{name}{_suggestion(name.upper(), known)}" for name in unknown]


def _unknown_flags(arguments: Sequence[str]) -> str:
    """Return suggestions for flags that are near a known one."""
    flags = {_flag(field) for field in Settings.model_fields}
    flags |= {f"--no-{flag.removeprefix('--')}" for flag in flags}
    typed = (each.partition("=")[0] for each in arguments if each.startswith("--"))
    return "".join(_suggestion(each, flags) for each in typed if each not in flags)


def _suggestion(name: str, known: Iterable[str]) -> str:
    """Return the name that was probably meant, as an insertion for a message; empty if none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
    return f" (did you mean {near[0]}?)" if near else ""


def _words(error: Any, arguments: Sequence[str]) -> list[str]:
    """Describe an error of one field, or of several together, in one sentence for each problem."""
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
    """Return the flag, or its variable if that was set instead."""
    typed = {each.partition("=")[0] for each in arguments}
    variable = f"T2I_{flag.removeprefix('--').replace('-', '_').upper()}"
    if flag in typed or f"--no-{flag.removeprefix('--')}" in typed:
        return flag
    return next((name for name in os.environ if name.upper() == variable), flag)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
