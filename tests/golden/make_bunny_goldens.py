"""Write bunny_<language model>_<tower>.npz: what Bunny's own code makes of tiny random weights.

    python tests/golden/make_bunny_goldens.py --bunny CHECKOUT --out tests/golden \\
        phi_siglip stablelm_clip ...

CHECKOUT: of github.com/BAAI-DCAI/Bunny at 08273ac. It runs in this project's environment with
torch 2.13.0 on a CPU, transformers 5.23.0 and einops 0.8.2 (bunny_peer.py stands in for the rest).

Arrays (b rows, S ids of the right-padded batch, n images, T places of a row with its images in it):
  config, tower_config   json: the peer's config.json, and what lies beside the tower's weights
  cases                  json: {case: what of config.json is different in it}
  sd/<name>              f32, every weight under its name in a merged checkpoint
  g/<name>               gradient of the first case's loss, where there is one
and for each case `<case>/...`:
  ids int[b,S], an image at -200; attention_mask bool[b,S]; labels int[b,S], -100 where no loss is;
  pixel_values f32[n,3,28,28], with S2 84 x 84, normalised, one for each image and one for each row
  of text alone;
  logits f32[b,T,v]; loss; and for the cases where no row is cut
  features f32[n,4,32], of encode_images; prompt_lengths int[b], ids of a row before its answer;
  greedy int[b,12], what follows each prompt, each row alone; greedy_margin, the least distance
  between its two best logits
"""

import argparse
import json
import os
import tempfile

import bunny_peer as peer
import numpy as np
import torch
import transformers

