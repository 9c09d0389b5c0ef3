"""The printed table, and docs/benchmarks.md written from the raw rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report_surveys
from bench.report_words import CONVERT, INTRO, PIPELINE, SUITES

HEADER = ("case", "ours", "peer", "ours/s", "peer/s", "ratio", "target", "noise", "parity", "notes")


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the cells of a table, header first."""
    return [HEADER, *map(_cells, rows)]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def number(key: str, form: str) -> str:
        return "-" if row.get(key) is None else format(row[key], form)

    name = _name(row)
    if note := report_surveys.note(row):
        return name, *["-"] * (len(HEADER) - 3), _parity(row), note
    targets = ((row["target"], "x"), (row.get("rate_target"), "/s"))
    wanted = [f">= {value:g}{unit}" for value, unit in targets if value is not None]
    return (
        name,
        f"{number('ours_ms', '.4g')} ms",
        f"{number('peer_ms', '.4g')} ms",
        _rate(row["ours_per_s"]),
        _rate(row.get("peer_per_s")),
        f"{number('ratio', '.2f')}x",
        ", ".join(wanted) or "-",
        f"{row['noise']:.0%}",
        _parity(row),
        "; ".join(_remarks(row)),
    )


def _remarks(row: dict[str, Any]) -> list[str]:
    found = [f"load {row['busy_cores']:g}"] if row["loaded"] else []
    return [*found, *(["the peer failed"] if "peer_error" in row else [])]


def _name(row: dict[str, Any]) -> str:
    names = [row["case"], row["ours_impl"]]
    peer = f" vs {row['peer_impl']}" if row["peer_impl"] else ""
    return ", ".join(n for n in names if n) + peer


def _parity(row: dict[str, Any]) -> str:
    parity = "none" if row["parity_err"] is None else f"{row['parity_err']:.1e}"
    return parity + " FAILS" if row["parity_ok"] is False else parity


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return format(value, ",.0f" if value >= 1000 else ".4g")


def convert_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of conversions."""
    head = (
        "layers", "parameters", "checkpoint", "to_jax", "peak", "to_hf", "peak", "changed",
        "load average",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        there, back = r["to_jax"], r["to_hf"]
        most = "at most " if r.get("peak_is_bound") else ""
        cells = (
            r["layers"], f"{r['parameters']:,}", f"{r['checkpoint_gb']} GB",
            f"{there['seconds']} s", f"{most}{there['peak_gb']} GB",
            f"{back['seconds']} s", f"{most}{back['peak_gb']} GB", len(r["changed"]),
            r["env"]["load_at_start"],
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def pipeline_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines on runs of the pipeline: what was drawn, then a table of both sides."""
    lines = []
    for r in rows:
        a, b, shape = r["ours"], r["peer"], r["shape"]
        lines += [
            f"{r['records']:,} records, {r['pictures']:,} pictures with longest sides from "
            f"{r['sides'][0]} to {r['sides'][1]} ({r['megapixels']} megapixels and "
            f"{r['bits_per_pixel']} bits a pixel on average; Pillow decodes one in "
            f"{r['decode_ms']} ms of a core), {r['workers']} workers a side, batches "
            f"of {shape['batch_size']} rows of {shape['seq_len']:,} tokens."
            + (" **A `--quick` run: no statement on speed.**" if r["quick"] else ""),
            "",
            "| | images | images/s | per core | tokens/s | padding | skipped | memory |",
            "|---|---|---|---|---|---|---|---|",
            f"| ours | {a['images']:,} | {_rate(a['images_per_s'])} | "
            f"{_rate(a['images_per_core_s'])} | {a['tokens_per_s']:,} | {a['padding']:.2%} | "
            f"{a['skipped']} | {_memory(a)} |",
            f"| peer | {b['images']:,} | {_rate(b['images_per_s'])} | "
            f"{_rate(b['images_per_core_s'])} | {b['tokens'] / b['seconds']:,.0f} | - | - | "
            f"{_memory(b)} |",
            f"| ratio | | {r['ratio']:.2f}x | {r['ratio_core']:.2f}x | | | | |",
            "",
            f"Target >= {r['target']:g}x, noise {r['noise']:.0%}, parity of {r['compared']} "
            f"records: tokens {r['parity_errors']['tokens']:g}, grey levels "
            f"{r['parity_errors']['levels']:g}"
            + (f"; load {r['other_cores']:g}." if r["loaded"] else "."),
            "",
        ]
    return lines


