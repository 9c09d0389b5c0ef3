"""Write a parquet file anew with small row groups, so that its rows can be read one by one.

python -m mmjax.data.regroup_parquet BIG.parquet SMALL.parquet [--rows 32]
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mmjax.cli import Parser, run_guarded
from mmjax.data.parquet_files import pyarrow_parquet
from mmjax.partial import begin, partial_of, refuse_existing
from mmjax.types import MMJaxError


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("mmjax.data.regroup_parquet", __doc__)
    parser.add_argument("source", help="the parquet file to read")
    parser.add_argument("target", help="the file to write; it must not exist")
    parser.add_argument("--rows", type=int, default=32, help="rows in each group (default 32)")
    args = parser.read(argv)
    count = regroup(args.source, args.target, args.rows)
    print(f"{args.target}: {count:,} rows, {args.rows} in each group")
    return 0


def regroup(source: str | os.PathLike, target: str | os.PathLike, rows: int = 32) -> int:
    """Copy a parquet file with ``rows`` rows in each group, page by page; returns all rows.

    The target appears under its name only when it is whole, and must not exist. Raises MMJaxError
    for a file that cannot be read, or written.
    """
    pq = pyarrow_parquet()
    if rows < 1:
        raise MMJaxError(f"--rows {rows}: a row group holds at least one row")
    target, count = Path(target), 0
    refuse_existing(target)
    held = contextlib.ExitStack()
    try:
        os.stat(target.parent)  # a wrong path is an error and no new folder
        temporary = begin(target, held) / target.name
        # Without pre-buffering and with a buffered stream the pages are read one after another, of
        # 1,024 rows as pyarrow writes them; by default it would read the whole group first.
        file = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
        with pq.ParquetWriter(temporary, file.schema_arrow) as writer:
            for batch in file.iter_batches(batch_size=rows):
                writer.write_batch(batch, row_group_size=rows)
                count += batch.num_rows
        os.replace(temporary, target)
    except (OSError, ValueError) as e:
        says = " ".join(str(e).split())
        raise MMJaxError(
            f"{source}: cannot be written anew as {target}: {says}; check both paths, or fetch the "
            "file again"
        ) from e
    finally:
        held.close()  # on NFS a folder with an open file stays
        shutil.rmtree(partial_of(target), ignore_errors=True)
    return count


if __name__ == "__main__":
    sys.exit(run_guarded(main))
