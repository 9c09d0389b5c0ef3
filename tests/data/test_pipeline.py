import json
import subprocess
import sys

import numpy as np
import pytest
from stub_processor import StubProcessor, text_of

from mmjax.data.magnifier import MagnifierSource
from mmjax.data.mixture import Mixture
from mmjax.data.pipeline import make_train_iterator
from mmjax.data.skips import Skip, SkipLog, listed_as
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.fuyu.processor import FuyuProcessor
from mmjax.models.fuyu.processor_config import ProcessorConfig
from mmjax.types import BadSample, Message, MMJaxError, Record


class Numbers:
    """Record i answers with its own number; those in ``bad`` are corrupt."""

    def __init__(self, count, name="n", bad=()):
        self.count, self.name, self.bad = count, name, bad

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad:
            raise BadSample("corrupt_image", f"{self.name}.json:{i}: broken")
        picture = np.full((2, 2 * (1 + i % 3), 3), i, np.uint8)
        messages = (Message("user", "q" * (1 + i % 5)), Message("assistant", f"{self.name}{i}"))
        return Record(messages, (picture,), {"id": f"id{i}", "source": self.name, "line": i})


OPTIONS = dict(seq_len=96, max_patches=12, max_targets=24, batch_size=2, prefetch=0)


def train(source, **options):
    return make_train_iterator(source, "fuyu_chat", StubProcessor(), **(OPTIONS | options))


def answers(batch):
    """List the answers in a batch, row by row."""
    found = []
    for row in range(len(batch["tokens"])):
        targets = batch["target_index"][row]
        targets = targets[targets >= 0]
        for segment in np.unique(batch["segment_ids"][row, targets]):
            mine = targets[batch["segment_ids"][row, targets] == segment]
            found.append(text_of(batch["tokens"][row, mine]))
    return found


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_an_epoch_holds_every_record_once_and_the_next_is_shuffled_anew():
    names = [f"n{i}" for i in range(50)]
    one = [a for b in train(Numbers(50), epochs=1) for a in answers(b)]
    assert sorted(one) == sorted(names) and one != names
    two = [a for b in train(Numbers(50), epochs=2) for a in answers(b)]
    assert sorted(two) == sorted(names * 2) and two[:50] != two[50:]
    assert one != [a for b in train(Numbers(50), epochs=1, seed=1) for a in answers(b)]


def test_batches_have_the_contract_and_packing_fills_them():
    it = train(Numbers(50))
    batches = [next(it) for _ in range(20)]
    shapes = {k: (v.shape, v.dtype.name) for k, v in batches[0].items()}
    assert shapes == {
        "tokens": ((2, 96), "int32"),
        "positions": ((2, 96), "int32"),
        "visual_index": ((2, 96), "int32"),
        "segment_ids": ((2, 96), "int32"),
        "patches": ((2, 12, 12), "uint8"),
        "target_index": ((2, 24), "int32"),
        "target_source": ((2, 24), "int32"),
    }
    assert np.mean([(b["segment_ids"] > 0).mean() for b in batches]) > 0.8
    single = next(train(Numbers(50), pack=False))
    assert single["segment_ids"].max(1).tolist() == [1, 1]


@pytest.mark.parametrize("options", [{}, {"prefetch": 2}, {"pack": False}, {"read_threads": 2}])
def test_resume_gives_the_very_next_batch(options):
    source = Numbers(23, bad={4})
    options = options | {"max_bad_share": 0.5}
    it = train(source, **options)
    batches, states = [], [it.get_state()]
    for _ in range(12):
        batches.append(next(it))
        states.append(json.loads(json.dumps(it.get_state())))
    for step in (0, 1, 2, 5, 9):
        resumed = train(source, **options)
        resumed.set_state(states[step])
        # Saved again before it has made a batch, it counts no sample twice.
        assert json.loads(json.dumps(resumed.get_state())) == states[step]
        for want in batches[step:]:
            assert_equal(next(resumed), want)
        assert resumed.skips.counts == it.skips.counts and resumed.skips.seen == it.skips.seen
    it.set_state(states[3])  # an iterator that has run on can be wound back
    assert_equal(next(it), batches[3])


