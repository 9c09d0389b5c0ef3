"""Write otter_<lm>.npz: what Otter's own code makes of tiny random weights.

    python3.11 -m venv .venv-otter
    .venv-otter/bin/pip install torch==2.13.0
    .venv-otter/bin/pip install -r tests/golden/otter_libraries.txt
    .venv-otter/bin/python tests/golden/make_otter_goldens.py --otter CHECKOUT --lm mpt \\
        --out tests/golden/otter_mpt.npz

CHECKOUT: of github.com/Luodian/Otter at main (only `src/otter_ai` is read, which the release
otter-ai 0.0.0a8 holds too). `make parity-otter OTTER=CHECKOUT` does this for all. Committed: mpt
and mosaic1b (pictures, a gated block before each second and fourth layer), llama (frames, fourth).
--keep DIR: the peer's save_pretrained folder, and its tokenizer beside it.

Arrays (b=2 rows, left-padded; m media of f frames; S tokens; weights are drawn by drawn_weights.py
from the names and shapes in `config`):
  config            json: lm, every, seed, shapes, the config.json of save_pretrained, ids
  input_ids, attention_mask, labels int[b,S]; vision_x f32[b,m,f,3,28,28], normalised pixels
  logits f32[b,S,v]; loss
  g/<name>          gradient of the loss for what the peer trains; above 512 numbers gn/<name>, its
                    2-norm, and gs/<name>, the flat gradient at every `(size // 256) | 1`-th number
  greedy            int[b,<=S+12]: the peer's generate() with use_cache=False
  greedy_cached     the same with its cache; there it sees no image after the first new token
  greedy_nocache    int[b,S+12]: argmax of whole forwards, not ended
  greedy_margin     the least distance between its two best logits
"""

import argparse
import json
import os
import tempfile

import numpy as np
import otter_peer as peer
import torch
from whole_forwards import NEW_TOKENS, argmax

PROMPTS = (
    "<image>User:a? GPT:<answer>cat<|endofchunk|><image>User:b? GPT:<answer>dog<|endofchunk|>"
    "<image>User:c? GPT:<answer>",
    "<image>User:who is it? GPT:<answer>",
)
MEDIA = dict(mpt=(3, 1), mosaic1b=(3, 1), llama=(3, 3))  # media, frames
MARGIN = 1e-3  # of the best token over the second, far above float32's noise
FULL_GRADIENT, SAMPLES = 512, 256


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--otter", required=True, metavar="CHECKOUT")
    parser.add_argument("--lm", required=True, choices=peer.LANGUAGE_MODELS)
    parser.add_argument("--out", required=True)
    parser.add_argument("--keep", metavar="DIR", help="write the model's folder too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    modeling = peer.import_peer(os.path.abspath(args.otter))
    model, seed, arrays = sound_run(modeling, args.lm)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or scratch
        model.save_pretrained(folder)
        model.text_tokenizer.save_pretrained(folder)
        with open(os.path.join(folder, "config.json")) as f:
            about = json.load(f)
    arrays["config"] = np.array(json.dumps(describe(args.lm, model, seed, about)))
    np.savez_compressed(args.out, **arrays, **gradients(model))
    print(f"{args.out}: {os.path.getsize(args.out) / 1e3:.0f} kB, {len(arrays)} arrays")


def sound_run(modeling, lm):
    """Return (model, seed, arrays) of the first seed whose texts can be compared."""
    for seed in range(40):
        model = peer.build(modeling, lm, seed)
        arrays = run(model, *MEDIA[lm])
        start = arrays["input_ids"].shape[1]
        new = arrays["greedy_nocache"][:, start:]
        fault = unsound(new, arrays, start, model)
        print(f"{lm}, seed {seed}: {fault or arrays['loss']}")
        if not fault:
            for name in ("greedy", "greedy_cached", "greedy_nocache"):
                print(f"  {name:15}", arrays[name][:, start:].tolist())
            return model, seed, arrays
    raise RuntimeError(f"no sound seed for --lm {lm}")


def unsound(new, arrays, start, model):
    """Return why generated texts would prove little, or None."""
    if (new == model.media_token_id).any():
        return "a text has an <image>"
    if arrays["greedy_margin"] < MARGIN:
        return f"the two best tokens are {arrays['greedy_margin']:.1e} apart"
    if min(len(np.unique(row)) for row in new) < 4:
        return "the texts repeat a token or two"
    cached = arrays["greedy_cached"][:, start:]
    if np.array_equal(cached, new[:, : cached.shape[1]]):
        return "the images do not matter behind the first new token"
    return None


def describe(lm, model, seed, about):
    """Return what a test must know to build the same model."""
    tokenizer = model.text_tokenizer
    ids = dict(
        endofchunk=model.eoc_token_id,
        image=model.media_token_id,
        answer=tokenizer.convert_tokens_to_ids("<answer>"),
        pad=tokenizer.pad_token_id,
        eos=tokenizer.eos_token_id,
    )
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    every = model.cross_attn_every_n_layers
    return dict(lm=lm, every=every, seed=seed, ids=ids, shapes=shapes, config=about)


def gradients(model):
    """Return the gradients of what the peer trains; a large one as norm and sample."""
    arrays = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        gradient = p.grad.numpy()
        if gradient.size <= FULL_GRADIENT:
            arrays[f"g/{name}"] = gradient
            continue
        stride = (gradient.size // SAMPLES) | 1  # odd, so that it walks over all columns
        arrays[f"gn/{name}"] = np.linalg.norm(gradient.astype(np.float64))
        arrays[f"gs/{name}"] = gradient.reshape(-1)[::stride]
    return arrays


def run(model, media, frames):
    """Return inputs and outputs; leaves the gradients of the loss in the model."""
    tokenizer = model.text_tokenizer
    tokenizer.padding_side = "left"
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding="longest")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    generator, side = torch.Generator().manual_seed(3), peer.TOWER["image_size"]
    vision = torch.randn(2, media, frames, 3, side, side, generator=generator)
    vision = (vision * 8).round() / 8
    vision[1, 1:] = 0.0  # the filling of a row with fewer images
    labels = ids.masked_fill((mask == 0) | (ids == model.media_token_id), -100)
    out = model(vision_x=vision, lang_x=ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    arrays = dict(input_ids=ids, attention_mask=mask, labels=labels, vision_x=vision)
    arrays |= dict(logits=out.logits, loss=out.loss)
    with torch.no_grad():
        new = dict(vision_x=vision, lang_x=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS)
        new["pad_token_id"] = tokenizer.pad_token_id
        arrays["greedy"] = model.generate(use_cache=False, **new)
        arrays["greedy_cached"] = model.generate(use_cache=True, **new)
        texts, margin = argmax(model, vision, ids, mask)
    arrays |= dict(greedy_nocache=texts, greedy_margin=margin)
    return {k: v.detach().numpy() for k, v in arrays.items()}


if __name__ == "__main__":
    main()
