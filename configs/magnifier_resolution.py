"""Fixed low, fixed high or dynamic resolution: which one reads a size it never saw in training?

COMMAND
    for kind in low high dynamic; do
      python train.py --config=configs/magnifier_resolution.py:$kind \\
          --workdir=runs/magnifier_$kind
    done
    python -m mmjax.evals.compare low=runs/magnifier_low high=runs/magnifier_high \\
        dynamic=runs/magnifier_dynamic --out docs/resolution.md

The digit stands at one of four places of a 96x96 picture, so that its corner is on the patch grid
at every size used here and sizes differ by how large it is. ``:low`` trains at 48, ``:high`` at 80,
and ``:dynamic``, the default, at 48, 64 or 80, drawn for each sample. All three take the same
number of steps over rows of the same length: smaller pictures are packed closer. Every run is asked
about the same held-out digits at 48, 64, 80 and 96 pixels; the last is larger than anything in
training. The last command writes what came out into docs/resolution.md.
"""

from ml_collections import ConfigDict

from mmjax.config import fill, recipe_options
from mmjax.recipes import MAGNIFIER_MODEL
from mmjax.train.settings import RunSettings
from mmjax.types import MMJaxError

RESOLUTIONS = {
    "low": (48,),
    "high": (80,),
    "dynamic": {"min": 48, "max": 80, "multiple": 16},
}
SIZES = (48, 64, 80, 96)


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe for ``low``, ``high`` or ``dynamic``; ``:quick`` shrinks it to seconds."""
    options = recipe_options(arg, quick=False, low=False, high=False, dynamic=False)
    quick = options.quick
    chosen = [name for name in RESOLUTIONS if getattr(options, name)] or ["dynamic"]
    if len(chosen) > 1:
        raise MMJaxError(f"magnifier_resolution takes one of {', '.join(RESOLUTIONS)}, got {arg!r}")
    source = dict(kind="magnifier", mc_share=0.0, align=48)
    task = dict(
        name="magnifier",
        source=source | dict(split="test", size=16 if quick else 718),
        chance=0.1,
        resolutions=SIZES,
        max_new_tokens=2,
    )
    return fill(
        RunSettings,
        dict(
            name="magnifier_resolution",
            steps=20 if quick else 1500,
            model=MAGNIFIER_MODEL,
            data=dict(
                sources=dict(magnifier=source | dict(split="train")),
                resolutions=RESOLUTIONS[chosen[0]],
                seq_len=256,
                max_patches=224,
                max_targets=16,
                batch_size=4 if quick else 18,
            ),
            optim=dict(lr=2e-3, warmup=0.05, schedule="cosine", b2=0.98, weight_decay=0.1),
            eval=dict(tasks=(task,), every=0 if quick else 300, limit=100, batch_size=32),
            checkpoint=dict(every=10 if quick else 300),
            log=dict(every=10),
        ),
    )
