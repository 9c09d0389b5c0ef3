"""Write bunny_processor.json and .npz: tokens, labels and padded pixels of Bunny's own code.

Runs conversation.py, util/data_utils.py and util/mm_utils.py of BAAI-DCAI/Bunny as published, which
import with torch, transformers and Pillow alone. Made with commit 43fc277 (the branch with every
template, gemma's too), torch 2.13.0, transformers 5.23.0, Pillow 13.0.0:

    python tests/golden/make_bunny_processor_goldens.py PATH_OF_A_CHECKOUT

The JSON holds the tokenizers' files, the peer's strings, and for every tokenizer and conversation
its ids (-200 is the image) and which of them are labels; the .npz ``process_images`` with
``image_aspect_ratio`` "pad", float32[3,14,14] a picture.
"""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from make_flamingo_processor_goldens import picture
from tiny_language_tokenizers import (
    build_llama3_tokenizer,
    build_llama_tokenizer,
    build_neox_tokenizer,
)

SIDE = 14
SIZES = [(1, 60), (60, 1), (33, 77), (200, 31), (31, 200), (50, 50), (7, 8), (9, 6)]
MAX_LENGTH = 300
NEAR = "near the limit"  # a conversation of so many tokens, with three ends, is cut

# Name -> (the peer's --version, builder). Pad is <eos> for the first and the third, as for Phi and
# LLaMA-3 in the peer's train.py, <unk> for the others, as for MiniCPM.
TOKENIZERS = {
    "phi": ("bunny", build_neox_tokenizer),
    "minicpm": ("minicpm", build_llama_tokenizer),
    "llama3": ("llama", build_llama3_tokenizer),
    "minicpm_first": ("minicpm", lambda: build_llama_tokenizer(first_only=True)),
    "llama3_as_bunny": ("bunny", build_llama3_tokenizer),
}


def turns(*texts, image=True):
    return {"image": image, "texts": texts}


# Questions and answers by turns. Two or more, and the marks move, stay or are left out.
CONVERSATIONS = {
    "single": turns("<image>\nWhat is in the picture?", "A red circle and a small dog."),
    "several": turns(
        *("<image>\nWhat colour is it?", "Blue.", "Is there a dog?", "Yes, a small one."),
        *("Where?", "Near the top left corner."),
    ),
    "text only": turns(
        "Write a poem.", "Roses are red.", "Another.", "Cats on a sofa", image=False
    ),
    "image later": turns("Hello!", "Hello.", "And this?\n<image>", "Two cats."),
    "mark alone": turns("<image>", "A dog."),
    "mark inside": turns("What <image> is\n this? ", "A sofa."),
    "two images": turns("<image>\nThis?", "A cat.", "<image>\nAnd this?", "A dog."),
    "unicode": turns("<image>\nnaïve 漢字 🙂?", "Ça: 漢字, naïve 🙂🙂\u00a0é"),
    "role words": turns("<image>\nWho speaks?", "USER: me. ASSISTANT:you. ### Human: GPT: x"),
    "spaces": turns("<image>\n  Two  spaces ? \n", " A  red dog. ", "And ? ", "\n\nYes\n"),
    "spaces in text": turns(" Say it. ", "  1 2  3 ", "\tAgain\n", "5", image=False),
    "long": turns("<image>\nTell me.", "The assistant gives helpful answers. " * 12),
    "answer first": turns("", "Hello there.", "<image>\nWhat?", "A dog."),
}
# What the peer loses, wholly or in part.
LOST = {
    "role in an answer": turns("<image>\nSay it.", "One ASSISTANT: two.", "And?", "Three."),
    "role in a question": turns("<image>\nWhat does ASSISTANT: mean?", "A helper."),
    "question ends in the role": turns("<image>\nGo on: ASSISTANT:", "A dog."),
    "end in an answer": turns("<image>\nSay it.", "One {end} two."),
    "no last answer": turns("<image>\nOne?", "Two.", "Three?"),
    "an empty answer": turns("<image>\nOne?", "", "Three?", "Four."),
    "two in a message": turns("<image>\nWhich of these? <image>", "The first."),
}


def lengthened(words):
    """Write three text-only turns whose last answer has so many words."""
    return turns("One?", "Two.", "Three?", "Four.", "Five?", " ".join(["dog"] * words), image=False)


def sources(case, end):
    """Write a conversation as the peer's JSON holds it; a first empty question is left out."""
    texts = [text.replace("{end}", end) for text in case["texts"]]
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return said[1:] if not said[0]["value"] else said


def main(checkout):
    sys.path.insert(0, checkout)
    from bunny import conversation
    from bunny.util import data_utils, mm_utils

    def run(version, tokenizer, case):
        conversation.default_conversation = conversation.conv_templates[version]
        said = [copy.deepcopy(sources(case, conversation.default_conversation.sep2 or ""))]
        if case["image"]:
            said = data_utils.preprocess_multimodal(said, data_utils.DataArguments())
        made = data_utils.preprocess(said, tokenizer, has_image=case["image"])
        ids, labels = (np.asarray(made[key][0]) for key in ("input_ids", "labels"))
        assert ((labels == -100) | (labels == ids)).all()
        return {"ids": ids.tolist(), "labels": "".join(".x"[int(x != -100)] for x in labels)}

    found = {"tokenizers": {}, "strings": {}, "cases": {}, "lost": {}, "plain": {}}
    for name, (version, build) in TOKENIZERS.items():
        tokenizer = build()
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.model_max_length = MAX_LENGTH
        about = {k: getattr(tokenizer, k) for k in ("bos_token", "eos_token", "pad_token")}
        found["tokenizers"][name] = {"file": tokenizer.backend_tokenizer.to_str(), **about}
        if name.endswith("_bunny") or name.endswith("_first"):
            kept = {"several": CONVERSATIONS["several"]}
        else:
            kept = LOST
            found["cases"][name] = {k: run(version, tokenizer, c) for k, c in CONVERSATIONS.items()}
            found["plain"][name] = run("plain", tokenizer, CONVERSATIONS["single"])
        found["lost"][name] = {k: run(version, tokenizer, c) for k, c in kept.items()}
        if name == "phi":  # the first length at which nothing of three turns is left
            for words in range(1, 400):
                made = run(version, tokenizer, lengthened(words))
                if "x" not in made["labels"]:
                    found["lost"][name][NEAR] = {**made, "words": words}
                    break
    for version in conversation.conv_templates:
        one = conversation.conv_templates[version].copy()
        for i, text in enumerate(("<image>\nQ1", "A1", "Q2", None)):
            one.append_message(one.roles[i % 2], text)
        if one.sep2:
            found["strings"][version] = one.get_prompt()
    folder = Path(__file__).parent
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    (folder / "bunny_processor.json").write_text(text + "\n")

    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    square = {"height": SIDE, "width": SIDE}
    processors = {
        "siglip": SiglipImageProcessorPil(
            size=square, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
        ),
        "clip": CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square),
    }
    pad = SimpleNamespace(image_aspect_ratio="pad")
    arrays = {}
    for kind, processor in processors.items():
        images = [Image.fromarray(picture(w, h)) for w, h in SIZES]
        pixels = mm_utils.process_images(images, processor, pad)
        for (w, h), one in zip(SIZES, pixels, strict=True):
            arrays[f"{kind}/{w}x{h}"] = one.numpy()
    np.savez_compressed(folder / "bunny_processor.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