def _memory(side: dict[str, Any]) -> str:
    return (
        f"{side['early_mb']:,.0f} MB, then {side['late_mb']:,.0f} MB ({side['growth']:+.1%}); own "
        f"{side['own_early_mb']:,.0f} MB, then {side['own_late_mb']:,.0f} MB "
        f"({side['own_growth']:+.1%}); waiting at most {side['shm_peak_mb']:,.0f} MB"
    )


def _pipeline_missed(row: dict[str, Any]) -> list[str]:
    """Name what a run of the pipeline misses."""
    if not row["parity_ok"]:
        return [f"- pipeline: does not count, parity {row['parity_errors']}"]
    slower = min(row["ratio"], row["ratio_core"])
    return [f"- pipeline: {slower:.2f}x of {row['target']:g}x"] if slower < row["target"] else []


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as one aligned table."""
    cells = table(rows)
    widths = [max(len(c[i]) for c in cells) for i in range(len(HEADER))]
    for line in cells:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def markdown(rows: Sequence[dict[str, Any]], command: str, raw: str) -> str:
    """Return docs/benchmarks.md for the rows of one or several runs."""
    conversions = [r for r in rows if r["suite"] == "convert"]
    pipelines = [r for r in rows if r["suite"] == "pipeline"]
    rows = [r for r in rows if r["suite"] in SUITES]
    parts = [INTRO.format(command=command, raw=raw)]
    if any(r["quick"] for r in rows):
        parts.append("**These rows are of a `--quick` run: toy sizes, no statement on speed.**\n")
    for suite, (title, text) in SUITES.items():
        some = [r for r in rows if r["suite"] == suite]
        if not some:
            continue
        bound = max(r["parity_bound"] for r in some)
        if suite in report_surveys.TABLES:
            lines = report_surveys.TABLES[suite](some)
        else:
            lines = ["| " + " | ".join(c) + " |" for c in table(some)]
            lines.insert(1, "|" + "---|" * len(HEADER))
        parts += [
            f"## {title}\n\n{text.format(bound=bound, unit=some[0]['unit'])}\n",
            *_about(some),
            "\n".join(lines) + "\n",
        ]
    if conversions:
        parts += [CONVERT, "\n".join(convert_table(conversions)) + "\n"]
    if pipelines:
        parts += [PIPELINE, "\n".join(pipeline_lines(pipelines))]
    parts += [_missed(rows, pipelines), _environment(rows + pipelines), _not_measured(rows)]
    return "\n".join(p for p in parts if p)


def _about(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what stands between a suite's text and its table."""
    suite, rows = rows[0]["suite"], [r for r in rows if "error" not in r]
    if not rows or suite in ("probe", "input"):
        return []
    if suite in ("attention", "loss"):
        return report_surveys.about_kernels(rows)
    if suite in report_surveys.MODELS:
        return report_surveys.about_family(rows)
    s = rows[0]["size"]
    compile_s = ", ".join(f"{r['case']}: {r['compile_s']:g}" for r in rows if not _repeats(r))
    notes = sorted({r["peer_note"] for r in rows if r.get("peer_note")})
    note = f" The peer's fastest settings were {'; '.join(notes)}." if notes else ""
    return [
        f"The model: width {s['d']}, {s['layers']} layers, {s['heads']} heads, MLP {s['mlp']}, "
        f"vocabulary {s['vocab']:,}, patches of {s['patch']} pixels, {_parameters(s) / 1e6:.1f} M "
        f"parameters.{note} Seconds to compile ours, not in the times: {compile_s}.\n"
    ]


def _repeats(row: dict[str, Any]) -> bool:
    return bool(row["peer_impl"]) and "gathered" in row["peer_impl"]


