"""Run all soak tests, or one part: python -m soak [flags | messages | start | signals] [--count N] [--seed N] ..."""

import argparse
import base64
import sys

from soak import flags, messages, signals, start

# The default number of cases of each part, and the seconds after which it starts no more.
DEFAULTS = {"flags": (300, 900.0), "start": (1000, 900.0), "messages": (100_000, 1500.0), "signals": (500, 1500.0)}


def main() -> int:
    """Run the parts on the command line. Returns 1 if there is a violation."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("part", nargs="?", choices=[*DEFAULTS, "all"], default="all")
    parser.add_argument("--count", type=int, help="number of cases (default: that of the long run)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="time after which no more cases start")
    alone = parser.add_argument_group("repeat one case, with the printed options")
    alone.add_argument("--typed", action="append", default=[], metavar="FLAG", help="a flag of the server")
    alone.add_argument(
        "--variable", action="append", default=[], metavar="NAME=VALUE", help="an environment variable of the server"
    )
    alone.add_argument("--method", metavar="/SERVICE/METHOD")
    alone.add_argument("--deadline", type=float, default=5.0, metavar="SECONDS")
    alone.add_argument("--message", action="append", default=[], metavar="BASE64")
    alone.add_argument("--metadata", action="append", default=[], metavar="KEY=BASE64")
    alone.add_argument("--case", help="the name of a case of start")
    options = parser.parse_args()
    if options.typed or options.variable or options.method or options.case:
        found = _repeat(options)
        print("\n".join(found) or "no violation", flush=True)
        return int(bool(found))
    failed = False
    for part in DEFAULTS if options.part == "all" else (options.part,):
        count, seconds = DEFAULTS[part]
        count, seconds = options.count or count, options.seconds or seconds
        run = {"flags": flags, "messages": messages, "start": start, "signals": signals}[part].campaign
        report = run(count, options.seed, seconds)
        print(report, flush=True)
        failed = failed or bool(report.violations)
    return int(failed)


def _repeat(options: argparse.Namespace) -> list[str]:
    """Repeat one case and return its violations."""
    if options.case:
        return start.repeat(options.case)
    if options.method is None:
        return flags.repeat(options.typed, dict(each.split("=", 1) for each in options.variable))
    metadata = []
    for each in options.metadata:
        key, _, value = each.partition("=")
        decoded = base64.b64decode(value)
        metadata.append((key, decoded if key.endswith("-bin") else decoded.decode()))
    encoded = tuple(base64.b64decode(each) for each in options.message)
    return messages.repeat(messages.Call(options.method, encoded, options.deadline, tuple(metadata)))


if __name__ == "__main__":
    sys.exit(main())
