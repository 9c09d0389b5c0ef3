"""easy-VQA: questions about one coloured shape on a 64x64 picture, learned on a CPU.

COMMAND
    pip install 'mmjax[recipes]'
    python train.py --config=configs/easyvqa.py --workdir=runs/easyvqa

Colours are learned at once; shapes need many pictures, so the shape of each training picture is
painted at ever new places, and shape questions are drawn more often than they occur. So are those
of yes and no that name a shape: the others name one of eight colours, and as about seven
pictures of eight have another, their words alone tell the answer and little is learned from them.
The blind baselines (the majority answer, the best answer to the question alone) stand beside the
results.
"""

from ml_collections import ConfigDict

from mmjax.config import fill, recipe_options
from mmjax.data.easyvqa import ANSWERS, SHAPES
from mmjax.train.settings import RunSettings

WORDS = (
    "User: Assistant:",
    "what color is the shape? what shape does the image contain? what shape is in the image?",
    "what is the color of the shape? does the image contain a not an is there present?",
    *ANSWERS,
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; ``:quick`` shrinks it to seconds."""
    quick = recipe_options(arg, quick=False).quick
    train = dict(kind="easyvqa", split="train")
    task = dict(
        name="easyvqa",
        source=dict(kind="easyvqa", split="test"),
        train=None if quick else train,
        max_new_tokens=3,
        limit=32 if quick else None,
    )
    return fill(
        RunSettings,
        dict(
            name="easyvqa",
            steps=20 if quick else 2000,
            model=dict(
                config=dict(
                    hidden_size=32 if quick else 128,
                    intermediate_size=64 if quick else 512,
                    num_hidden_layers=2 if quick else 3,
                    num_attention_heads=4,
                    patch_size=16,
                    initializer_range=0.06,
                    max_position_embeddings=1024,
                ),
                words=WORDS,
                dtype="float32",
                frozen_dtype="float32",
            ),
            data=dict(
                sources=dict(
                    shape=dict(train, groups=("shape",), placements=64),
                    shape_or_not=dict(train, groups=("yes/no",), words=SHAPES, placements=64),
                    all=dict(train, placements=64),
                ),
                weights=dict(shape=0.45, shape_or_not=0.25, all=0.3),
                seq_len=112,
                max_patches=48,
                max_targets=8,
                batch_size=4 if quick else 22,
            ),
            optim=dict(lr=2e-3, warmup=0.03, schedule="cosine", b2=0.98, weight_decay=0.1),
            eval=dict(tasks=(task,), every=0 if quick else 500, limit=512, batch_size=128),
            checkpoint=dict(every=10 if quick else 500),
            log=dict(every=10 if quick else 20),
        ),
    )