def _parameters(s: dict[str, int]) -> int:
    d, f = s["d"], s["mlp"]
    layer = 4 * d * d + 4 * d + 2 * d * f + d + f + 4 * d + 4 * (d // s["heads"])
    patch = 3 * s["patch"] ** 2 * d + d
    return s["layers"] * layer + 2 * s["vocab"] * d + 2 * d + patch


def _missed(rows: Sequence[dict[str, Any]], pipelines: Sequence[dict[str, Any]]) -> str:
    """Name the rows that miss their target or do not count."""
    found = [line for row in pipelines for line in _pipeline_missed(row)]
    for row in rows:
        name = f"{row['suite']}: {_name(row)}"
        if "error" in row:
            found.append(f"- {name}: not measured, {row['error']}")
        elif "peer_error" in row:
            found.append(f"- {name}: does not count, {row['peer_error']}")
        elif row["parity_ok"] is False or (row["parity_ok"] is None and not _alone(row)):
            found.append(f"- {name}: does not count, parity {row['parity_err']}")
        else:
            found += [f"- {name}: {missed}" for missed in _short_of(row)]
    if not found:
        return "## Targets\n\nEvery row reaches its target.\n"
    return "## Targets missed\n\n" + "\n".join(found) + "\n"


def _alone(row: dict[str, Any]) -> bool:
    """Tell whether a row was never to be compared with a peer."""
    return row["suite"] in ("probe", "length") or row.get("alone", False)


def _short_of(row: dict[str, Any]) -> list[str]:
    found = []
    if row["target"] is not None and row["ratio"] < row["target"]:
        found.append(f"{row['ratio']:.2f}x of {row['target']:g}x")
    rate = row.get("rate_target")  # older rows have none
    if rate is not None and row["ours_per_s"] < rate:
        found.append(f"{_rate(row['ours_per_s'])} of {_rate(rate)} {row['unit']} per second")
    return found


def _environment(rows: Sequence[dict[str, Any]]) -> str:
    machines: dict[str, list[str]] = {}
    for r in rows:
        e = r["env"]
        machine = f"{e['cpu']}, {e['cores']} cores, {e['memory_gb']} GB, {e['system']}"
        suites = machines.setdefault(f"{machine}, Python {e['python']}", [])
        if r["suite"] not in suites:
            suites.append(r["suite"])
    versions = {
        k: v for r in rows for side in r["env"]["versions"].values() for k, v in side.items()
    }
    dates = sorted({r["env"]["date"] for r in rows})
    commits = sorted({r["env"]["commit"] for r in rows})
    loads = [r["env"]["load_at_start"] for r in rows]
    listing = ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
    accelerators = sorted({r["env"]["accelerator"] for r in rows} - {"none"})
    tunables: dict[str, list[str]] = {}
    for r in rows:  # older rows were measured with malloc as it is
        tunables.setdefault(r["env"].get("tunables", ""), []).append(r.get("suite", "others"))
    malloc = "; ".join(
        f"{', '.join(dict.fromkeys(names))}: {value or 'none'}" for value, names in tunables.items()
    )
    return (
        "## Where\n\n"
        + "".join(
            f"- {', '.join(suites) + ': ' if len(machines) > 1 else ''}{machine}\n"
            for machine, suites in machines.items()
        )
        + "".join(f"- {name}\n" for name in accelerators)
        + f"- {listing}\n- commit {', '.join(commits)}\n"
        f"- {dates[0]} to {dates[-1]}, load average at the start of a suite "
        f"{min(loads):g} to {max(loads):g}\n"
        f"- glibc's tunables of both sides (`mmjax/runtime.py`), by suite: {malloc}\n"
    )


def _not_measured(rows: Sequence[dict[str, Any]]) -> str:
    missing = [f"the {s} suite" for s in SUITES if s not in {r["suite"] for r in rows}]
    if not any(r.get("device") == "gpu" for r in rows):
        missing.append("anything on a GPU: no row here says how fast mmjax is there")
        missing.append("bfloat16, which both frameworks avoid here on a CPU")
    missing.append(
        "torch.compile, which the peer's users may turn on, but where a row says compiled"
    )
    if not any(r["peer_impl"] == "torchvision" and "error" not in r for r in rows):
        missing.append(
            "the peer's torchvision image processor (give `--torchvision-python PATH`, an "
            "interpreter of an environment that also has torchvision)"
        )
    return "## Not measured\n\n" + "\n".join(f"- {m}" for m in missing) + "\n"


def write(rows: Sequence[dict[str, Any]], command: str, raw: str, file: Path) -> None:
    """Write docs/benchmarks.md."""
    file.write_text(markdown(rows, command, raw), "utf-8")
