"""`t2i model` and `t2i health`: show the served model, and probe the service."""

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._exceptions import Unavailable
from .._types import ModelInfo, ServingStatus
from ._group import EXIT_CODES, Seconds, connect, target_option


@click.command()
@click.option("--timeout", type=Seconds(), default=10.0, show_default=True, help="Seconds.")
@target_option
def model(target: str, timeout: float) -> None:
    """Show the served model with its defaults and limits."""
    with connect(target) as client:
        Console(soft_wrap=True, highlight=False).print(_table(client.model(timeout=timeout)))


def _table(model: ModelInfo) -> Table:
    defaults, limits, environment, filter_ = model.defaults, model.limits, model.environment, model.content_filter
    sizes = sorted(model.sizes.items(), key=lambda size: size[1][0] / size[1][1])  # from tall to wide
    threads = f"{environment.threads} thread{'s' * (environment.threads != 1)}" if environment.threads else ""
    rows = {
        "model": model.name,
        "experts": "base and refiner" if model.has_refiner else "base",
        "device": f"{model.device}, {model.precision}",
        "fingerprint": model.fingerprint,
        "schedulers": ", ".join(model.schedulers),
        "defaults": f"{defaults.steps} steps, guidance scale {defaults.guidance_scale:g}, "
        f"high noise frac {defaults.high_noise_frac:g}, {defaults.scheduler}, {defaults.aspect_ratio}",
        "sizes": ", ".join(f"{ratio} {width}x{height}" for ratio, (width, height) in sizes),
        "sides": f"{limits.min_side} to {limits.max_side} pixels in steps of {limits.side_multiple}, "
        f"{limits.max_pixels} pixels in all",
        "limits": f"{limits.max_images} images, {limits.max_steps} steps, {limits.max_prompt_characters} characters, "
        f"{limits.max_queue} requests at once, priority {limits.max_priority}",
        "content filter": f"{filter_.name}, replaces images of score {filter_.threshold:g} or more"
        if filter_
        else "none",
        "detached jobs": f"kept for {limits.retention:g} s after their end, as long as there is room",
        "hardware": ", ".join(filter(None, (environment.hardware, threads))),
        "fp32 math": environment.fp32_math,
        "versions": ", ".join(f"{name} {version}" for name, version in environment.versions.items()),
        "environment": environment.fingerprint,
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(value))
    return table


@click.command()
@click.option("--service", default="", help="A service's full name.  [default: the whole server]")
@click.option("--timeout", type=Seconds(), default=5.0, show_default=True, help="Seconds.")
@target_option
def health(target: str, service: str, timeout: float) -> None:
    """Probe the service and print its health.

    The exit code is 0 only if it is SERVING.
    """
    with connect(target) as client:
        status = client.health(service, timeout=timeout)
    click.echo(status.value)
    if status is not ServingStatus.SERVING:
        click.get_current_context().exit(EXIT_CODES[Unavailable])
