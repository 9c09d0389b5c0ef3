import contextlib
import io
import os
import sys

import pytest
from rich.console import Console

from mmjax.monitor import terminal

VALUES = {
    "train/loss": 1.25,
    "train/lr": 3e-4,
    "train/grad_norm": 0.5,
    "perf/tok_s": 12_345.0,
    "perf/step_s": 0.5,
    "perf/data_wait_s": 0.01,
}


def console(**options):
    return Console(file=io.StringIO(), width=120, **options)


def test_status_line_shows_a_dash_for_an_unknown_mfu():
    line = terminal.status_line(20, 100, VALUES, eta=3723)
    assert line == (
        "step 20/100  eta 1:02:03  loss 1.2500  lr 3.00e-04  grad 0.5  12.3k tok/s  mfu -"
        "  data wait 2%"
    )
    assert "mfu 41.0%" in terminal.status_line(1, 2, VALUES | {"perf/mfu": 0.41})


def test_plain_lines_come_at_intervals_and_the_last_one_always():
    now = [0.0]
    out = console(force_terminal=False)
    line = terminal.LiveLine(100, console=out, plain_every=10, clock=lambda: now[0])
    for step in range(1, 8):
        line.update(step, {})
        now[0] += 3
    line.close()
    steps = [text.split()[1] for text in out.file.getvalue().splitlines()]
    assert steps == ["1/100", "5/100", "7/100"]


def test_what_is_printed_stands_as_it_is_on_one_line():
    out = Console(file=io.StringIO(), width=40)
    terminal.LiveLine(9, console=out).print("step 3: vqa[/] 91.0% (24: 3.0%), captions[a] 12.0%")
    assert out.file.getvalue() == "step 3: vqa[/] 91.0% (24: 3.0%), captions[a] 12.0%\n"


@pytest.mark.parametrize("terminals", [False, True])
def test_what_cannot_be_written_ends_nothing_and_a_reader_that_is_gone_is_told(
    terminals, monkeypatch
):
    reader, writer = os.pipe()
    os.close(reader)
    for file, gone in ((open("/dev/full", "w"), 0), (open(writer, "w"), 1)):  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminals else "0")
        told = []
        line = terminal.LiveLine(10)
        line.reader_gone = lambda told=told: told.append("gone")
        line.update(1, VALUES)
        line.print("step 1: vqa 91.0%")
        line.warn("a warning")
        line.close()
        assert bool(told) == gone
        with contextlib.suppress(OSError):  # what is left in its buffer cannot be written either
            file.close()


def test_other_processes_are_silent():
    out = console()
    line = terminal.LiveLine(10, enabled=False, console=out)
    line.update(10, VALUES)
    line.print("x")
    line.close()
    assert out.file.getvalue() == ""


def test_live_line_on_a_terminal():
    out = console(force_terminal=True)
    line = terminal.LiveLine(10, console=out)
    line.update(4, VALUES, eta=5)
    line.close()
    assert "step 4/10" in out.file.getvalue() and "eta 5s" in out.file.getvalue()


@pytest.mark.parametrize("width, bar", [(110, True), (100, False)])
def test_the_bar_makes_room_where_the_line_needs_it(width, bar):
    out = io.StringIO()
    live = terminal.LiveLine(4, console=Console(file=out, force_terminal=True, width=width))
    values = {"train/loss": 0.5, "train/lr": 1e-3, "train/grad_norm": 1.0, "perf/tok_s": 1e4}
    live.update(2, values | {"perf/mfu": 0.4, "perf/data_wait_s": 0.0, "perf/step_s": 1.0}, 60.0)
    live.close()
    assert "data wait 0%" in out.getvalue() and ("━" in out.getvalue()) is bar


def test_a_terminal_that_processes_share_gets_plain_lines():
    out = console(force_terminal=True)  # as Open MPI gives one, also where a file is behind it
    line = terminal.LiveLine(10, alone=False, console=out)
    line.update(4, VALUES)
    line.close()
    (text,) = out.file.getvalue().splitlines()
    assert text.startswith("step 4/10") and "\x1b" not in text


def test_startup_table_sums_the_parts():
    out = console()
    rows = [("patch_embed", 2_000, 2_000, 8_000.0), ("decoder", 0, 5_000_000, 2.0 * 2**20)]
    out.print(terminal.startup_table({"data": 2, "fsdp": 4}, rows, {"dtype": "float32"}))
    text = out.file.getvalue()
    for expected in ("data 2 x fsdp 4", "5,002,000", "frozen", "2.0 MiB", "dtype", "float32"):
        assert expected in text


@pytest.mark.parametrize("live", [False, True])
def test_track_yields_everything(live):
    out = console(force_terminal=live)
    assert list(terminal.track([1, 2, 3], 6, "eval", size=lambda n: n, console=out)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (42, "42s"), (185, "3:05"), (3723, "1:02:03"), (184_000, "2d 03:06")],
)
def test_human_time(seconds, text):
    assert terminal.human_time(seconds) == text


def test_human_numbers():
    assert [terminal.human(v) for v in (None, 0.5, 1234, 2.5e6)] == ["-", "0.5", "1.23k", "2.5M"]
    assert [terminal.human(v) for v in (999.4, 999.6, -999_600)] == ["999", "1k", "-1M"]
    assert terminal.human_bytes(3 * 2**30) == "3.0 GiB"