def test_a_state_is_json_whatever_integers_were_given():
    it = train(Numbers(9), seed=np.int64(3), batch_size=np.int64(2))
    next(it)
    state = json.loads(json.dumps(it.get_state()))
    same = train(Numbers(9), seed=3)
    same.set_state(state)
    assert_equal(next(same), next(it))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"seed": -1}, "seed is -1; give a whole number from 0 up"),
        ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
        ({"max_patches": -1}, "max_patches is -1; give 0 or more"),
        ({"num_workers": -1}, "num_workers is -1; give 0"),
        ({"epochs": 0}, "epochs is 0; give 1 or more, or None"),
        ({"process_index": 2}, "process_index 2 of process_count 1"),
    ],
)
def test_numbers_that_no_pipeline_has_are_refused(options, says):
    with pytest.raises(MMJaxError, match=says):
        train(Numbers(9), **options)


def test_resume_refuses_other_options():
    state = train(Numbers(9)).get_state()
    with pytest.raises(MMJaxError, match="seed was 0 and is 3"):
        train(Numbers(9), seed=3).set_state(state)
    with pytest.raises(MMJaxError, match=r"options: source '0' had 9 records and has 1,008\. Rest"):
        train(Numbers(1008)).set_state(state)
    state = train({"a": Numbers(4), "b": Numbers(4)}, weights={"a": 1, "b": 1}).get_state()
    drawn = "an epoch drew 4 times from source 'a' and draws 2 times; an epoch drew 4 times from"
    with pytest.raises(MMJaxError, match=drawn):
        train({"a": Numbers(4), "b": Numbers(4)}, weights={"a": 1, "b": 3}).set_state(state)
    with pytest.raises(MMJaxError, match="'c' was not there; source 'b' is no longer there"):
        train({"a": Numbers(4), "c": Numbers(4)}).set_state(state)
    state = json.loads(json.dumps(train({"b": Numbers(3), "a": Numbers(4)}).get_state()))
    train({"b": Numbers(3), "a": Numbers(4)}).set_state(state)
    with pytest.raises(MMJaxError, match="order of the sources was b, a and is a, b"):
        train({"a": Numbers(4), "b": Numbers(3)}).set_state(state)  # each would be drawn otherwise


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.heavy)])
def test_fuyu_batches_resume_with_and_without_workers(num_workers):
    source = MagnifierSource("train", size=64)
    config = ProcessorConfig(patch_size=8)
    processor = FuyuProcessor(config, build_word_tokenizer(["Which digit User: A. B 0 1 2 3"]))

    def make():
        return make_train_iterator(
            source,
            "fuyu_chat",
            processor,
            **dict(seq_len=512, max_patches=400, max_targets=32, batch_size=2),
            resolutions=(96, 48, 24),
            num_workers=num_workers,
        )

    it = make()
    first = [next(it) for _ in range(3)]
    state = json.loads(json.dumps(it.get_state()))
    rest = [next(it) for _ in range(3)]
    it.close()
    resumed = make()
    resumed.set_state(state)
    for want in rest:
        assert_equal(next(resumed), want)
    resumed.close()
    sizes = set()
    for batch in first:
        for row in range(2):
            here = batch["visual_index"][row] >= 0
            sizes |= set(np.bincount(batch["segment_ids"][row][here])[1:].tolist())
            targets = batch["tokens"][row][batch["target_index"][row]]
            assert processor.eos_token_id in targets
    assert sizes == {144, 36, 9}


