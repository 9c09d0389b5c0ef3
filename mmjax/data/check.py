"""Check the data of a recipe before a run: files, images, ids, lengths and answers; no device.

python -m mmjax.data.check --config=configs/<recipe>.py[:args] [--limit=N] [--config.key=value]

Every record goes through the recipe's own template and processor, at the resolution that the first
epoch would draw. Prints a table of the sources and what training would drop, by reason. The exit
code is 1 when that is more than data.max_bad_share of any source, 2 for a mistake in the recipe.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmjax.cli import run_with_config
from mmjax.data.limits import spread
from mmjax.data.survey import SourceReport, survey
from mmjax.monitor.terminal import human, track
from mmjax.types import MMJaxError


def check(settings: Any, limit: int | None = None, threads: int = 1) -> list[SourceReport]:
    """Go through the mixture of a run's settings (``RunSettings``); returns a report a source."""
    from mmjax.parallel.mesh import use
    from mmjax.train import tuning
    from mmjax.train.build import blueprint, train_loader
    from mmjax.train.loss import source_weights
    from mmjax.train.settings import check_numbers

    check_numbers(settings)
    if limit is not None and limit < 1:
        raise MMJaxError(f"--limit={limit}: look at 1 record of each source at least")
    if threads < 1:
        raise MMJaxError(f"--threads={threads}: records are read by 1 at least")
    with use():  # names of adapted maps are those of a model, which is made inside a mesh alone
        settings, _ = tuning.applied(settings)
        processor = blueprint(settings.model, settings.lora, settings.seed).processor
    load = train_loader(settings, processor)
    mixture = load.mixture
    source_weights(settings.data.loss_weights, mixture.names)
    total = sum(len(spread(len(source), limit)) for source in mixture.sources)
    found: list[SourceReport] = []
    records = survey(mixture, load, limit, threads)
    for report in track(records, total, "checking", console=Console(stderr=True)):
        if not found or found[-1] is not report:
            found.append(report)
    return found


def show(reports: list[SourceReport], settings: Any, console: Console) -> bool:
    """Print what was found; True when a source would drop more than ``max_bad_share``."""
    console.print(_sources(reports, settings.data.max_bad_share))
    if any(report.counts for report in reports):
        console.print(_reasons(reports))
    for report in reports:
        if report.repeated:
            shown = ", ".join(map(repr, report.repeated[:3]))
            count = f"{len(report.repeated)}{'' if len(report.repeated) < 100 else ' or more'}"
            console.print(Text(f"{report.name}: {count} ids are given more than once: {shown}"))
    data = settings.data
    draws = sum(r.draws for r in reports)
    tokens = sum(r.draws * (1 - r.bad_share) * r.mean_tokens() for r in reports)
    steps = tokens / (data.seq_len * data.batch_size)
    console.print(
        f"An epoch draws {draws:,} records, about {human(tokens)} tokens: {in_steps(steps)} of "
        f"{data.batch_size} full rows of {data.seq_len:,}."
    )
    failed = [r for r in reports if r.broken_share > data.max_bad_share or not r.good]
    for report in failed:
        share = report.broken_share if report.good else report.bad_share
        text = (
            f"{report.name}: {share:.1%} would be dropped, and data.max_bad_share is "
            f"{data.max_bad_share:.1%}. Mend the data, or change the setting that drops it."
        )
        console.print(Text(text, style="red"))
    return bool(failed)


def in_steps(steps: float) -> str:
    """Tell how many steps an epoch is."""
    if steps < 1:
        return "less than a step"
    return "about one step" if round(steps) == 1 else f"{steps:,.0f} steps"


def _sources(reports: list[SourceReport], max_bad_share: float) -> Table:
    """Lay out one row for each source; sizes are median / largest of the good records."""
    table = Table(
        title="Sources (sizes: median / largest)", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("source", overflow="fold")
    columns = "records", "an epoch", "checked", "good", "images", "tokens", "patches", "targets"
    for column in (*columns, "dropped"):
        table.add_column(column, justify="right")
    for report in reports:
        sizes = [f"{report.quantile(i, 0.5):,} / {report.quantile(i, 1):,}" for i in range(3)]
        numbers = report.records, report.draws, report.checked, report.good, report.images
        dropped = f"{report.bad_share:.1%}"
        if report.broken_share > max_bad_share:
            dropped = f"[red]{dropped}[/red]"
        table.add_row(Text(report.name), *(f"{n:,}" for n in numbers), *sizes, dropped)
    return table


def _reasons(reports: list[SourceReport]) -> Table:
    """Lay out what would be dropped, by source and reason, with the first messages."""
    table = Table(title="What training would drop", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("source", overflow="fold")
    table.add_column("reason", no_wrap=True)
    table.add_column("records", justify="right")
    table.add_column("the first of them", overflow="fold")
    for report in reports:
        for reason, count in report.counts.most_common():
            first = Text("\n".join(report.first[reason]))
            table.add_row(Text(report.name), reason, f"{count:,}", first)
    return table


def main(config: Any) -> int:
    from mmjax.schema import to_dataclass
    from mmjax.train.settings import RunSettings

    settings = to_dataclass(RunSettings, config)
    reports = check(settings, flags.FLAGS.limit, flags.FLAGS.threads)
    console = Console(width=None if sys.stdout.isatty() else 140, soft_wrap=False)
    return int(show(reports, settings, console))


if __name__ == "__main__":
    # Recipes import jax; nothing here may take the memory of a device that another run is using.
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags.DEFINE_integer("limit", None, "records of each source to look at, spread evenly")
    flags.DEFINE_integer("threads", os.cpu_count() or 1, "records read at once")
    run_with_config(main)