IMAGE, IGNORE = -200, -100
NEW_TOKENS = 12
MARGIN = 1e-3  # of the best token over the second, far above float32's noise
# Rows as tokens before, between and behind images, and tokens of the answer.
BATCH = (((5, 4), 5), ((0, 2), 3), ((9,), 4), ((1, 0), 2))
TWO_IMAGES = (((2, 3, 1), 3), ((4,), 2), ((3, 2), 4))
FULL = dict(tokenizer_padding_side="right", tokenizer_model_max_length=peer.MAX_LENGTH)
CASES = {
    "right_64": (BATCH, FULL),
    "left_64": (BATCH, FULL | dict(tokenizer_padding_side="left")),
    "right_8": (BATCH, FULL | dict(tokenizer_model_max_length=8)),
    "two_images": (TWO_IMAGES, FULL),
}
GOLDENS = {
    "phi_siglip": tuple(CASES),
    "stablelm_clip": ("right_64",),
    "phi_eva": ("right_64",),
    "qwen2_siglip": ("right_64",),
    "phi3_clip": ("right_64",),
    "minicpm_siglip": ("right_64",),
    "llama_siglip": ("right_64",),
    "llama_s2": ("right_64",),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bunny", required=True, metavar="CHECKOUT")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("goldens", nargs="*", default=list(GOLDENS), help=", ".join(GOLDENS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    peer.import_peer(os.path.abspath(args.bunny))
    out = os.path.abspath(args.out)
    for name in args.goldens:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            arrays = sound_run(name)
            os.chdir(out)
        path = os.path.join(out, f"bunny_{name}.npz")
        np.savez_compressed(path, **arrays)
        print(f"{path}: {os.path.getsize(path) / 1e3:.0f} kB, {len(arrays)} arrays")


def sound_run(name):
    """Return the arrays of the first seed whose texts can be compared."""
    language, tower = name.split("_")
    for seed in range(50):
        model = peer.build(language, tower, seed)
        greedy = {}
        for case in GOLDENS[name]:
            greedy |= texts(model, case)
        fault = unsound(greedy)
        print(f"{name}, seed {seed}: {fault or 'sound'}")
        if not fault:
            break
    else:
        raise RuntimeError(f"no sound seed for {name}")
    arrays = dict(
        config=json.dumps(peer.published_config(model, language, tower)),
        tower_config=json.dumps(peer.tower_config(tower)),
        cases=json.dumps({case: CASES[case][1] for case in GOLDENS[name]}),
    )
    arrays = {k: np.array(v) for k, v in arrays.items()} | greedy
    arrays |= {f"sd/{k}": v.numpy() for k, v in peer.published_state(model).items()}
    for i, case in enumerate(GOLDENS[name]):
        arrays |= {f"{case}/{k}": v for k, v in run(model, case, backward=i == 0).items()}
    for k, p in model.named_parameters():
        if p.grad is not None:
            arrays[f"g/{peer.published_name(k)}"] = p.grad.numpy()
    return arrays


def unsound(arrays):
    """Return why generated texts would prove little, or None."""
    for key, value in arrays.items():
        if key.endswith("greedy_margin") and value < MARGIN:
            return f"the two best tokens are {value:.1e} apart"
        if key.endswith("greedy"):
            if (value == peer.END).any():
                return "a text ends"
            if min(len(np.unique(row)) for row in value) < 4:
                return "a text repeats a token or three"
    return None


def batch(case, side):
    """Return the tensors of a case: ids, attention_mask, labels, pixel_values, prompt_lengths.

    side: pixels of a side of its images.
    """
    rows, _ = CASES[case]
    steps = 8 if side == peer.TOWER_SIZES["image_size"] else 1  # within 1; many have to be small
    generator = torch.Generator().manual_seed(len(rows))
    prompts, answers, images = [], [], []
    for spans, answer in rows:
        words = [torch.randint(3, peer.END, (n,), generator=generator) for n in (*spans, answer)]
        mark = torch.tensor([IMAGE])
        prompts.append(torch.cat([part for w in words[:-1] for part in (w, mark)][:-1]))
        answers.append(torch.cat([words[-1], torch.tensor([peer.END])]))
        pixels = torch.randn(max(len(spans) - 1, 1), 3, side, side, generator=generator)
        # the peer's data has a black picture for text alone, which takes a place of its own
        images.append((pixels * steps).round() / steps * (len(spans) > 1))
    whole = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    labels = [torch.cat([p * 0 + IGNORE, a]) for p, a in zip(prompts, answers, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    return dict(
        ids=pad(whole, True, peer.END),
        attention_mask=pad([torch.ones_like(row).bool() for row in whole], True, False),
        labels=pad(labels, True, IGNORE),
        pixel_values=torch.cat(images),
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
    )


def run(model, case, backward):
    """Return inputs and outputs of a case by name; leaves the gradients of the loss if asked."""
    for key, value in CASES[case][1].items():
        setattr(model.config, key, value)
    inputs = batch(case, peer.image_side(model.config))
    del inputs["prompt_lengths"]
    ids, mask, labels, images = (inputs[k].clone() for k in inputs)
    out = model(ids, attention_mask=mask, labels=labels, images=images, use_cache=False)
    if backward:
        out.loss.backward()
    arrays = inputs | dict(logits=out.logits, loss=out.loss)
    if whole(case):
        arrays["features"] = model.encode_images(images)
    return {k: v.detach().numpy() for k, v in arrays.items()}


def whole(case):
    return CASES[case][1] == FULL


def texts(model, case):
    """Return what follows each prompt of a case, under the names of its arrays."""
    if not whole(case):
        return {}
    for key, value in FULL.items():
        setattr(model.config, key, value)
    inputs, rows, margin, image = batch(case, peer.image_side(model.config)), [], np.inf, 0
    for ids, length, (spans, _) in zip(
        inputs["ids"], inputs["prompt_lengths"], CASES[case][0], strict=True
    ):
        taken = max(len(spans) - 1, 1)
        pixels = inputs["pixel_values"][image : image + taken]
        image += taken
        ids = ids[None, :length]
        for _ in range(NEW_TOKENS):
            with torch.no_grad():  # on a copy: the peer writes 0 over the marks of images
                logits = model(ids.clone(), images=pixels, use_cache=False).logits[0, -1]
            best, second = logits.topk(2).values
            margin = min(margin, float(best - second))
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
        rows.append(ids[0, length:])
    found = dict(
        prompt_lengths=inputs["prompt_lengths"], greedy=torch.stack(rows), greedy_margin=margin
    )
    return {f"{case}/{k}": np.asarray(v) for k, v in found.items()}


if __name__ == "__main__":
    main()
