"""Parts of the report that are no table of times: probe, shard, length, and words over kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def note(row: dict[str, Any]) -> str:
    """Return in a few words what a row without times says; "" for one that has times."""
    if "error" in row:
        return f"error: {row['error']}"
    if row["suite"] == "probe":
        return "; ".join(_probed(row))
    if row["suite"] == "shard":
        counts = ", ".join(f"{n} {kind}" for kind, n in row["collectives"].items() if n)
        return f"{counts}; {_mb(row['argument_size_in_bytes'])} + {_mb(row['temp_size_in_bytes'])}"
    if row["suite"] == "length":
        return "; ".join(
            f"T {x['t']}: {x['ms']:g} ms, {x['time_growth']:.2f}x, FLOPs {x['flops_growth']:.2f}x"
            for x in row["lengths"]
        )
    return ""


def probe_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines on probes, a list for each."""
    lines = []
    for r in rows:
        if "error" in r:
            lines.append(f"- {r['case']}: {r['error']}")
            continue
        if "versions" in r:
            versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
            lines.append(f"- {r['case']}: {r['devices']} x {r['device_kind']}; {versions}")
        if "attention" in r:
            lines.append(f"- attention: {_attentions(r)}")
        if "matmul_gflop_s" in r:
            lines.append(
                f"- matmul, {r['matmul_dtype']}: {r['matmul_gflop_s']:,g} GFLOP/s; copy: "
                f"{r['copy_gb_s']:g} GB/s"
            )
    return lines


def _probed(row: dict[str, Any]) -> list[str]:
    """Return what a probe found, part by part."""
    parts = []
    if "devices" in row:
        parts.append(f"{row['devices']} x {row['device_kind']}")
    if "attention" in row:
        parts.append(_attentions(row))
    if "matmul_gflop_s" in row:
        parts.append(f"matmul {row['matmul_gflop_s']:,g} GFLOP/s; copy {row['copy_gb_s']:g} GB/s")
    return parts


def _attentions(row: dict[str, Any]) -> str:
    found = []
    for name, by_dtype in row["attention"].items():
        for dtype, error in by_dtype.items():
            text = error if isinstance(error, str) else f"error {error:.1e}"
            found.append(f"`{name}` in {dtype} {text}")
    return ", ".join(found)


def shard_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of meshes."""
    kinds = list(next((r["collectives"] for r in rows if "error" not in r), {}))
    head = ("mesh", *kinds, "arguments", "temporary", "parity")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["case"], *["-"] * (len(kinds) + 2), r.get("error", "")]
        if "error" not in r:
            parity = f"{r['parity_err']:.1e}" + ("" if r["parity_ok"] else " FAILS")
            cells = [
                r["case"],
                *r["collectives"].values(),
                _mb(r["argument_size_in_bytes"]),
                _mb(r["temp_size_in_bytes"]),
                parity,
            ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def length_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of lengths for each row."""
    lines = []
    for r in rows:
        if "error" in r:
            lines.append(f"{r['case']}: {r['error']}")
            continue
        lines += [
            f"{r['case']}, {r['options']['rounds']} timed steps of each length.",
            "",
            "| T | batch | ms | least to most | GFLOP | GFLOP/s | time | FLOPs |",
            "|" + "---|" * 8,
            *(
                f"| {x['t']} | {x['b']} | {x['ms']:g} | {x['ms_least']:g} to {x['ms_most']:g} "
                f"| {x['gflop']:g} | {x['gflop'] / x['ms'] * 1e3:.1f} "
                f"| {x['time_growth']:.2f}x | {x['flops_growth']:.2f}x |"
                for x in r["lengths"]
            ),
        ]
    return lines


TABLES = {"probe": probe_table, "shard": shard_table, "length": length_table}
"""The suites whose sections have a form of their own."""


