"""Autobahn's test cases against the loopback backend, as `kosoku` runs them.

    python test/conformance.py [--write] [CASE ...]

CASE is a case's id or a pattern, as 6.4.*; without any, all are run, which
takes some ten minutes. Each runs without `--compression` and with it. The exit
status is 0 where no case failed, and each that is less than OK is explained
below. `--write` puts the result into docs/conformance.md.
"""

import argparse
import asyncio
import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from kosoku import FailureError, run_fuzzingclient
from service import PROJECT, Service

Case = Any  # kosoku's CaseResult, which it does not export

REPORT = PROJECT / "docs" / "conformance.md"
BEGIN, END = "<!-- make conformance begins -->\n", "<!-- make conformance ends -->\n"

LARGEST = 64 * 2**20  # bytes; group 9 goes to 16 MiB
# Level 1: kosoku gives groups 12 and 13 some 20 s for 1,000 messages each.
RUNS = {
    "without `--compression`": (),
    "with `--compression`": ("--compression", "--compression_level=1"),
}

GROUPS = {
    "1": "text and binary messages",
    "2": "pings and pongs",
    "3": "reserved bits",
    "4": "reserved opcodes",
    "5": "fragments",
    "6": "UTF-8",
    "7": "closing",
    "9": "large messages, and many",
    "10": "fragments made by the client's library",
    "12": "compression: payloads of five kinds",
    "13": "compression: its parameters",
}

# Why a case is less than OK. For Autobahn none of these is a failure.
EXPLAINED = {
    r"7\.1\.6": "INFORMATIONAL: a ping after the close frame. The standard leaves it"
    " open what becomes of the messages before; the relay has delivered them.",
    r"7\.13\.[12]": "INFORMATIONAL: close codes of 5000 and more, of which the"
    " standard says nothing. The relay answers 1002.",
    r"1[23]\.": "UNIMPLEMENTED without `--compression`: what the case offers is"
    " declined, and there is nothing to judge.",
}
LESS_THAN_OK = {"INFORMATIONAL", "UNIMPLEMENTED"}


async def run(cases: Sequence[str], flags: Iterable[str]) -> list[Case]:
    """Run `cases` against a new relay, and return the results."""
    limits = (f"--max_message_size={LARGEST}", f"--max_send_buffer={2 * LARGEST}")
    async with Service(*limits, *flags) as service:
        try:
            return await run_fuzzingclient(service.ws_url, cases or None)
        except FailureError as failure:  # includes the other cases
            return failure.results


def result_of(case: Case) -> str:
    """Return Autobahn's result of the case, including its closing."""
    closing = case.behavior_close.value
    if closing in ("OK", case.behavior.value):
        return case.behavior.value
    return f"{case.behavior.value}, {closing}"


def unexplained(cases: Iterable[Case], compressed: bool) -> Iterator[str]:
    """Return a line for each case that failed, or is less than OK without a reason."""
    for case in cases:
        found = result_of(case)
        known = any(re.match(pattern, case.case_id) for pattern in EXPLAINED)
        if found == "OK" or (
            known
            and found in LESS_THAN_OK
            and not (compressed and found == "UNIMPLEMENTED")
        ):
            continue
        yield f"{case.case_id}: {found}: {case.result} {case.result_close}"


def table(results: Sequence[Sequence[Case]]) -> str:
    """Return a table with a row for each group and a column for each of `RUNS`."""
    lines = [
        f"| group | | {' | '.join(RUNS)} |",
        "|---|---|" + "---|" * len(RUNS),
    ]
    for group, title in GROUPS.items():
        cells = []
        for cases in results:
            counts = Counter(
                result_of(case) for case in cases if case.case_id.split(".")[0] == group
            )
            cells.append(", ".join(f"{n} {found}" for found, n in counts.most_common()))
        lines.append(f"| {group} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def explanations(results: Iterable[Iterable[Case]]) -> str:
    """Return a list of the reasons that apply."""
    ids = [c.case_id for cases in results for c in cases if result_of(c) != "OK"]
    lines = []
    for pattern, why in EXPLAINED.items():
        found = sorted(
            {i for i in ids if re.match(pattern, i)},
            key=lambda i: [int(part) for part in i.split(".")],
        )
        if found:
            some = ", ".join(found) if len(found) < 4 else f"{found[0]} to {found[-1]}"
            lines.append(f"- {some}: {why}")
    return "\n".join(lines) + "\n"


def write(text: str) -> None:
    """Write the result between its marks in the document."""
    before, rest = REPORT.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    REPORT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


async def main() -> int:
    """Run, report, and return the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()

    results, wrong = [], []
    for name, flags in RUNS.items():
        print(f"{name} ...", file=sys.stderr)
        cases = await run(arguments.cases, flags)
        results.append(cases)
        wrong += [f"{name}: {line}" for line in unexplained(cases, bool(flags))]
    report = (
        f"kosoku {version('kosoku')}, {len(results[0])} cases:\n\n"
        f"{table(results)}\n{explanations(results)}"
    )
    print(report)
    print("\n".join(wrong))
    if arguments.write and not wrong:
        write(report)
    return 1 if wrong or not all(results) else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(main()))
    sys.exit(130)
