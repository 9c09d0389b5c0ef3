"""Tokens of the stream that a record's own text holds: an answer with an end mark is refused."""

import numpy as np
import pytest

from mmjax.data.templates import get_template
from mmjax.data.tokenizers_small import build_word_tokenizer
from mmjax.models.flamingo.processor import FlamingoProcessor, ProcessorConfig
from mmjax.models.fuyu.processor import FuyuProcessor
from mmjax.models.language.processor import LanguageProcessor
from mmjax.models.token_stream import check_answers, check_ends, check_length
from mmjax.types import BadSample, Message, MMJaxError, Record, Segment

WORDS = ["what is it red User: Assistant: GPT:"]
EOS, EOC = "|ENDOFTEXT|", "<|endofchunk|>"
FUYU, LANGUAGE = (
    kind(tokenizer=build_word_tokenizer(WORDS)) for kind in (FuyuProcessor, LanguageProcessor)
)
FLAMINGO = FlamingoProcessor(
    ProcessorConfig(image_size=8, answer_token=True), build_word_tokenizer(WORDS)
)


@pytest.mark.parametrize(
    "processor, template, ends, learnt",
    [
        (FUYU, "fuyu_chat", [EOS], [EOS]),
        (FLAMINGO, "otter_chat", [EOS, EOC], [EOC, EOS]),
        (FLAMINGO, "laion_caption", [EOS, EOC], [EOC, EOS]),
        (LANGUAGE, "plain", [EOS], [EOS]),
    ],
)
def test_an_answer_that_holds_an_end_mark_is_a_bad_sample(processor, template, ends, learnt):
    def encode(question, answer):
        images = () if processor is LANGUAGE else (np.zeros((8, 8, 3), np.uint8),)
        turns = (Message("user", question), Message("assistant", answer))
        return processor.encode(get_template(template)(Record(turns, images)), images)

    for question in ("what is it", *(f"what {end} is it" for end in ends)):
        example = encode(question, "red")  # nothing is learnt from a question
        targets = processor.tokenizer.convert_ids_to_tokens(example["tokens"][example["loss_mask"]])
        assert [token for token in targets if token in ends] == learnt
    for end in ends:
        with pytest.raises(BadSample, match="an answer itself holds a token that ends it") as error:
            encode("what is it", f"red {end} it")
        assert error.value.reason == "end_mark"


@pytest.mark.parametrize("template, mark", [("otter_chat", "eoc"), ("bunny_chat", "endoftext")])
def test_a_language_model_is_not_trained_on_answers_whose_end_it_lacks(template, mark):
    turns = (Message("user", "what is it"), Message("assistant", "red"))
    segments = get_template(template)(Record(turns))
    with pytest.raises(MMJaxError, match=f"no special token '.*{mark}.*another family's"):
        LANGUAGE.encode(segments, ())


def test_a_language_model_is_not_trained_without_an_end_that_its_tokenizer_lacks():
    tokenizer = build_word_tokenizer(WORDS)
    tokenizer.eos_token = None
    turns = (Message("user", "what is it"), Message("assistant", "red"))
    with pytest.raises(MMJaxError, match="eos_token, and it has none; name one"):
        LanguageProcessor(tokenizer).encode(get_template("plain")(Record(turns)), ())


def test_an_end_of_a_question_makes_no_room_for_one_inside_an_answer():
    """As Idefics's, which closes a question with one that is no target."""
    eos, answer = Segment("special", "eos", True), Segment("text", "a", True)
    segments = [Segment("text", "q"), Segment("special", "eos"), answer, eos]
    loss = np.array([False, False, True, True, True])
    check_ends(segments, np.array([5, 2, 6, 7, 2]), loss, {"eos": 2})
    with pytest.raises(BadSample, match="an answer itself holds a token that ends it"):
        check_ends(segments, np.array([5, 2, 6, 2, 2]), loss, {"eos": 2})


def test_an_end_mark_alone_may_be_a_target_and_an_answer_of_spaces_may_not():
    question, eos = Segment("text", "q"), Segment("special", "eos", True)
    spaces = Segment("text", " \u200b", True)  # the second is as wide as nothing
    check_answers([question, eos], bare_end=True)
    for segments, bare_end in (([question, eos], False), ([question, spaces, eos], True)):
        with pytest.raises(BadSample, match="an answer is empty"):
            check_answers(segments, bare_end=bare_end)


def test_a_sample_as_long_as_the_limit_is_taken():
    check_length(8, 8)
    with pytest.raises(BadSample, match="the sample makes 9 tokens, above max_tokens = 8"):
        check_length(9, 8)