def about_kernels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the paragraph over the table of attention or loss: memory, and packed rows."""
    each = {}
    for r in rows:
        name = ", ".join(n for n in (r["case"], r["ours_impl"]) if n)
        each[name] = _mb(r["temp_size_in_bytes"])
    memory = "; ".join(f"{name}: {size}" for name, size in each.items())
    parts = [f"Temporary memory of ours, from the compiler: {memory}.\n"]
    if gains := packed_gains(rows):
        listing = "; ".join(f"{name}: {gain:.2f}x" for name, gain in gains.items())
        parts.append(
            "Time of a dense causal row of the same shape over that of the packed one, ours: "
            f"{listing}.\n"
        )
    return parts


def _flamingo(s: dict[str, Any]) -> str:
    return (
        f"The model: an MPT of width {s['d']}, {s['layers']} layers, {s['heads']} heads and "
        f"vocabulary {s['vocab']:,}, a gated block before every {s['every']} layers; a tower of "
        f"width {s['tower_d']}, {s['tower_layers']} layers and {s['tower_heads']} heads, pictures "
        f"of {s['image']} and patches of {s['patch']} pixels; the published resampler, 6 layers "
        "and 64 latents, at the tower's width."
    )


def _bunny(s: dict[str, Any]) -> str:
    return (
        f"The model: a Phi of width {s['d']}, {s['layers']} layers, {s['heads']} heads, MLP "
        f"{s['mlp']} and vocabulary {s['vocab']:,}; a SigLIP tower of width {s['tower_d']}, "
        f"{s['tower_layers']} layers and {s['tower_heads']} heads, pictures of {s['image']} and "
        f"patches of {s['patch']} pixels: {(s['image'] // s['patch']) ** 2} tokens an image; the "
        f"projector mlp2x_gelu; adapters of rank {s['rank']}."
    )


MODELS = {"flamingo": _flamingo, "bunny": _bunny}
"""The suites of a family that is no Fuyu, and what tells the sizes of its model."""


def about_family(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the paragraph over a family's table: sizes, the peer's settings, memory, compiling."""
    train = [r for r in rows if "trained" in r]
    parts = [MODELS[rows[0]["suite"]](rows[0]["size"])]
    if train:
        counts = (f"{r['trained'] / 1e6:.1f} M" for r in train)
        parts.append(
            f"{train[0]['parameters'] / 1e6:.1f} M parameters, of which "
            f"{' or '.join(dict.fromkeys(counts))} are trained."
        )
    if notes := sorted({r["peer_note"] for r in rows if r.get("peer_note")}):
        parts.append(f"The peer's fastest settings were {'; '.join(notes)}.")
    # The first row of a case: the next ones find its program compiled.
    compile_s = {r["case"]: r["compile_s"] for r in reversed(rows)}
    listing = "; ".join(f"{case}: {seconds:g}" for case, seconds in reversed(compile_s.items()))
    parts.append(f"Seconds to compile ours, not in the times: {listing}.")
    if train:
        memory = {r["case"]: _mb(r["temp_size_in_bytes"]) for r in train}
        listing = "; ".join(f"{case}: {size}" for case, size in memory.items())
        parts.append(f"Temporary memory of ours, from the compiler: {listing}.")
    return [" ".join(parts) + "\n"]


def packed_gains(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return {packed case and implementation: its dense causal partner's time over its own}."""
    dense, gains = {}, {}
    rows = [r for r in rows if r["suite"] == "attention"]
    for r in rows:
        if not r["options"]["documents"]:
            dense.setdefault(_shape(r), r["ours_ms"])
    for r in rows:
        if r["options"]["documents"] and _shape(r) in dense:
            name = f"{r['case']}, {r['ours_impl']}"
            gains.setdefault(name, dense[_shape(r)] / r["ours_ms"])
    return gains


def _shape(row: dict[str, Any]) -> tuple:
    return row["ours_impl"], *(row["options"][k] for k in ("b", "t", "n", "h", "backward", "dtype"))


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
