"""A miniature of Fuyu's tokenizer with learned pieces, trained offline in milliseconds."""

import json

from mmjax.data.tokenizers_small import UNDERSCORE, build_unigram_tokenizer

CORPUS = (
    "what shape does the image contain?",
    "what colour is the circle in the middle of the picture?",
    "is there a red triangle beside the small blue rectangle?",
    "User: where is the digit? Assistant: near the top left corner.",
    "Generate a coco-style caption.\n",
    "yes no 0 1 2 3 4 5 6 7 8 9 10 20 30 40 50 60 70 80 90",
)


def build_tiny_tokenizer(corpus=CORPUS, num_pieces=200, max_number=64):
    """Learn Unigram pieces from a corpus and add the numbers that coordinates need."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=num_pieces, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    learner.train_from_iterator(list(corpus) * 20, trainer)
    learned = dict(map(tuple, json.loads(learner.to_str())["model"]["vocab"]))
    learned.pop("<unk>", None)
    learned.setdefault(UNDERSCORE, -5.0)
    for number in range(max_number + 1):
        learned.setdefault(str(number), -12.0)
    return build_unigram_tokenizer(sorted(learned.items(), key=lambda item: (-item[1], item[0])))
