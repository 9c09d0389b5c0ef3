"""Write a parquet file anew with small row groups, so that its rows can be read one by one.

python -m mmjax.data.regroup_parquet BIG.parquet SMALL.parquet [--rows 32]
"""

import argparse
import sys
from collections.abc import Sequence

from mmjax.cli import run_guarded
from mmjax.data.parquet import regroup


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mmjax.data.regroup_parquet", description=__doc__)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--rows", type=int, default=32, help="rows in each group (default 32)")
    args = parser.parse_args(argv)
    count = regroup(args.source, args.target, args.rows)
    print(f"{args.target}: {count:,} rows, {args.rows} in each group")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(main))
