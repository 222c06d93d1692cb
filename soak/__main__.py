"""Run the campaign, or a part of it: python -m soak [flags | messages | start | signals] [--count N] [--seed N] ..."""

import argparse
import base64
import sys

from soak import flags, messages, signals, start

# Of each part, how many cases there are, and the seconds after which it begins no more.
LONG = {"flags": (300, 900.0), "start": (1000, 900.0), "messages": (100_000, 1500.0), "signals": (500, 1500.0)}


def main() -> int:
    """Returns 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("part", nargs="?", choices=[*LONG, "all"], default="all")
    parser.add_argument("--count", type=int, help="of cases; without it the long form")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="after which no more cases begin")
    alone = parser.add_argument_group("one case alone, as it was printed")
    alone.add_argument("--typed", action="append", default=[], metavar="FLAG", help="of the server")
    alone.add_argument("--variable", action="append", default=[], metavar="NAME=VALUE", help="of the environment")
    alone.add_argument("--method", metavar="/SERVICE/METHOD")
    alone.add_argument("--deadline", type=float, default=5.0, metavar="SECONDS")
    alone.add_argument("--message", action="append", default=[], metavar="BASE64")
    alone.add_argument("--metadata", action="append", default=[], metavar="KEY=BASE64")
    alone.add_argument("--case", help="of start, by its name")
    options = parser.parse_args()
    if options.typed or options.variable or options.method or options.case:
        found = _alone(options)
        print("\n".join(found) or "nothing is wrong", flush=True)
        return int(bool(found))
    wrong = False
    for part in LONG if options.part == "all" else (options.part,):
        count, seconds = LONG[part]
        count, seconds = options.count or count, options.seconds or seconds
        run = {"flags": flags, "messages": messages, "start": start, "signals": signals}[part].campaign
        report = run(count, options.seed, seconds)
        print(report, flush=True)
        wrong = wrong or bool(report.violations)
    return int(wrong)


def _alone(options: argparse.Namespace) -> list[str]:
    """Repeat one case; what is wrong with it."""
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
