"""Write flamingo_documents.json: what OpenFlamingo's own loader makes of documents and shards.

Runs preprocess_interleaved and group_by_keys_nothrow of open-flamingo 2.0.1 as published, with a
tokenizer that only notes the text it is given, and an image processor that notes the picture. The
environment is that of ``make parity-flamingo``, with two packages more:

    pip install --no-deps --target /tmp/peer webdataset==1.0.2 braceexpand==0.1.7
    PYTHONPATH=/tmp/peer .venv-flamingo/bin/python tests/golden/make_flamingo_document_goldens.py

Holds for each of ``documents()`` the text and the pictures in order, or the words of the rejection,
and for ``MEMBERS`` the samples they are grouped into.
"""

import base64
import io
import json
import random
import sys
from pathlib import Path

from PIL import Image

THRESHOLD, MOST, FEWEST = 0.24, 4, 1
MEMBERS = [
    *("a/0001.jpg", "a/0001.txt", "a/0001.json", "a/0002.JPG", "a/0002.seg.png", "a/0002.txt"),
    *("a/0002.txt", "b/0002.jpg", "README", "c.d/x.txt", "c.d/x.jpg", "c.d/y.z.jpg"),
]


def picture(number, size=11_000):
    """Draw a picture that shows its number, in exactly so many bytes: base64 of a PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 100, 0)).save(buffer, "PNG")
    data = buffer.getvalue()
    return base64.b64encode(data + bytes(size - len(data))).decode()


def document(sentences, matrix, sizes=None, absent=()):
    """Write an MMC4 document; sizes: bytes of each picture; absent: those without."""
    sizes = sizes or [11_000] * len(matrix)
    info = [{"image_name": f"{i}.png"} for i in range(len(matrix))]
    for i, one in enumerate(info):
        if i not in absent:
            one["image_base64"] = picture(i, sizes[i])
    return {"text_list": list(sentences), "image_info": info, "similarity_matrix": matrix}


def chat(text, pictures):
    """Write a ChatGPT sequence."""
    held = {f"_!_IMAGE{i + 1}_!_": {"base64_image": picture(i)} for i in range(pictures)}
    return {"is_gpt": True, "example": text, "image_map": held}


def documents():
    """Return name -> document: each rule alone, then forty at random."""
    abc, low = ["Aa.", "Bb.", "Cc."], [0.1, 0.1, 0.1]
    a, b, c = [0.5, 0.2, 0.1], [0.2, 0.5, 0.1], [0.1, 0.2, 0.5]
    found = {
        "in order": document(abc, [a, c]),
        "text before the first": document(abc, [b, c]),
        "sentences in another order": document(abc, [c, a, b]),
        "two at one sentence": document(abc, [b, b, c]),
        "just large enough": document(abc, [a, b, c], [10_999, 11_000, 500_000]),
        "at the threshold": document(abc, [[0.24, 0.0, 0.1], [0.1, 0.2399, 0.2], c]),
        "more than the most": document(abc, [c, b, a, b, a, c]),
        "one could not be fetched": document(abc, [a, b, c], absent=(1,)),
        "spaces at the ends": document(["Aa. ", " Bb.", "Cc."], [a, b, c]),
        "none is left": document(abc, [low, low]),
        "no picture": document(abc, []),
        "one picture": document(abc, [a, low]),
        "chat": chat("See _!_IMAGE1_!_ here. And _!_IMAGE2_!_there.", 2),
        "chat that begins with one": chat("_!_IMAGE1_!_ One._!_IMAGE2_!_ Two.", 2),
        "chat with the most": chat(" ".join(f"_!_IMAGE{i}_!_ {i}." for i in range(1, 5)), 4),
        "chat with more": chat(" ".join(f"_!_IMAGE{i}_!_ {i}." for i in range(1, 7)), 6),
        "chat in another order": chat("_!_IMAGE2_!_ Two. _!_IMAGE1_!_ One.", 2),
    }
    rng = random.Random(0)
    for number in range(40):
        texts = [f"Sentence {i}." for i in range(rng.randint(1, 8))]
        matrix = [[rng.random() * 0.4 for _ in texts] for _ in range(rng.randint(2, 8))]
        sizes = [rng.choice([10_500, 11_000, 40_000, 12_345]) for _ in matrix]
        absent = {i for i in range(len(matrix)) if rng.random() < 0.2}
        found[f"random {number}"] = document(texts, matrix, sizes, absent)
    return found


def main():
    import torch
    from flamingo_peer import import_peer

    import_peer()
    import open_flamingo

    sys.path.insert(0, str(Path(open_flamingo.__file__).parent / "train"))
    import data

    class Tokenizer:
        """Notes the text; an id for each mark is all that the peer looks at."""

        eos_token = "</s>"
        additional_special_tokens = ("<|endofchunk|>", "<image>")
        additional_special_tokens_ids = (1, 2)

        def __call__(self, text, **_):
            self.text = text
            ids = torch.tensor([[2] * text.count("<image>") + [3]])
            return {"input_ids": ids, "attention_mask": ids > 0}

    def note(image):  # the number, everywhere, plus one: a flip and the padding leave it alone
        return torch.full((3, 224, 224), float(image.getpixel((0, 0))[0] + 1))

    def run(info):
        tokenizer = Tokenizer()
        try:
            images, _ = data.preprocess_interleaved(
                [json.dumps(info)], tokenizer, note, THRESHOLD, FEWEST, MOST
            )
        except ValueError as e:
            return {"rejected": str(e)}
        order = [int(x) - 1 for x in images[:, 0, 0, 0]]
        return {"text": tokenizer.text, "order": [x for x in order if x >= 0]}

    data.random.random = lambda: 1.0  # the coin for a single picture: kept
    results = {name: run(info) for name, info in documents().items()}
    data.random.random = lambda: 0.5
    results["one picture, thrown away"] = run(documents()["one picture"])
    files = [{"fname": name, "data": b"x", "__url__": "u"} for name in MEMBERS]
    groups = [
        [sample.pop("__key__"), [k for k in sample if k != "__url__"]]
        for sample in data.group_by_keys_nothrow(files)
    ]
    out = {"documents": results, "samples": groups}
    path = Path(__file__).with_name("flamingo_documents.json")
    path.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
