"""`t2i generate`, `t2i attach` and `t2i cancel`: draw images, now or as a detached job."""

import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import click

from .._exceptions import AlreadyExists
from .._provenance import Provenance
from .._types import Format, OnDisconnect, Request
from ._group import NotReproduced, Seconds, connect, say, target_option
from ._results import follow, report

_metadata_option = click.option(
    "--metadata",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the metadata to this JSON file, for --like.",
)
_timeout_option = click.option("--timeout", type=Seconds(), help="Give up after this many seconds.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the metadata to stdout.")


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The image file; required unless --detach."
)
@click.option("--negative-prompt", help="Text to steer away from.")
@click.option("--aspect-ratio", help='Width to height, for example "16:9".  [default: 1:1]')
@click.option(
    "-n", "--n", type=int, help="Number of images. Several are named by number: -o cat.jpg writes cat-0.jpg, cat-1.jpg."
)
@click.option("--seed", type=int, help="Image k has the seed `seed + k`.  [default: random, printed with the image]")
@click.option("--steps", type=int, help="Denoising steps of both experts together.")
@click.option("--guidance-scale", type=float, help="Weight of classifier-free guidance, 0 to 50; 1 or less: none.")
@click.option("--high-noise-frac", type=float, help="The base's share of the schedule; 1 turns the refiner off.")
@click.option("--scheduler", help="One of those that `t2i model` lists.")
@click.option("--width", type=int, help="Pixels; with --height, instead of --aspect-ratio.")
@click.option("--height", type=int, help="Pixels; with --width.")
@click.option(
    "--format",
    "format_",
    type=click.Choice([each.value for each in Format]),
    help="The image format.  [default: by the ending of -o]",
)
@click.option("--quality", type=int, help="Quality of lossy formats, 1 to 100.  [default: 95]")
@click.option(
    "--like",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Reproduce the images of a --metadata file, byte for byte. Other options change its request.",
)
@click.option("--image", "index", type=int, help="With --like: only image K, counted from 0.", metavar="K")
@click.option("--strict", is_flag=True, help="With --like: exit with 8, instead of a warning, if the result differs.")
@click.option("--priority", type=int, help="-2 to 2; each step up counts as if the job were four times shorter.")
@click.option(
    "--preview",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A .jpg file that each preview of the unfinished image overwrites.",
)
@click.option(
    "--preview-interval",
    type=click.IntRange(min=1),
    help="With --preview: U-Net calls between previews.  [default: 5]",
)
@click.option("--detach", is_flag=True, help="Only start the job and print its name for `t2i attach` and `t2i cancel`.")
@click.option("--request-id", help="The name of the request.  [default: random]")
@_metadata_option
@_timeout_option
@_json_option
@target_option
def generate(
    target: str,
    prompt: str | None,
    output: Path | None,
    format_: str | None,
    like: Path | None,
    index: int | None,
    strict: bool,
    preview: Path | None,
    preview_interval: int | None,
    detach: bool,
    metadata: Path | None,
    timeout: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw PROMPT, or the images of a --like file, and save them.

    Options without a default here have the model's: see `t2i model`.
    """
    if prompt is None and like is None:
        raise click.UsageError("give a PROMPT, or --like with a metadata file")
    if like is None and (index is not None or strict):
        raise click.UsageError("--image and --strict go with --like")
    if detach and (strict or preview or metadata or as_json):
        raise click.UsageError("--detach only starts the job: it takes no --strict, --preview, --metadata and --json")
    if preview is None and preview_interval is not None:
        raise click.UsageError("--preview-interval goes with --preview")
    if preview is not None:
        if Format.of(preview) is not Format.JPEG:
            raise click.BadParameter(f"{preview.name} must end in .jpg", param_hint="--preview")
        options["preview_interval"] = preview_interval or 5
    _check_folders({"-o": output, "--preview": preview, "--metadata": metadata})
    _check_overwriting(metadata, None if like else options["n"] or 1, {"-o": output, "--preview": preview})
    saved = Provenance.load(like) if like is not None else None
    options["format"] = _format_for(output, format_, saved.request(index).get("format") if saved else None)
    if saved:
        request = saved.request(index, prompt=prompt, **options)
    else:
        request = cast("Request", {**options, "prompt": prompt})
    if detach:
        _start_detached(target, timeout, request, output)
        return
    if output is None:
        raise click.MissingParameter(param_hint="'-o' / '--output'", param_type="option")
    with connect(target) as client, client.stream(timeout=timeout, **request) as events:
        result = follow(events, output, request.get("n") or 1, preview)
    report(result, metadata, as_json)
    if saved is not None:
        _report_differences(saved.differences(result), f"this differs from {like}", strict)


def _start_detached(target: str, timeout: float | None, request: Request, output: Path | None) -> None:
    """Start the job, print its name to stdout, and the commands that follow and end it to stderr."""
    name = request.get("request_id") or str(uuid.uuid4())
    detached = cast("Request", {**request, "request_id": name, "on_disconnect": OnDisconnect.DETACH})
    with connect(target) as client, client.stream(timeout=timeout, **detached) as events:
        try:
            next(events)  # the first event follows admission
        except AlreadyExists as error:
            raise AlreadyExists(
                f"another job has the name {name}; end it with `t2i --target {target} cancel {name}`, "
                "or use another --request-id",
                error.code,
            ) from error
    click.echo(name)
    say(f"t2i --target {target} attach {name} -o {output or 'FILE'}  # follows it and saves its images")
    say(f"t2i --target {target} cancel {name}  # ends it")


def _report_differences(differences: Sequence[str], headline: str, strict: bool) -> None:
    """Print the differences as a warning, or raise NotReproduced if `strict`."""
    text = "\n  ".join([headline, *differences])
    if differences and strict:
        raise NotReproduced(text)
    if differences:
        say(f"Warning: {text}", "yellow")


@click.command()
@click.argument("name")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The image file. Several are named by number: -o cat.jpg writes cat-0.jpg, cat-1.jpg.",
)
@_metadata_option
@_timeout_option
@_json_option
@target_option
def attach(target: str, name: str, output: Path, metadata: Path | None, timeout: float | None, as_json: bool) -> None:
    """Follow the detached job NAME from its beginning, and save its images at its end.

    When this command ends early, the job continues.
    """
    _format_for(output, None)
    _check_folders({"-o": output, "--metadata": metadata})
    _check_overwriting(metadata, None, {"-o": output})
    with connect(target) as client, client.attach(name, timeout=timeout) as events:
        result = follow(events, output, None)
    report(result, metadata, as_json)


@click.command()
@click.argument("name")
@click.option("--timeout", type=Seconds(), default=5.0, show_default=True, help="Seconds.")
@target_option
def cancel(target: str, name: str, timeout: float) -> None:
    """End the detached job NAME, or delete its images if it has ended."""
    with connect(target) as client:
        client.cancel(name, timeout=timeout)


def _check_folders(files: Mapping[str, Path | None]) -> None:
    for option, file in files.items():
        if file is not None and not file.parent.is_dir():
            raise click.BadParameter(f"there is no folder {file.parent}", param_hint=option)


def _check_overwriting(metadata: Path | None, n: int | None, images: Mapping[str, Path | None]) -> None:
    """Check that the metadata, which are written last, do not overwrite an image. `n` is None if it is unknown."""
    for option, path in images.items():
        if metadata is None or path is None:
            continue
        is_numbered = (
            n != 1 and re.fullmatch(re.escape(path.stem) + r"-\d+", metadata.stem) and metadata.suffix == path.suffix
        )
        same_folder = metadata.parent.resolve() == path.parent.resolve()
        if metadata.resolve() == path.resolve() or (is_numbered and same_folder):
            raise click.BadParameter(
                f"{metadata} is also the name of an image of {option}; give another name", param_hint="--metadata"
            )


def _format_for(output: Path | None, wanted: str | None, saved: Format | str | None = None) -> Format | str | None:
    """Return the format to request: `wanted`, or `saved` if the name `output` fits it, or that of `output`."""
    if output is None:
        return wanted or saved
    by_name = Format.of(output)
    if by_name is None:
        endings = ", ".join(dict.fromkeys(suffix for each in Format for suffix in each.suffixes))
        raise click.BadParameter(f"{output.name} must end in one of {endings}", param_hint="-o")
    if wanted is not None and Format(wanted).suffixes != by_name.suffixes:
        raise click.BadParameter(
            f"a {wanted} cannot be named {output.name}; end it in {Format(wanted).suffixes[0]}, or leave out --format",
            param_hint="-o",
        )
    if wanted is None and isinstance(saved, Format) and saved.suffixes == by_name.suffixes:
        return saved
    return Format(wanted or by_name)
