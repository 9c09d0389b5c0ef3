"""python -m bench: measure mmjax beside its PyTorch peers, print a table, write docs/benchmarks.md.

    python -m bench                                  train, decode and input, beside torch
    python -m bench --suite probe,attention,loss,train,length,decode,input,shard  everything on Fuyu
    python -m bench --suite train --out bench/results/train.jsonl
    python -m bench --suite flamingo --out bench/results/flamingo.jsonl     beside OpenFlamingo
    python -m bench --suite bunny --out bench/results/bunny.jsonl     beside what Bunny is made of
    python -m bench --suite probe,attention,loss,train_8b,decode_8b     what a GPU can show
    python -m bench --report bench/results/*.jsonl   write the document from raw rows again
    python -m bench.convert                          conversions: memory and time
    python -m bench.pipeline                         the training pipeline: rate and memory

The document is written only by a full run or by --report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import environment, report, suites
from bench.environment import ROOT
from mmjax.cli import Parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m bench", __doc__)
    parser.add_argument(
        "--suite",
        default=",".join(suites.DEFAULT),
        help=f"comma-separated, of {','.join(suites.SUITES)}; default %(default)s",
    )
    parser.add_argument("--peer", choices=("torch", "none"), default="torch")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        help="for probe, attention, loss, train_8b and decode_8b; default gpu where nvidia-smi\n"
        "finds one",
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=suites.DEADLINE,
        help="seconds for each suite; what is not measured by then says so (default %(default)g)",
    )
    parser.add_argument("--out", type=Path, help="raw rows, default bench/results/DEVICE.jsonl")
    parser.add_argument("--torchvision-python", help="interpreter with torchvision, for the peer")
    parser.add_argument(
        "--flamingo-python",
        default=os.environ.get("FLAMINGO_PYTHON", str(ROOT / ".venv-flamingo" / "bin" / "python")),
        help="interpreter with OpenFlamingo, for the peer of the flamingo suite: FLAMINGO_PYTHON,\n"
        "or .venv-flamingo/bin/python, which `make .venv-flamingo/installed` makes",
    )
    parser.add_argument("--report", type=Path, nargs="+", help="only write the document from these")
    args = parser.read(argv)
    args.suites = args.suite.split(",")
    if unknown := [s for s in args.suites if s not in suites.SUITES]:
        parser.error(f"unknown suite {unknown[0]!r}; choose from {', '.join(suites.SUITES)}")
    beside_flamingo = "flamingo" in args.suites and args.peer == "torch" and not args.report
    if beside_flamingo and not shutil.which(args.flamingo_python):
        parser.error(
            "the flamingo suite's peer runs in an environment of its own, and there is no "
            f"{args.flamingo_python}; `make .venv-flamingo/installed` makes it, or give "
            "--flamingo-python PATH, or --peer none"
        )
    args.device = args.device or ("gpu" if environment.gpu() else "cpu")
    if not args.report:
        for suite in args.suites:
            if not suites.cases_of(suite, args.quick, args.device):
                parser.error(f"{suite} needs a GPU; --quick runs toy sizes of it on a CPU")
    name = "quick.jsonl" if args.quick else f"{args.device}.jsonl"
    args.out = args.out or ROOT / "bench" / "results" / name
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites; returns 1 when a row fails its parity bound or holds an error of a side."""
    args = parse(argv)
    document = ROOT / "docs" / "benchmarks.md"
    if args.report:
        rows = [json.loads(line) for f in args.report for line in f.read_text("utf-8").splitlines()]
        raw = "`, `".join(str(_short(file)) for file in args.report)
        report.write(rows, _command(rows), raw, document)
        report.print_table([r for r in rows if r["suite"] in suites.SUITES])
        return 0
    from bench.runner import run_cases

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    command = "python -m bench " + " ".join(sys.argv[1:] if argv is None else argv)
    chosen = [
        case
        for suite in args.suites
        for case in suites.cases_of(suite, args.quick, args.device)
        if args.case in case.name
    ]
    peer = None if args.peer == "none" else args.peer
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    part = args.out.with_name(f"{args.out.name}.part")  # an interrupted run replaces no rows
    with part.open("w") as out:
        for row in run_cases(
            chosen,
            peer=peer,
            quick=args.quick,
            torchvision_python=args.torchvision_python,
            flamingo_python=args.flamingo_python,
            deadline=args.deadline,
        ):
            row["command"] = command.strip()
            rows.append(row)
            print(json.dumps(row), file=out, flush=True)
            print("  ".join(report.table([row])[1]), file=sys.stderr, flush=True)
    part.replace(args.out)
    report.print_table(rows)
    if peer and not args.quick and not args.case and set(args.suites) == set(suites.DEFAULT):
        report.write(rows, _command(rows), str(_short(args.out)), document)
        print(f"wrote {_short(document)} and {_short(args.out)}")
    return int(any(r["parity_ok"] is False or {"error", "peer_error"} & r.keys() for r in rows))


def _command(rows: Sequence[dict]) -> str:
    return "`, `".join(dict.fromkeys(r["command"] for r in rows))


def _short(file: Path) -> Path:
    file = file.resolve()
    return file.relative_to(ROOT) if file.is_relative_to(ROOT) else file


if __name__ == "__main__":
    sys.exit(main())
