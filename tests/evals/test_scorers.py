import pytest

from mmjax.evals import cuts, normalise, scorers
from mmjax.types import BadSample, MMJaxError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Cat. ", "cat"),
        ("a", "a"),
        ("A.", "a"),
        ("an  apple, a pear!", "apple pear"),
        ("3.5", "3.5"),
        ("-7", "-7"),
        ("1,000", "1000"),
        ("1,25", "1,25"),
        ("dark-blue", "dark blue"),
        ("Yes.", "yes"),
        ("?!", "?!"),
        ("it's", "its"),
        ("Cafe\u0301!", "caf\u00e9"),  # one letter, or a letter and its accent
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u093f\u0928\u094d\u0926\u0940"),
    ],
)
def test_plain_normalisation(text, expected):
    assert normalise.plain(text) == expected


def test_exact_match_and_its_strict_variant():
    assert scorers.exact_match("The Red.", ["blue", "red"]) == 1
    assert scorers.exact_match("reddish", ["red"]) == 0
    assert scorers.exact_match("3.5", ["35"]) == 0
    assert scorers.exact_match("5", ["-5"]) == 0
    assert scorers.exact_match("", ["red"]) == 0
    assert scorers.exact_match("\u0915\u093e", ["\u0915\u0940"]) == 0  # they differ by a vowel sign
    assert scorers.exact_match_strict(" red\n", ["red"]) == 1
    assert scorers.exact_match_strict("Red", ["red"]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("well its id", "well its id"),
        ("t-shirt", "t shirt"),
        ("x -y t-shirt", "x y tshirt"),  # it touches a space somewhere
        ("The\nend", "end"),
        ("hes here", "he's here"),
        ("lets go", "lets go"),
        ("couldntve", "couldntve"),
        ("yall'd've", "y'all'd've"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_official_normalisation(text, expected):
    assert normalise.official(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("The Dog's bowl?", "dog 's bowl"),
        ("1,000 km", "1000 km"),
        ("red, white", "red white"),
        ("Two\nt-shirts", "2 t shirts"),
        ("none", "0"),
    ],
)
def test_the_form_that_is_sent_to_evalai(text, expected):
    assert normalise.evalai(text) == cuts.get_cut("evalai")(text) == expected


@pytest.mark.parametrize(
    ("equal", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)]
)
def test_vqa_accuracy_formula(equal, accuracy):
    answers = ["cat"] * equal + [f"other {i}" for i in range(10 - equal)]
    assert scorers.vqa_accuracy("Cat.", answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("said", "answers", "accuracy"),
    [
        ("the cat", ["the cat"] * 9 + ["dog"], 1.0),  # articles go on both sides
        ("a cat", ["the cat"] * 5 + ["Cat."] * 5, 1.0),
        ("two", ["two"] * 3 + ["2"] + ["3"] * 6, 1.0),  # and number words become digits
        ("2", ["two"] * 2 + ["3"] * 8, 0.6),
        ("none", ["none", *"123456789"], 0.3),
        ("dont know", ["don't know"] * 5 + ["yes"] * 5, 1.0),
        # Where all humans agree, nothing is normalised: it may be text that was read.
        ("STOP", ["STOP"] * 10, 1.0),
        ("stop", ["STOP"] * 10, 0.0),
        ("yes.", ["yes"] * 10, 0.0),
        (" yes\n", ["yes", "yes "] * 5, 1.0),  # white space at the ends is no disagreement
    ],
)
def test_vqa_accuracy_normalises_both_sides_where_humans_differ(said, answers, accuracy):
    assert scorers.vqa_accuracy(said, answers) == pytest.approx(accuracy)


def test_vqa_accuracy_refuses_single_answers():
    with pytest.raises(MMJaxError, match="exact_match"):
        scorers.vqa_accuracy("cat", ["cat"])


OPTIONS = ["a man", "cat", "dog.", "7"]


@pytest.mark.parametrize(
    ("text", "strict", "option_text", "otter"),
    [
        ("A", "A", "A", "A"),
        (" b. cat", "B", "B", "B"),
        ("(C)", "C", "C", "C"),
        ("D: because", "D", "D", "D"),
        ("B\ncat", "B", "B", "B"),
        ("The answer is C", "C", "C", "C"),
        ("I think the answer is: (b).", "B", "B", "A"),  # the a of "answer"
        ("seven", None, None, None),
        ("brown", None, None, "B"),
        ("it is a doG!", None, None, "C"),
        ("A man", None, "A", "A"),  # the trap: an article is no option
        ("A man with a dog", None, None, "A"),
        ("The answer is A man", None, None, "A"),
        ("A or B", None, None, "A"),
        ("A, B", None, None, "A"),
        ("B, a furry cat", "B", "B", "B"),  # an article is no second option
        ("b, a or c", None, None, "A"),
        ("The answer is C, a dog.", "C", "C", "C"),
        ("The answer is C, D.", None, None, "C"),
        ("cat", None, "B", "B"),
        ("the dog", None, "C", "C"),
        ("E", None, None, None),
        ("", None, None, None),
        ("CAT", None, "B", "A"),
        ("the answer is A. No, the answer is B.", None, None, "A"),
    ],
)
def test_parse_choice(text, strict, option_text, otter):
    assert scorers.parse_choice(text, OPTIONS) == strict
    assert scorers.parse_choice(text, OPTIONS, "option_text") == option_text
    assert scorers.parse_choice(text, OPTIONS, "otter") == otter


def test_there_are_as_many_letters_as_options_and_a_text_may_be_of_two():
    assert scorers.parse_choice("E.", list("vwxyz")) == "E"
    assert scorers.parse_choice("C.", ["cat", "dog"]) is None
    assert scorers.parse_choice("cat", ["cat", "dog", "cat"], "option_text") is None


def test_multiple_choice_takes_letters_and_texts_as_answers():
    assert scorers.multiple_choice("B.", ["B"], OPTIONS) == 1
    assert scorers.multiple_choice("B.", ["cat"], OPTIONS) == 1
    assert scorers.multiple_choice("A man", ["A"], OPTIONS) == 0
    assert scorers.multiple_choice_otter("A man", ["A"], OPTIONS) == 1
    assert scorers.multiple_choice_text("a man.", ["A"], OPTIONS) == 1


def test_an_answer_that_is_a_letter_and_the_text_of_another_option_is_refused():
    """Options may be letters themselves; whether ``A`` names or quotes one nobody can tell."""
    with pytest.raises(BadSample, match="'A' is the letter of one option and the text of another"):
        scorers.multiple_choice("A", ["A"], ["B", "A", "C"])
    assert scorers.multiple_choice("A", ["A"], ["A", "B", "C"]) == 1
    in_brackets = [scorers.multiple_choice(x, ["(A)"], ["B", "A", "C"]) for x in "AB"]
    assert in_brackets == [1, 0]
    with pytest.raises(BadSample, match=r"none of the right answers \['AB'\]"):
        scorers.multiple_choice("A", ["AB"], ["x", "y"])


def test_options_of_the_same_text_are_all_right():
    options = ["cat", "dog", "cat"]
    assert [scorers.multiple_choice(x, ["cat"], options) for x in "ABC"] == [1, 0, 1]
    assert [scorers.multiple_choice(x, ["A"], options) for x in "ABC"] == [1, 0, 0]


def test_unknown_scorer_names_the_nearest():
    with pytest.raises(MMJaxError, match="did you mean 'exact_match'"):
        scorers.get_scorer("exact_mach")
