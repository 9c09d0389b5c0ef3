"""Questions and answers of a TFDS dataset."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mmjax.data.tfds_files import TfdsFiles, as_text
from mmjax.types import Message, MMJaxError, Record, nearest


class TfdsSource:
    """Records of a TFDS dataset stored as ArrayRecord, read without TensorFlow.

    name: a registered name (``"vqa/1.0.0"``) or the folder of a prepared dataset. fields: which
    feature plays which part: ``question`` and ``answer`` are wanted, ``image`` is optional; a dot
    walks into nested features (``{"answer": "answers.0"}`` takes the first of a sequence). Pictures
    are the files that the dataset keeps, read as those of any other source. Raises MMJaxError for a
    feature that is not there.
    """

    def __init__(
        self,
        name: str,
        split: str,
        fields: Mapping[str, str] | None = None,
        data_dir: str | os.PathLike | None = None,
    ):
        default = {"image": "image", "question": "question", "answer": "answer"}
        self.fields = dict(default if fields is None else fields)
        unknown = sorted(set(self.fields) - set(default))
        if unknown or "question" not in self.fields:
            wrong = "lack 'question'"
            if unknown:
                wrong = f"have {unknown[0]!r}{nearest(unknown[0], default)}"
            raise MMJaxError(
                f"TFDS {str(name)!r}: fields {self.fields} {wrong}; want 'question', 'answer' and, "
                "if there are pictures, 'image'"
            )
        # As files: TFDS would decode them with OpenCV where that is installed and with Pillow where
        # not, which differ, and without what lies beside the pixels, as EXIF's orientation.
        self._files = TfdsFiles(name, split, data_dir, encoded=True)
        self._files.check(self.fields.values())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        files = self._files
        element, where = files[index], files.where(index)
        found = {part: files.take(element, p, where) for part, p in self.fields.items()}
        question, answer = as_text(found["question"], where), found.get("answer")
        messages = [Message("user", question)]
        answers = answer if isinstance(answer, list) else [] if answer is None else [answer]
        answers = [as_text(one, where) for one in answers]
        if answers:
            messages.append(Message("assistant", answers[0]))
        images = () if found.get("image") is None else (found["image"],)
        meta = {"id": f"{files.split}/{index}", "source": files.name, "line": index}
        if answers:
            meta["answers"] = answers
        return Record(tuple(messages), images, meta)