def test_draws_depend_on_seed_record_and_epoch_alone():
    def sizes(**options):
        picture = MagnifierSource("train", size=40)
        it = make_train_iterator(
            picture, "fuyu_chat", StubProcessor(), seq_len=3000, max_patches=2304, max_targets=8,
            batch_size=1, pack=False, prefetch=0, resolutions=(96, 48, 24), epochs=2, **options,
        )  # fmt: skip
        return [(b["patches"].sum().item(), (b["visual_index"] >= 0).sum().item()) for b in it]

    whole = sizes()
    assert len(whole) == 80 and {n for _, n in whole} == {2304, 576, 144}
    parts = sizes(process_index=0, process_count=2) + sizes(process_index=1, process_count=2)
    assert sorted(parts) == sorted(whole)
    assert sorted(whole[:40]) != sorted(whole[40:])  # another epoch, other resolutions


def test_processes_share_the_stream_out():
    whole = [a for b in train(Numbers(41), epochs=1) for a in answers(b)]
    parts = [
        [
            a
            for b in train(Numbers(41), epochs=1, process_index=i, process_count=2)
            for a in answers(b)
        ]
        for i in range(2)
    ]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(whole)


def test_mixture_draws_by_weight():
    it = train({"a": Numbers(30, "a"), "b": Numbers(10, "b")}, weights={"a": 1, "b": 3})
    drawn = [x[0] for _ in range(40) for x in answers(next(it))]
    assert 0.7 < drawn.count("b") / len(drawn) < 0.8
    even = Mixture.of([Numbers(30), Numbers(10)])
    assert even.weights == (30.0, 10.0)
    with pytest.raises(MMJaxError, match="source '1' is empty"):
        Mixture.of([Numbers(3), Numbers(0)])
    with pytest.raises(MMJaxError, match="must all be positive"):
        Mixture.of([Numbers(3), Numbers(1)], [1, 0])
    with pytest.raises(MMJaxError, match=r"weights for \['x'\], but sources \['a'\]"):
        Mixture.of({"a": Numbers(1)}, {"x": 1})


