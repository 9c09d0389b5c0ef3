"""Copy any source into ArrayRecord files, images included: one folder, random access.

python -m mmjax.data.to_array_record OUT kind=json path=train.json image_root=images/
python -m mmjax.data.to_array_record OUT kind=mimicit mimicit_path=LA.json images_path=LA.parquet

Arguments are those of the source (docs/data_formats.md). Records that cannot be read are left out
and counted; the exit code is 1 if they are more than --max_bad_share, not counting those that
settings of the source leave out.
"""

import ast
import collections
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mmjax.cli import Parser, run_guarded
from mmjax.data.array_record import pack_record, write_array_records
from mmjax.data.catalog import make_source
from mmjax.data.skips import BY_CHOICE
from mmjax.data.sources import Source
from mmjax.monitor.terminal import track
from mmjax.partial import refuse_existing
from mmjax.types import BadSample, MMJaxError


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("mmjax.data.to_array_record", __doc__)
    parser.add_argument("out", help="the folder to write; it must not exist")
    parser.add_argument("source", nargs="+", help="key=value arguments of the source, kind first")
    parser.add_argument(
        "--shard_records", type=int, default=50_000, help="records in a file (default 50000)"
    )
    share = "the share of records left out from which on the exit code is 1 (default 0.05)"
    parser.add_argument("--max_bad_share", type=float, default=0.05, help=share)
    args = parser.read(argv)
    refuse_existing(Path(args.out))  # before a source of many gigabytes is opened
    source = make_source(parse_source(args.source))
    console = Console(stderr=True)
    bad: collections.Counter[str] = collections.Counter()
    first: dict[str, str] = {}
    packed = track(_packed(source, bad, first), len(source), "to ArrayRecord", console=console)
    written = write_array_records(packed, args.out, args.shard_records)
    print(f"{args.out}: {written:,} of {len(source):,} records")
    for reason, count in bad.most_common():
        print(f"left out {count:,} {reason}: {first[reason]}")
    broken = sum(count for reason, count in bad.items() if reason not in BY_CHOICE)
    return 1 if broken > args.max_bad_share * len(source) else 0


def parse_source(items: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` arguments; values are Python literals or else plain text."""
    spec: dict[str, Any] = {}
    for item in items:
        key, mark, text = item.partition("=")
        if not mark or not key.isidentifier():
            raise MMJaxError(f"argument {item!r}: write key=value, such as kind=json")
        if key in spec:
            raise MMJaxError(f"argument {key!r} is given twice")
        try:
            spec[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            spec[key] = text
    return spec


def _packed(
    source: Source, bad: collections.Counter[str], first: dict[str, str]
) -> Iterator[bytes]:
    """Yield the records that can be read whole; count the others and keep their first message."""
    for index in range(len(source)):
        record = None
        try:
            record = source[index]
            yield pack_record(record)
        except BadSample as error:
            bad[error.reason] += 1
            # A source names its record itself; an image is read here.
            name = "" if record is None else f"record {record.meta.get('id', index)}: "
            first.setdefault(error.reason, f"{name}{error}")
    if bad and len(source) == bad.total():
        told = "; ".join(f"{count:,} {reason}: {first[reason]}" for reason, count in bad.items())
        raise MMJaxError(f"none of {len(source):,} records can be copied; {told}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
