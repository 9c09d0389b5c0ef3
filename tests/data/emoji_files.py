"""A miniature of emoji-datasource: three emoji in two styles, laid out as the package lays them."""

import json

import numpy as np
from PIL import Image

NAMES = (("Chad Flag", "Flags"), ("TACO", "Food & Drink"), ("Japan Flag", "Flags"))


def write(folder):
    """Write the files that ``python -m mmjax.data.emoji`` would; returns the folder.

    Each drawing is one colour, other in each style, inside a see-through border of four pixels.
    """
    entries = [
        dict(name=name, category=category, unified=f"1F{i}", sheet_x=i % 2, sheet_y=i // 2,
             has_img_google=True, has_img_twitter=True)
        for i, (name, category) in enumerate(NAMES)
    ]  # fmt: skip
    for k, style in enumerate(("google", "twitter")):
        sheet = np.zeros((68, 68, 4), np.uint8)
        for i in range(len(NAMES)):
            left, top = 34 * (i % 2) + 1, 34 * (i // 2) + 1
            sheet[top + 4 : top + 28, left + 4 : left + 28] = (100 * i, 200 * k, 50, 255)
        file = folder / f"img/{style}/sheets/32.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(file)
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder
