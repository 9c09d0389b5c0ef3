"""MMMU's files as the hub has them, in miniature."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def question(name, text, options, answer, pictures=1):
    """A row as the hub has it: seven columns of pictures, the options as Python writes a list."""
    images = {f"image_{i}": {"bytes": png(i), "path": f"{i}.png"} if i <= pictures else None
              for i in range(1, 8)}  # fmt: skip
    kind = "multiple-choice" if options else "open"
    more = {"explanation": "", "img_type": "['Tables']", "topic_difficulty": "Easy"}
    row = {"id": name, "question": text, "options": str(options), "answer": answer}
    return row | more | {"question_type": kind, "subfield": "x"} | images


def save(folder, subject, rows, split="validation"):
    (folder / subject).mkdir(parents=True, exist_ok=True)
    path = folder / subject / f"{split}-00000-of-00001.parquet"
    names = [f"image_{i}" for i in range(1, 8)]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = [(name, pa.string()) for name in rows[0] if name not in names]
    schema = pa.schema([*texts, *((name, picture) for name in names)])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return str(path)
