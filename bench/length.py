"""The length suite: a train step's time over the length of its rows, beside the FLOPs it has.

Every batch has as many tokens; only attention's work grows with the length of the rows. No peer.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from bench import shard
from bench.cases import TINY, Case, Size

ROUNDS = 7
"""Steps of each length that are timed; the lengths take turns, so a slow moment hits all."""


def length_cases(quick: bool, device: str) -> list[Case]:
    """Return the one case; it runs on the CPU."""
    tokens, lengths = (128, [32, 64]) if quick else (4096, [256, 512, 1024, 2048, 4096])
    return [
        Case(
            "length",
            f"{tokens:,} tokens a batch",
            {"tokens": tokens, "lengths": lengths, "rounds": 1 if quick else ROUNDS},
            work=tokens,
            unit="tokens",
            bound=0,
            size=TINY if quick else Size(),
            peers=(),
        )
    ]


class Length:
    """``mmjax.train.step`` of a Fuyu at each length, with a target in sixteen tokens."""

    def __init__(self, case: Case, folder: str, impl: str):
        self.case = case

    def survey(self) -> dict[str, Any]:
        """Return, for each length, milliseconds and FLOPs of a step, and both over the first's."""
        import jax

        from mmjax.parallel.mesh import use

        options, built = self.case.options, []
        for t in options["lengths"]:
            one = {"b": options["tokens"] // t, "t": t, "targets": t // 16}
            case = Case("length", "", one, 0, "", 0, size=self.case.size)
            built.append((one, shard.build(case, {}), _flops(case)))
        times: list[list[float]] = [[] for _ in built]
        for turn in range(options["rounds"] + 1):
            for (_, step, _), seconds in zip(built, times, strict=True):
                begun = time.perf_counter()
                with use(step.mesh):
                    step.train, metrics = step.compiled(step.train, step.frozen, step.batch)
                jax.block_until_ready((step.train, metrics))
                if turn:  # the first warms up
                    seconds.append(time.perf_counter() - begun)
        medians = [statistics.median(seconds) for seconds in times]
        return {
            "compile_s": round(sum(step.compile_s for _, step, _ in built), 2),
            "lengths": [
                {
                    **one,
                    "ms": round(median * 1e3, 1),
                    "ms_least": round(min(seconds) * 1e3, 1),
                    "ms_most": round(max(seconds) * 1e3, 1),
                    "gflop": round(flops / 1e9, 2),
                    "time_growth": round(median / medians[0], 3),
                    "flops_growth": round(flops / built[0][2], 3),
                }
                for (one, _, flops), median, seconds in zip(built, medians, times, strict=True)
            ],
        }


def _flops(case: Case) -> float:
    """Return the FLOPs of a step as training counts them."""
    from flax import nnx

    from bench import cases
    from bench.ours import fuyu_config
    from mmjax.nn import paths
    from mmjax.parallel.mesh import use
    from mmjax.train.flops import train_flops

    config, o = fuyu_config(case.size), case.options
    patches = cases.train_batch(case)["patches"]
    way = config.work(
        o["t"], asked=o["targets"] / o["t"], visual=patches.shape[1], width=patches.shape[2]
    )
    with use():
        shapes = paths.flatten(nnx.state(nnx.eval_shape(shard.maker(case.size))))
    sizes = {name: x.size for name, x in shapes.items()}
    return o["b"] * train_flops(way, sizes, set(sizes))
