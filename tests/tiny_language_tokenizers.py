"""Miniatures of the tokenizers that language models bring, trained offline in milliseconds."""

import json

CORPUS = (
    "A chat between a curious human and an assistant. The assistant gives helpful answers.",
    "### Human: What is in the picture?\n### Assistant: A red circle and a small dog.",
    "User: where is the digit? GPT: near the top left corner.",
    "Question: what colour is it? Short answer: blue. Output: two cats on a sofa",
)


def build_neox_tokenizer(num_pieces=400):
    """Byte-level BPE as GPT-NeoX and MPT have it: no <bos> in front, <|endoftext|> ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(CORPUS) * 4, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end
    )


def build_llama_tokenizer(num_pieces=500, first_only=False):
    """BPE with an underscore and byte fallback as LLaMA has it: <s> in front of every text.

    first_only: as newer files have it, the underscore is put before a text only, not before every
    part behind a special token.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces, special_tokens=[*specials, *bytes_], show_progress=False
    )
    learner.train_from_iterator(list(CORPUS) * 4, trainer)
    learned = json.loads(learner.to_str())
    learned["added_tokens"] = []  # the bytes are ordinary pieces
    learned["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(learned))
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build_llama3_tokenizer(num_pieces=400):
    """Byte-level BPE as LLaMA-3 has it: <|begin_of_text|> in front, <|end_of_text|> ends a text."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = build_neox_tokenizer(num_pieces).backend_tokenizer
    specials = begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)