def test_bad_samples_are_skipped_counted_and_listed_once(tmp_path):
    it = train(Numbers(60, bad={3, 40}), epochs=3, workdir=tmp_path, max_targets=4)
    found = {a for b in it for a in answers(b)}
    assert found == {f"n{i}" for i in range(60)} - {"n3", "n40"}
    assert it.skips.counts == {"corrupt_image": 6} and it.skips.seen == 180
    listed = [json.loads(x) for x in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(listed, key=lambda x: x["line"]) == [
        dict(id=str(i), source="0", line=i, reason="corrupt_image", message=f"n.json:{i}: broken")
        for i in (3, 40)
    ]
    again = train(Numbers(60, bad={3, 40}), epochs=3, workdir=tmp_path, max_targets=4)
    again.set_state(train(Numbers(60), epochs=3, max_targets=4).get_state())
    list(again)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2


def test_too_long_samples_are_skipped_under_their_own_id(tmp_path):
    it = train(Numbers(10), seq_len=26, epochs=1, workdir=tmp_path)
    kept = [a for b in it for a in answers(b)]
    listed = [json.loads(x) for x in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert 0 < len(kept) < 10 and len(kept) + len(listed) == 10
    assert {x["reason"] for x in listed} == {"too_long"}
    assert all(x["id"] == f"id{x['line']}" and x["source"] == "n" for x in listed)


@pytest.mark.parametrize("epochs", [None, 1])
def test_only_bad_samples_end_with_an_error(epochs):
    it = train(Numbers(70, bad=range(70)), epochs=epochs, max_bad_share=1.0)
    with pytest.raises(MMJaxError, match=r"of \d+ .*unusable \(100.0%.*corrupt_image: \d+\)"):
        next(it)


def test_too_many_bad_samples_end_the_run():
    it = train(Numbers(100, bad=range(0, 100, 10)))
    with pytest.raises(MMJaxError, match=r"allowed 5.0%; corrupt_image: \d+(.|\n)*broken"):
        for _ in range(200):
            next(it)
    assert 100 <= it.skips.seen < 130


def test_bad_samples_of_one_id_are_all_listed(tmp_path):
    path = tmp_path / "skipped.jsonl"
    skips = [Skip("7", "a.json", line, "too_long", "long") for line in (3, 9)]
    log = SkipLog(path, max_bad_share=1.0)
    log.add(4, (*skips, *skips))
    again = SkipLog(path, max_bad_share=1.0)
    again.restore(log.state())
    again.add(2, tuple(skips))
    assert [json.loads(x)["line"] for x in path.read_text().splitlines()] == [3, 9]


def test_the_share_counts_from_the_least_samples_on_and_the_error_says_where_all_stand(tmp_path):
    path = tmp_path / "skipped.jsonl"
    log = SkipLog(path, max_bad_share=0.5, min_samples=4)
    log.add(3, [Skip(str(i), "a.json", i, "too_long", "long") for i in range(3)])
    with pytest.raises(MMJaxError, match="3 of 4 training samples") as error:
        log.add(1, ())
    assert str(error.value).endswith(f"all of them: {path}")


def test_what_the_list_had_no_room_for_is_listed_when_it_comes_again(tmp_path):
    (tmp_path / "full").touch()  # no folder: as good as a full disk
    log = SkipLog(tmp_path / "full" / "skipped.jsonl", max_bad_share=1.0)
    log.add(2, (Skip("7", "a.json", 3, "too_long", "long"),))
    (tmp_path / "full").unlink()
    log.add(2, (Skip("7", "a.json", 3, "too_long", "long"),))
    assert log.bad == 2 and log.path.read_text().count("\n") == 1


def test_a_bad_sample_that_says_what_it_is_keeps_that():
    for own, name in (({"id": "own"}, "own"), ({}, "record")):
        with pytest.raises(BadSample) as found, listed_as({"id": "record"}):
            raise BadSample("corrupt_image", "broken", own)
        assert found.value.meta == {"id": name}


def test_skip_log_checks_its_share():
    with pytest.raises(MMJaxError, match="max_bad_share 5"):
        SkipLog(max_bad_share=5)
    SkipLog(max_bad_share=0.0).add(1000, ())  # none is no more than none
    log = SkipLog()
    log.restore({"seen": 10, "counts": {"x": 2}})
    assert (log.bad, log.seen, log.state()) == (2, 10, {"seen": 10, "counts": {"x": 2}})


def test_what_settings_leave_out_neither_ends_a_run_nor_fills_the_list(tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl", max_bad_share=0.05, min_samples=10)
    left_out = Skip("1", "a", 1, "single_image", "a.tar: one picture")
    broken = Skip("2", "a", 2, "corrupt_image", "a.tar: no picture")
    log.add(100, (left_out,) * 60 + (broken,))
    assert (log.bad, log.broken, log.counts["single_image"]) == (61, 1, 60)
    (listed,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert listed["reason"] == "corrupt_image"
    with pytest.raises(
        MMJaxError, match=r"^11 of 110 .* \(10.0%, .*single_image: 60(.|\n)*no pict"
    ):
        log.add(10, (broken,) * 10)
    alone = SkipLog(max_bad_share=0.05)
    alone.add(999, (left_out,) * 999)
    with pytest.raises(MMJaxError, match=r"1000 of 1000 .*Loosen the settings(.|\n)*one picture"):
        alone.add(1, (left_out,))


def test_data_modules_import_without_jax():
    """Only grain may load jax, and the pipeline works where there is none."""
    code = (
        "import sys, pkgutil, importlib, mmjax.data\n"
        "names = [m.name for m in pkgutil.iter_modules(mmjax.data.__path__)]\n"
        "wanted = [n for n in names if n not in ('pipeline', 'iterator')]\n"
        "[importlib.import_module('mmjax.data.' + n) for n in wanted]\n"
        "import mmjax.models.fuyu.processor\n"
        "assert not {'jax', 'flax', 'grain', 'torch'} & set(sys.modules)\n"
        "sys.modules['jax'] = None\n"
        "import mmjax.data.pipeline\n"
        "assert 'flax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
