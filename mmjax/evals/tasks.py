"""Tasks: questions with right answers, how they are asked and how they are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from mmjax.data.limits import spread
from mmjax.data.resizing import list_resolutions
from mmjax.data.turns import IMAGE_MARK
from mmjax.evals.benchmarks import expand
from mmjax.evals.cuts import get_cut
from mmjax.evals.scorers import get_scorer
from mmjax.evals.submissions import get_submission
from mmjax.evals.summaries import Summary, get_summary
from mmjax.schema import to_dataclass
from mmjax.types import MMJaxError, Record


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark.

    name: under which results are kept; one name a task. source: a sequence of records, or the
        description of one for ``data.catalog.make_source``; ``meta["answers"]`` holds the right
        answers, or else the last assistant turn is the answer.
    split: the name of a task's only result, and of its file for a server.
    scorer: a name in ``scorers.SCORERS``, of what judges one answer. summary: a name in
        ``summaries.SUMMARIES``, of what is worked out from all of them, or None.
    submission: a name in ``submissions.SUBMISSIONS``, of the file for a benchmark's server that is
        written beside the predictions, or None.
    prompt: how the question is asked, such as ``"{question} Answer with one word."``; None asks it
        as it is.
    rank: how one of the options is taken for the answer: the one of the highest ``likelihood``
        behind the prompt, or ``mean_likelihood`` of its tokens, as if the model had said its letter
        (with the scorers of multiple choice) or its text. None lets the model write an answer.
        options: those of every question; () takes those of the record.
    cut: a name in ``cuts.CUTS``, of what is cut away from an answer before it is scored; None
        scores it as it is.
    resolutions: longest sides in pixels at which the same questions are asked, None for the
        pictures as they are. They need not be among those of training, and may be larger.
        enlarge: scale smaller pictures up to the resolution; without it they stay as they are, and
        a resolution above their size is their size.
    limit: questions, spread evenly over the source; None for all. Questions that are judged
        together stay together. max_new_tokens: of an answer, at most.
    shots: solved examples before each question, drawn from ``demos``, a source or its description;
        text_shots: so many without their pictures. They are asked by the same ``prompt``. See
        ``evals.few_shot``. rices: the file or folder of a CLIP, by which the examples are those
        whose pictures are most like the question's; rices_config: its published name or a JSON
        file, where nothing there tells its sizes. orders: in so many orders of the examples
        options are ranked, by the mean; None in one.
    train: training records (or their description), from which blind baselines are made: the most
        frequent answer, and the most frequent answer to the same question; train_limit: so many of
        them at most, evenly spread.
    chance: accuracy of guessing; None works it out for options. group: the key of
        ``meta`` by which accuracy is broken down. pictures: how many the report shows.
    """

    name: str
    source: Any
    split: str = "test"
    scorer: str = "exact_match"
    summary: str | None = None
    submission: str | None = None
    prompt: str | None = None
    rank: Literal["likelihood", "mean_likelihood"] | None = None
    options: tuple[str, ...] = ()
    cut: str | None = None
    resolutions: tuple[int | None, ...] = (None,)
    enlarge: bool = False
    max_new_tokens: int = 16
    limit: int | None = None
    shots: int = 0
    text_shots: int = 0
    demos: Any = None
    rices: str | None = None
    rices_config: str | None = None
    orders: int | None = None
    train: Any = None
    train_limit: int = 50_000
    chance: float | None = None
    group: str = "group"
    pictures: int = 24

    def __post_init__(self):
        for name in ("source", "demos", "train"):
            given = getattr(self, name)
            # Lists and mixtures of others' own alike: whatever has a length and items.
            held = hasattr(given, "__getitem__") and not isinstance(given, str | bytes)
            if not held and (name == "source" or given is not None):
                raise MMJaxError(
                    f"task {self.name}: {name} is {given!r}; describe a source, such as "
                    '{"kind": "json", "path": "test.json"}, or give its records'
                )
        get_scorer(self.scorer)
        if self.summary is not None:
            get_summary(self.summary)
        if self.submission is not None:
            get_submission(self.submission)
        if self.cut is not None:
            get_cut(self.cut)
        if self.cut == "evalai" and self.scorer == "vqa_accuracy_evalai":
            raise MMJaxError(
                f"task {self.name}: cut 'evalai' and scorer 'vqa_accuracy_evalai' bring an answer "
                "into the same form, and twice is another one ('whats', \"what's\", \"what 's\"); "
                "leave cut out"
            )
        if self.options and (self.rank is None or len(set(self.options)) < 2):
            raise MMJaxError(
                f"task {self.name}: options {self.options} with rank {self.rank!r}; give two or "
                "more different texts and rank='likelihood', or leave options out"
            )
        if self.summary == "roc_auc" and not self.options:
            raise MMJaxError(
                f"task {self.name}: summary 'roc_auc' is of the last of a task's options; give "
                "rank and options, such as ('no', 'yes')"
            )
        if self.summary == "top_5" and (self.rank is None or self.is_multiple_choice):
            raise MMJaxError(
                f"task {self.name}: summary 'top_5' is of the texts of ranked options; give "
                "rank='mean_likelihood' and scorer='exact_match_strict'"
            )
        if self.rank is not None and self.cut is not None:
            raise MMJaxError(
                f"task {self.name}: cut {self.cut!r} with rank {self.rank!r}, which takes an "
                "option as it stands; leave cut out"
            )
        if not self.resolutions or len(set(self.resolutions)) != len(self.resolutions):
            raise MMJaxError(
                f"task {self.name}: resolutions {self.resolutions} must be one or more different "
                "longest sides (None for the full picture)"
            )
        try:
            list_resolutions(self.resolutions)
        except MMJaxError as error:
            raise MMJaxError(f"task {self.name}: {error}") from error
        least = dict(limit=1, max_new_tokens=1, train_limit=1, orders=2)
        least |= dict(shots=0, text_shots=0, pictures=0)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise MMJaxError(f"task {self.name}: {name} is {value}; give at least {bound}")
        if self.chance is not None and not 0 <= self.chance <= 1:
            raise MMJaxError(
                f"task {self.name}: chance is {self.chance}; it is a share, from 0 to 1"
            )
        if bool(self.shots or self.text_shots) != (self.demos is not None) or (
            self.shots and self.text_shots
        ):
            raise MMJaxError(
                f"task {self.name}: shots {self.shots}, text_shots {self.text_shots} and demos "
                f"{self.demos!r}: give one of the two numbers together with demos"
            )
        if self.demos is None and (self.rices is not None or self.orders is not None):
            given = "rices" if self.rices is not None else "orders"
            raise MMJaxError(
                f"task {self.name}: {given} {getattr(self, given)!r} is about the examples before "
                "a question; give shots and demos, or leave it out"
            )
        if self.rices_config is not None and self.rices is None:
            raise MMJaxError(
                f"task {self.name}: rices_config {self.rices_config!r} without rices; give the CLIP"
            )
        if self.orders is not None and self.rank is None:
            raise MMJaxError(
                f"task {self.name}: orders {self.orders} without rank: written answers have no "
                "mean; give rank='mean_likelihood', or leave orders out"
            )
        if self.prompt is not None and "{question}" not in self.prompt:
            raise MMJaxError(f"task {self.name}: the prompt {self.prompt!r} lacks '{{question}}'")

    @property
    def is_multiple_choice(self) -> bool:
        return self.scorer.startswith("multiple_choice")

    @property
    def has_open_questions(self) -> bool:
        """Tell a scorer of open questions among those with options."""
        return self.scorer.startswith("mmmu")

    @property
    def summariser(self) -> Summary | None:
        """Return what ``summary`` names."""
        return None if self.summary is None else get_summary(self.summary)

    def result_key(self, resolution: int | None) -> str:
        """Name one result: the split, or in a sweep the resolution (``48``, ``full``)."""
        if self.resolutions == (None,):
            return self.split
        return "full" if resolution is None else str(resolution)


