"""Load a checkpoint.pt that mmjax wrote into OpenFlamingo's own model, and compare its logits.

    .venv-flamingo/bin/python tests/golden/check_flamingo_export.py \\
        --files build/flamingo/files/mpt --export build/flamingo/export/mpt --golden FILE.npz

--files: what make_flamingo_goldens.py kept of a model: `lm/`, `tower.pt`, `towers/`; the model is
built from them as its users do, gated blocks and resampler fresh. --export: a folder of
`convert_weights.to_hf --layout openflamingo`. --golden: a .npz with inputs and the peer's own
logits. --adapter: a folder of `to_hf --adapter`; PEFT puts it on the model that was kept, which
takes only the resampler from --export. Fails above 1e-5 of the largest logit.
"""

import argparse
import os

import flamingo_peer as peer
import numpy as np
import torch

LIMIT = 1e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", required=True, choices=peer.LANGUAGE_MODELS)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--files", required=True)
    parser.add_argument("--export", required=True)
    parser.add_argument("--golden", required=True)
    parser.add_argument("--adapter")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = fresh_model(args.files, args.every)
    state = torch.load(os.path.join(args.export, "checkpoint.pt"), weights_only=True)
    if args.adapter:
        kept = torch.load(os.path.join(args.files, "checkpoint.pt"), weights_only=True)
        state = kept | {k: v for k, v in state.items() if k.startswith("perceiver.")}
    if args.lm == "neox":  # published names; transformers 5 has another for its head
        names = {k: k.replace("embed_out.", "lm_head.") for k in state}
        state = {names[k]: v for k, v in state.items()}
    report = model.load_state_dict(state, strict=False)
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    left = sorted(k for k in trained & set(report.missing_keys) if not second_name(k))
    if report.unexpected_keys or left:
        raise SystemExit(f"unexpected {report.unexpected_keys[:5]}, not loaded {left[:5]}")
    if args.adapter:
        model = adapted(model, args.adapter)
    with np.load(args.golden) as file:
        inputs = (file[k] for k in ("vision_x", "input_ids", "attention_mask"))
        vision, ids, mask = map(torch.from_numpy, inputs)
        want = file["logits"]
    with torch.no_grad():
        got = model(vision_x=vision, lang_x=ids, attention_mask=mask).logits.numpy()
    seen = mask.numpy() > 0
    if args.lm == "llama":  # the rows of new tokens in its head are in no file of the peer's
        got, want = (x[..., : model.eoc_token_id] for x in (got, want))
    error = np.abs(got - want)[seen].max() / np.abs(want[seen]).max()
    print(f"{args.lm} every {args.every}: {len(state)} tensors, largest error {error:.1e}")
    if not error < LIMIT:
        raise SystemExit(f"logits differ by {error:.1e} of the largest; at most {LIMIT} is right")


def fresh_model(files, every):
    """Return the peer's model as its factory makes it, with the tower's weights."""
    factory = peer.import_peer()
    import open_clip

    open_clip.add_model_config(os.path.join(files, "towers"))
    lm = os.path.join(files, "lm")
    model, _, _ = factory.create_model_and_transforms(
        clip_vision_encoder_path=peer.TOWER_NAME,
        clip_vision_encoder_pretrained=None,
        lang_encoder_path=lm,
        tokenizer_path=lm,
        cross_attn_every_n_layers=every,
        use_local_files=True,
    )
    model.vision_encoder.final_ln_after_pool = True
    clip = torch.load(os.path.join(files, "tower.pt"), weights_only=True)
    visual = {k.removeprefix("visual."): v for k, v in clip.items() if k.startswith("visual.")}
    model.vision_encoder.load_state_dict(visual)
    return model.eval()


def adapted(model, folder):
    """Return the model with an adapter as PEFT loads it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, folder)
    pairs = {k for k, _ in model.named_parameters() if ".lora_A." in k}
    print(f"{folder}: {len(pairs)} pairs")
    wrong = [k for k in pairs if "lang_encoder." not in k]
    if wrong or not pairs:
        raise SystemExit(f"PEFT adapts {sorted(wrong)[:5]}")
    return model


def second_name(key):
    """Tell whether a key is another name of a tensor that has its own."""
    return "gated_cross_attn_layers." in key or "old_decoder_blocks." in key or "lm_head." in key


if __name__ == "__main__":
    main()
