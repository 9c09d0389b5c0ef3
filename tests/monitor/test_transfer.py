"""What is seen of weights that are read or written."""

import io

import pytest
from rich.console import Console

from mmjax.monitor import transfer


def console(**options):
    return Console(file=io.StringIO(), width=120, **options)


def test_a_log_gets_plain_lines_now_and_then():
    out, now = console(), iter([0.0, 4.0, 10.0, 12.0, 20.0])
    with transfer.bar("fuyu", 20 * 10**9, console=out, clock=lambda: next(now)) as advance:
        for _ in range(4):
            advance(4 * 10**9)
    assert out.file.getvalue().splitlines() == [
        "fuyu  8.00 GB of 20.00 GB  eta 15s",
        "fuyu  16.00 GB of 20.00 GB  eta 5s",
    ]


def test_a_terminal_gets_a_bar():
    out = console(force_terminal=True)
    with transfer.bar("fuyu", 10**9, console=out) as advance:
        advance(10**9)
    assert "fuyu" in out.file.getvalue() and "1.0/1.0 GB" in out.file.getvalue()


@pytest.mark.parametrize(
    "total, shown, seen", [(2**28, True, True), (2**28 - 1, True, False), (2**30, False, False)]
)
def test_reading_is_shown_where_it_takes_long(total, shown, seen):
    out = console(force_terminal=True)
    with transfer.reading_bar("reading", shown=shown, console=out) as tell:
        tell(total // 2, total)
        tell(total - total // 2, total)
    assert ("reading" in out.file.getvalue()) == seen