def vqa(name: str, source: Any, **options: Any) -> Task:
    """Make a task of open questions, scored by normalised exact match unless told otherwise."""
    return Task(name, source, **({"scorer": "exact_match"} | options))


def multiple_choice(name: str, source: Any, **options: Any) -> Task:
    """Make a task of questions with lettered options, scored by the strict parser."""
    return Task(name, source, **({"scorer": "multiple_choice", "max_new_tokens": 8} | options))


def make_task(config: Mapping[str, Any] | Task, path: str = "config.eval.tasks") -> Task:
    """Make a task from its settings, or those of a benchmark (``evals.benchmarks``).

    Raises MMJaxError for unknown keys and wrong types.
    """
    if not isinstance(config, Task) and "benchmark" in config:
        config = expand(config, path)
    return to_dataclass(Task, config, path)


def open_source(source: Any) -> Sequence[Record]:
    """Return the records of a task: those it holds, or those its description names."""
    if isinstance(source, Mapping):
        from mmjax.data.catalog import make_source

        return make_source(source)
    return source


def chosen(source: Sequence[Record], limit: int | None) -> list[int]:
    """Return the indices of the questions to ask: at most ``limit``, evenly spread.

    Where a source says which questions are judged together (``units``, tuples of indices), whole
    units are taken: as many as the limit holds, and one at the least.
    """
    units = getattr(source, "units", None)
    if units is None or limit is None:
        return spread(len(source), limit)
    size = max(len(unit) for unit in units)
    return [i for place in spread(len(units), max(1, limit // size)) for i in units[place]]


def ask(task: Task, record: Record) -> Record:
    """Return the record with its last question laid out by the task's prompt."""
    if task.prompt is None:
        return record
    messages = list(record.messages)
    place = max((i for i, m in enumerate(messages) if m.role == "user"), default=None)
    if place is None:
        raise MMJaxError(
            f"task {task.name}: record {record.meta.get('id', '?')} has no question for the prompt "
            f"{task.prompt!r}; leave the prompt away, or ask something in each record"
        )
    text = task.prompt.replace("{question}", messages[place].text)
    messages[place] = dataclasses.replace(messages[place], text=text)
    return dataclasses.replace(record, messages=tuple(messages))


def question_of(record: Record) -> str:
    """Return the last question of a record, without its image marks."""
    texts = [m.text for m in record.messages if m.role == "user"]
    return texts[-1].replace(IMAGE_MARK, "").strip() if texts else ""


def choices_of(record: Record) -> list[str]:
    """Return the options of a record, in the order of their letters; none where it has none.

    Raises MMJaxError for what is no list.
    """
    choices = record.meta.get("choices") or ()
    if not isinstance(choices, list | tuple):
        raise MMJaxError(
            f"record {record.meta.get('id', '?')} of {record.meta.get('source', '?')}: its choices "
            f"are {choices!r}; give a list, A first"
        )
    return [str(choice) for choice in choices]


def options_of(task: Task, record: Record) -> list[str]:
    """Return what is ranked to answer a record; raises MMJaxError for fewer than two texts."""
    options = list(task.options) or choices_of(record)
    if len(options) < 2 or any(IMAGE_MARK in text or not text.strip() for text in options):
        raise MMJaxError(
            f"task {task.name}: record {record.meta.get('id', '?')} has the options {options}, and "
            f"rank {task.rank!r} needs two or more texts; give the task options, or leave rank out"
        )
    return options


def answers_of(record: Record) -> list[str]:
    """Return the right answers of a record; raises MMJaxError where it has none."""
    answers = record.meta.get("answers")
    if answers is None and record.messages and record.messages[-1].role == "assistant":
        answers = [record.messages[-1].text]
    if not answers:
        raise MMJaxError(
            f"record {record.meta.get('id', '?')} of {record.meta.get('source', '?')} has no "
            "answers: set meta['answers'] or end it with an assistant turn"
        )
    several = isinstance(answers, Iterable) and not isinstance(answers, str)
    return [str(a) for a in (answers if several else [answers])]
