"""Small MIMIC-IT files that Otter's own code and ours both read, and the tokenizer for them."""

import base64
import io
import json

import numpy as np
from flamingo_peer import byte_tokenizer
from PIL import Image

SIDE, FRAMES = 8, 3
TOKENS = ["<|endofchunk|>", "<image>", "<answer>"]  # what Otter adds, in its order
PICTURE = (13, 9)  # width and height of the one picture that is not of one colour

ENTRIES = {
    "A0": dict(instruction="What is it?", answer="A cat.", image_ids=["I0"], rel_ins_ids=["A1"]),
    "A1": dict(
        instruction=" Look, where is *this* (f(x) = a+b; {0})?\n",
        answer="\n Left;\r\nright_1  and 50% on.  ",
        image_ids=["I1"],
        rel_ins_ids=[],
    ),
    "A2": dict(instruction="And who?", answer="Ann.", image_ids=["I2"], rel_ins_ids=["A0", "A1"]),
    "A3": dict(instruction="What changed?", answer="All.", image_ids=["I3", "I0"], rel_ins_ids=[]),
}
TEXTS = {
    "T0": dict(instruction="2+2?", answer="4", image_ids=None, rel_ins_ids=[]),
    "T1": dict(instruction="Then?", answer="5", image_ids=[], rel_ins_ids=["T0"]),
}
VIDEOS = {
    "V0": dict(
        instruction="Go on.",
        answer="Yes.",
        image_ids=["I4", "I0", "I1", "I2", "I3"],
        rel_ins_ids=[],
    ),
    "V1": dict(instruction="Short?", answer="No.", image_ids=["I2", "I4"], rel_ins_ids=["V0"]),
}
CONTEXT = {"A2": ["A0", "A1"], "A0": []}  # a train_config: not all entries, in its own order
CASES = {  # name: group, instructions, train_config, take rel_ins_ids, keep symbols, further ones
    "image": ("IMAGE_TEXT", "A", False, False, True, {}),
    "image_stripped": ("IMAGE_TEXT", "A", False, False, False, {}),
    "image_turns": ("IMAGE_TEXT", "A", False, True, True, {}),
    "image_chosen": ("IMAGE_TEXT", "A", True, False, True, {}),
    "image_fewer": ("IMAGE_TEXT", "A", False, False, True, dict(num_samples=2)),
    "image_task": ("IMAGE_TEXT", "A", False, False, True, dict(task_description=["Be brief."])),
    "text": ("TEXT_ONLY", "T", False, True, True, {}),
    "video": ("VIDEO_TEXT", "V", False, True, True, {}),
    "context": ("IMAGE_TEXT_IN_CONTEXT", "A", True, False, True, {}),
}
# OtterHD: the symbols are stripped as its training does, and kept for our own way beside it.
FUYU_CASES = ("image", "image_stripped", "image_turns", "image_turns_stripped", "text_stripped")
CASES |= {
    "image_turns_stripped": ("IMAGE_TEXT", "A", False, True, False, {}),
    "text_stripped": ("TEXT_ONLY", "T", False, True, False, {}),
}
FUYU_PATCH, FUYU_BOX, FUYU_SIDE = 8, (64, 96), 20  # box: height and width; side: what is drawn
FUYU_WORDS = ("User: Assistant: What is it? A cat. Look, where and And who? Ann. Left 2 + 4", "\n")


def colour(number):
    """Return the grey level of picture I<number>."""
    return 40 * (number + 1)


def picture():
    """Draw edges and fine texture in integer arithmetic, uint8[9,13,3]."""
    width, height = PICTURE
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 // width, y * 255 // height, (x * 53 ^ y * 31) % 256]
    return np.stack(planes, -1).astype(np.uint8)


def tokenizer():
    """Return bytes, <s>, </s> and what Otter adds, built alike by old and new transformers."""
    made = byte_tokenizer(with_pad=False)
    made.add_special_tokens({"bos_token": "<s>"})
    made.add_tokens(TOKENS, special_tokens=True)
    made.add_special_tokens({"pad_token": "<PAD>"})
    return made


def write_files(folder):
    """Write A.json, T.json, V.json, train.json and images.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, entries in (("A", ENTRIES), ("T", TEXTS), ("V", VIDEOS)):
        (folder / f"{name}.json").write_text(json.dumps({"meta": {}, "data": entries}))
    (folder / "train.json").write_text(json.dumps(CONTEXT))
    images = {f"I{i}": Image.new("RGB", (5, 4), (colour(i),) * 3) for i in range(5)}
    images["P"] = Image.fromarray(picture())
    index = "__index_level_0__"
    texts = [base64.urlsafe_b64encode(png(image)).decode() for image in images.values()]
    table = pa.table({"base64": texts, index: list(images)})
    text = dict(pandas_type="unicode", numpy_type="object", metadata=None)
    columns = [
        dict(name="base64", field_name="base64", **text),
        dict(name=None, field_name=index, **text),
    ]
    about = dict(index_columns=[index], column_indexes=[], columns=columns, pandas_version="2.2.0")
    pq.write_table(
        table.replace_schema_metadata({"pandas": json.dumps(about)}), folder / "images.parquet"
    )


def png(image):
    """Return a picture's PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def paths(folder, case):
    """Return the files of a case under the names that the training YAML has for them."""
    _, name, chosen, _, _, more = CASES[case]
    found = {"mimicit_path": str(folder / f"{name}.json"), **more}
    if name != "T":
        found["images_path"] = str(folder / "images.parquet")
    if chosen:
        found["train_config_path"] = str(folder / "train.json")
    return found
