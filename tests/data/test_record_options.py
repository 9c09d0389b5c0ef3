"""What is done with records on their way: augmentation, limits on images, what is too long."""

import numpy as np
import pytest
from stub_processor import StubProcessor, text_of

from mmjax.data.augment import AUGMENTS, augments_of, flip_at_random
from mmjax.data.examples import RecordOptions, make_loader
from mmjax.data.limits import first_images, truncate
from mmjax.data.mixture import Mixture
from mmjax.data.packing import BatchShape
from mmjax.data.pipeline import make_train_iterator
from mmjax.data.skips import Skip
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.flamingo.processor import FlamingoProcessor, ProcessorConfig
from mmjax.types import BadSample, Message, MMJaxError, Record, Segment

RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 256, (2, 6, 3), np.uint8)
SQUARE = RNG.integers(0, 256, (4, 4, 3), np.uint8)


class One:
    """Sixty-four times one record."""

    def __init__(self, record):
        self.record = record

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.record


def talk(*images, question="q", answer="a"):
    return Record((Message("user", question), Message("assistant", answer)), images, {"id": "7"})


def loader(sources, template="simple_chat", seq_len=60, seed=0, processor=None, **options):
    mixture = Mixture.of(sources)
    shape = BatchShape(1, seq_len, 40, 40)
    options = RecordOptions(**options)
    return make_loader(mixture, template, processor or StubProcessor(), shape, seed, options)


def test_what_a_processor_draws_is_drawn_anew_in_every_epoch():
    words = build_word_tokenizer(("User: GPT: q a",))
    options = ProcessorConfig(image_size=4, answer_token=True, attend_mode="random")
    given = dict(template="otter_chat", processor=FlamingoProcessor(options, words))
    load = loader(One(talk(SQUARE)), **given)
    ahead = [[load((0, i, e))["visual_index"][-1] < 0 for i in range(40)] for e in range(2)]
    assert all(10 < sum(of_epoch) < 30 for of_epoch in ahead) and ahead[0] != ahead[1]
    again = loader(One(talk(SQUARE)), **given, augment=("flip",))  # moves with nothing else
    assert [again((0, i, 1))["visual_index"][-1] < 0 for i in range(40)] == ahead[1]


def test_square_padding_and_mirroring_come_by_chance_and_by_epoch():
    load = loader(One(talk(WIDE)), augment=("square_pad",))
    shapes = [len(load((0, i, e))["patches"]) for i in range(32) for e in range(2)]
    assert set(shapes) == {3, 9} and 20 < shapes.count(9) < 44  # 1 x 3 patches, or 3 x 3
    assert [len(load((0, i, e))["patches"]) for i in range(32) for e in range(2)] == shapes
    flip = loader(One(talk(SQUARE)), augment=("flip",))
    plain = loader(One(talk(SQUARE)))((0, 0, 0))["patches"]
    mirrored = loader(One(talk(SQUARE[:, ::-1])))((0, 0, 0))["patches"]
    same = [np.array_equal(flip((0, i, 0))["patches"], plain) for i in range(64)]
    assert 20 < sum(same) < 44
    for i in range(64):
        want = plain if same[i] else mirrored
        np.testing.assert_array_equal(flip((0, i, 0))["patches"], want)


def test_all_images_of_a_record_are_mirrored_together_and_frames_alike():
    video = (SQUARE, WIDE)
    got = [flip_at_random(talk(SQUARE, video), np.random.default_rng(i)).images for i in range(16)]
    states = set()
    for picture, frames in got:
        turned = not np.array_equal(picture, SQUARE)
        states.add(turned)
        for one, plain in ((picture, SQUARE), (frames[0], SQUARE), (frames[1], WIDE)):
            np.testing.assert_array_equal(one, plain[:, ::-1] if turned else plain)
    assert states == {True, False}
    text = talk()
    assert flip_at_random(text, np.random.default_rng(0)) is text


def test_a_changed_picture_leaves_no_numbers_behind():
    asked = talk(SQUARE, question="where?", answer="<box>1, 2, 3, 4</box>")
    text = "<box>1, 2, 3, 4</box> is a place in a picture, which data.augment moves"
    for change in AUGMENTS:
        skip = loader({"a": One(asked)}, augment={"a": (change,)})((0, 0, 0))
        assert skip.reason == "coordinates" and text in skip.message
    pointed = talk(SQUARE, question="what is at <point>1, 2</point>?")
    assert loader(One(pointed), augment=("flip",))((0, 0, 0)).reason == "coordinates"
    both = loader({"a": One(asked), "b": One(talk(SQUARE))}, augment={"b": ("flip",)})
    assert text_of(both((0, 0, 0))["tokens"]).endswith("<box>1, 2, 3, 4</box>")
    loose = talk(SQUARE, answer="a <box> of 3 points")
    assert "origin" in loader(One(loose), augment=("flip",))((0, 0, 0))


def test_drawing_a_resolution_is_not_moved_by_augmentation():
    big = RNG.integers(0, 256, (40, 40, 3), np.uint8)
    sides = dict(resolutions=(4, 6, 8, 10))
    plain, both = (
        loader(One(talk(big)), **sides, **more) for more in ({}, dict(augment=("flip",)))
    )
    counts = [len(plain((0, i, 0))["patches"]) for i in range(16)]
    assert counts == [len(both((0, i, 0))["patches"]) for i in range(16)] and len(set(counts)) == 4
    # Nor does one tell of the other, or a record of that of the same number in another source.
    pairs = [(plain((0, i, 0))["patches"], both((0, i, 0))["patches"]) for i in range(64)]
    assert len({(len(a), np.array_equal(a, b)) for a, b in pairs}) == 8
    two = loader({"a": One(talk(big)), "b": One(talk(big))}, **sides)
    assert [len(two((1, i, 0))["patches"]) for i in range(16)] != counts


def test_changes_and_templates_may_differ_by_source():
    sources = {"a": One(talk(SQUARE)), "b": One(talk(SQUARE))}
    load = loader(
        sources, {"b": "simple_chat", "a": "plain"}, augment={"b": ("flip", "square_pad")}
    )
    assert load.augments == ((), (AUGMENTS["flip"], AUGMENTS["square_pad"]))
    assert text_of(load((0, 0, 0))["tokens"]) == "qa"
    assert text_of(load((1, 0, 0))["tokens"]) == "User:q GPT:a"
    assert load((1, 0, 0))["origin"].name == "b"


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: augments_of(("square_padd",), ("a",)), "did you mean 'square_pad'?"),
        (lambda: augments_of({"lain": ("flip",)}, ("laion",)), "did you mean 'laion'?"),
        (lambda: loader({"a": One(talk())}, {"b": "plain"}), r"template for \['b'\]"),
        (lambda: RecordOptions(max_images=0), "max_images is 0"),
        (lambda: RecordOptions(too_long="cut"), "too_long is 'cut'"),
    ],
)
def test_options_that_do_not_exist_are_named(make, says):
    with pytest.raises(MMJaxError, match=says):
        make()


@pytest.mark.parametrize(
    "texts, limit, expected",
    [
        (("<image>a<image>b<image>c",), 1, ("<image>a b c",)),
        (("<image>a <image> b<image>\nc",), 2, ("<image>a <image> b\nc",)),
        (("<image>\na\n<image>\nb",), 1, ("<image>\na\nb",)),
        (("<image>a", "<image>b", "c<image>"), 2, ("<image>a", "<image>b", "c")),
        (("<image><image><image>what?",), 1, ("<image>what?",)),
        (("no marks",), 2, ("no marks",)),
    ],
)
def test_the_first_images_are_kept_and_the_marks_of_the_others_go(texts, limit, expected):
    images = tuple(range("".join(texts).count("<image>") or 3))
    one = Record(tuple(Message("user", text) for text in texts), images)
    got = first_images(one, limit)
    assert tuple(m.text for m in got.messages) == expected
    assert got.images == images[:limit]
    assert first_images(one, len(images)) is one


def test_marks_that_do_not_fit_the_images_are_left_to_the_template():
    one = talk(SQUARE, SQUARE, SQUARE, question="<image>a<image>b")
    got = loader(One(one), max_images=1)((0, 0, 0))
    assert isinstance(got, Skip) and got.reason == "image_mismatch"
    whole = talk(SQUARE, WIDE, question="<image>a<image>b")
    example = loader(One(whole), max_images=1)((0, 0, 0))
    assert len(example["patches"]) == 4 and example["origin"].images == 1


def test_what_is_too_long_is_cut_on_the_right_while_a_target_is_left():
    """<bos> User:qq GPT: <answer> makes 14 tokens before the answer."""
    long = talk(question="qq", answer="abcdefgh")
    for length, answer in ((30, "abcdefgh"), (20, "abcdef"), (15, "a")):
        example = loader(One(long), seq_len=length, too_long="truncate")((0, 0, 0))
        assert text_of(example["tokens"][example["loss_mask"]]) == answer
        sizes = {len(example[k]) for k in ("tokens", "positions", "loss_mask", "visual_index")}
        assert sizes == {min(length, 23)}
    for too_long in ("truncate", "skip"):
        got = loader(One(long), seq_len=14, too_long=too_long)((0, 0, 0))
        assert isinstance(got, Skip) and got.reason == "too_long"
    assert isinstance(loader(One(long), seq_len=20)((0, 0, 0)), Skip)


def test_visual_rows_behind_a_cut_go_with_it():
    turns = ("user", "<image>q"), ("assistant", "a"), ("user", "<image>r"), ("assistant", "abc")
    one = Record(tuple(Message(*turn) for turn in turns), (WIDE, SQUARE))
    whole = loader(One(one))((0, 0, 0))
    assert len(whole["patches"]) == 3 + 4
    second = int(np.flatnonzero(whole["visual_index"] == 3)[0])
    cut = truncate(whole, second)
    assert len(cut["patches"]) == 3 and cut["visual_index"].max() == 2
    half = truncate(whole, second + 2)
    assert len(half["patches"]) == 5 and half["visual_index"].max() == 4
    assert truncate(whole, len(whole["tokens"])) is whole


WORDS = build_word_tokenizer(["q r a b User: GPT:"])


@pytest.mark.parametrize("mode", ["previous", "next"])
def test_media_whose_mark_is_cut_off_are_seen_by_no_token(mode):
    """In "next", text looks at the image behind it: without its mark it is not there."""
    processor = FlamingoProcessor(
        ProcessorConfig(image_size=4, attend_mode=mode, answer_token=True), WORDS
    )
    segments = [
        *(Segment("text", "q"), Segment("image", 0), Segment("text", "a", True)),
        *(Segment("text", " b", True), Segment("image", 1), Segment("text", "a", True)),
    ]
    whole = processor.encode(segments, [SQUARE, SQUARE[::-1]])
    marks = np.flatnonzero(whole["tokens"] == processor.config.media_token_id)
    assert len(marks) == len(whole["patches"]) == 2
    cut = processor.truncate(whole, int(marks[1]))
    assert len(cut["patches"]) == 1
    before, behind = cut["visual_index"][: marks[0]], cut["visual_index"][marks[0] + 1 :]
    assert set(before) == ({-1} if mode == "previous" else {0})
    assert set(behind) == ({0} if mode == "previous" else {-1})
    with pytest.raises(BadSample, match="no target is among the first 1"):
        processor.truncate(whole, 1)


def test_a_saved_position_belongs_to_its_options():
    def make(**options):
        return make_train_iterator(
            One(talk(SQUARE)), "simple_chat", StubProcessor(), seq_len=60, max_patches=40,
            max_targets=20, batch_size=1, prefetch=0, **options,
        )  # fmt: skip

    state = make(augment=("flip",), too_long="truncate").get_state()
    make(augment=["flip"], too_long="truncate").set_state(state)
    with pytest.raises(MMJaxError, match=r"augment was \['flip'\] and is None"):
        make(too_long="truncate").set_state(state)
    with pytest.raises(MMJaxError, match="too_long was 'truncate' and is None"):
        make(augment=("flip",)).set_state(state)


def test_a_row_of_a_flamingo_is_drawn_as_its_picture():
    processor = FlamingoProcessor(ProcessorConfig(image_size=4, frames=2), WORDS)
    segments = [Segment("image", 0), Segment("text", "a", True)]
    row = processor.encode(segments, [(SQUARE, SQUARE[::-1])])["patches"][0]
    want = np.concatenate([SQUARE, SQUARE[::-1]], axis=1)
    np.testing.assert_array_equal(processor.picture(row), want)
    normalised = processor.config.normalise(row.reshape(2, 4, 4, 3)).reshape(-1)
    np.testing.assert_array_equal(processor.picture(normalised), want)
