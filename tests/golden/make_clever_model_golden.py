"""Write clever_model.npz: one step, one checkpoint and one answer of instruct_flamingo's own code.

    PYTHONPATH=. .venv-flamingo/bin/python tests/golden/make_clever_model_golden.py \\
        --clever CHECKOUT --out tests/golden/clever_model.npz [--keep DIR]

The environment is that of `make parity-flamingo`; CHECKOUT is told in clever_peer.py. The model is
that of flamingo_mpt.npz; its tuning config is lora[lm+xqttn]+perceiver at rank 4, alpha 2. Adapters
and perceiver are drawn anew, on the grid of flamingo_peer.py. Holds, with S tokens:
  trained       json: for each published tuning config, {name: numbers} of what is trained
  tuning, keys  json: the tuning config here; names and shapes of the checkpoint that it saves
  w8/<name>     int8 codes of what is trained, under the checkpoint's names
  input_ids, attention_mask, labels int[2,S]; vision_x f32[2,3,1,3,28,28]; loss, logits f32[2,S,v]
  gn/, gs/<name>   gradients before clipping, 2-norm and samples, as in make_flamingo_goldens.py
  prompt_ids, prompt_vision, answer int[12], right int[12]: what its Inferencer answers greedily,
                and the argmax of whole forwards
--keep writes the files too: checkpoint.pt to begin with, clever.pt, and what is beside them.
"""

import argparse
import json
import os
import tempfile
from types import SimpleNamespace

import clever_peer
import flamingo_files
import flamingo_peer as peer
import numpy as np
import torch
from make_clever_data_golden import OneBatch, step_settings
from make_flamingo_goldens import FULL_GRADIENT, MARGIN, NEW_TOKENS, SAMPLES, argmax, media
from PIL import Image

from tests.parity import flamingo_golden

LM, EVERY = "mpt", 2
PUBLISHED = "lora[lm+xqttn]+perceiver"
TURNS = [
    [("<image>Hi, what?", "A dog."), ("Why <image>?", " No")],
    [("<image>A", "b\n")],
]
LENGTH = 112
PROMPT = "### Human: <image>What is it?\n### Assistant: "


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clever", required=True, metavar="CHECKOUT")
    parser.add_argument("--out", required=True)
    parser.add_argument("--keep", metavar="DIR")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = os.path.abspath(args.keep or scratch)
        arrays = sound_run(Peer(os.path.abspath(args.clever), folder))
    np.savez_compressed(args.out, **arrays)
    print(f"{args.out}: {os.path.getsize(args.out) / 1e3:.0f} kB, {len(arrays)} arrays")


class Peer:
    """The checkout's modules, and the model of flamingo_mpt.npz in the files that people have."""

    def __init__(self, checkout, folder):
        self.data, self.tune, self.infer = (
            clever_peer.import_module(checkout, name)
            for name in ("data", "train_utils", "inferencer")
        )
        self.folder = folder
        model, self.tokenizer = self.model()
        torch.save(flamingo_files.whole_clip(model), os.path.join(folder, "tower.pt"))
        state = flamingo_files.released_state(LM, model)
        torch.save(state, os.path.join(folder, "checkpoint.pt"))
        configs = clever_peer.tuning_configs(checkout)
        with open(configs[PUBLISHED]) as file:
            self.tuning = json.load(file) | dict(lora_r=4, lora_alpha=2)
        self.tuning_path = os.path.join(folder, "tuning.json")
        with open(self.tuning_path, "w") as file:
            json.dump(self.tuning, file)
        self.trained = {}
        for name, path in configs.items():
            with open(path) as file:
                config = json.load(file)
            if not config["from_pretrained"]:  # no folder of that name is published with it
                prepared, _ = self.tune.prepare_model_for_tuning(self.model()[0], path)
                parameters = prepared.named_parameters()
                counts = {k: p.numel() for k, p in parameters if p.requires_grad}
                self.trained[name] = [config, counts]

    def model(self):
        """Return (model, tokenizer) with the weights of flamingo_mpt.npz."""
        model, tokenizer = peer.build(LM, EVERY, self.folder)
        golden = flamingo_golden.load(flamingo_golden.COMMITTED / f"flamingo_{LM}.npz")
        weights = {k: torch.from_numpy(v) for k, v in golden.weights.items()}
        report = model.load_state_dict(weights, strict=False)
        assert not report.unexpected_keys
        return model, tokenizer

    def prepared(self, seed):
        """Return the model ready to train, adapters and perceiver drawn anew."""
        model, _ = self.tune.prepare_model_for_tuning(self.model()[0], self.tuning_path)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(peer.to_grid(torch.randn(p.shape, generator=generator) * 0.1))
        peer.fill(model.perceiver, generator)
        return model


class Parallel(torch.nn.Module):
    """What DistributedDataParallel is to names; it notes the outputs."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **given):
        self.given, self.out = given, self.module(**given)
        return self.out.loss, self.out.logits


def sound_run(one):
    """Return the arrays of the first seed whose two texts differ and can be compared."""
    for seed in range(20):
        arrays = run(one, seed)
        texts = [arrays["answer"].tolist(), arrays["right"].tolist()]
        if arrays.pop("margin") >= MARGIN and texts[0] != texts[1] and len({*texts[1]}) > 3:
            print(f"seed {seed}: loss {arrays['loss']}\n", *texts, sep="\n")
            return arrays
    raise RuntimeError("no sound seed in 0..19")


def run(one, seed):
    """Train a step, save, load as the Inferencer does, and let it answer."""
    model = Parallel(one.prepared(seed))
    gradients = step(one, model)
    keys = save(one, model)
    given = model.given
    arrays = {k: given[k] for k in ("attention_mask", "labels", "vision_x")}
    arrays |= dict(input_ids=given["lang_x"], loss=model.out.loss)
    inferencer = load(one)
    with torch.no_grad():
        arrays["logits"] = inferencer.model(**(given | dict(labels=None))).logits
    arrays |= answer(one, inferencer)
    arrays = {k: v.detach().numpy() for k, v in arrays.items()}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        code, gradient = (p.detach() / peer.STEP).numpy(), gradients[name].numpy()
        assert np.array_equal(code, np.clip(np.rint(code), -127, 127)), name
        arrays[f"w8/{name}"] = code.astype(np.int8)
        if gradient.size <= FULL_GRADIENT:
            arrays[f"g/{name}"] = gradient
        else:
            arrays[f"gn/{name}"] = np.linalg.norm(gradient.astype(np.float64))
            arrays[f"gs/{name}"] = gradient.reshape(-1)[:: (gradient.size // SAMPLES) | 1]
    texts = dict(trained=one.trained, tuning=one.tuning, keys=keys)
    return arrays | {k: np.array(json.dumps(v)) for k, v in texts.items()}


def step(one, model):
    """Run train_one_epoch on one batch; returns the gradients before they are clipped."""
    noted, clip = {}, torch.nn.utils.clip_grad_norm_

    def note(parameters, limit):
        noted.update({k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad})
        return clip(parameters, limit)

    torch.nn.utils.clip_grad_norm_ = note
    one.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    one.scheduler = torch.optim.lr_scheduler.ConstantLR(one.optimizer)
    one.tune.train_one_epoch(
        step_settings(),
        model,
        epoch=0,
        dataloader=OneBatch([batch(one)]),
        tokenizer=one.tokenizer,
        optimizer=one.optimizer,
        lr_scheduler=one.scheduler,
        device_id="cpu",
        logger=None,
        tensorboard_writer=None,
        wandb=None,
    )
    torch.nn.utils.clip_grad_norm_ = clip
    model.eval()
    return noted


def batch(one):
    """Return a batch as the peer's loader makes it, of TURNS and pictures at random."""
    own = SimpleNamespace(tokenizer=one.tokenizer, instruction_prompt_templete="guanaco-no-prompt")
    rows = []
    for turns in TURNS:
        asked, said = zip(*turns, strict=True)
        ids, mask = one.data.InstructionDataset.multi_instrucions_tokenization(own, asked, said)
        fill = [0] * (LENGTH - len(ids))
        rows.append((ids + fill, mask + fill, [1] * len(ids) + fill))
    ids, mask, attention = torch.tensor(rows).unsqueeze(2).unbind(1)
    pictures = media(2, 3, seed=6)[:, :, 0]
    pictures[0, 2:] = 0.0  # the filling up to max_img
    pictures[1, 1:] = 0.0
    return pictures, dict(input_ids=ids, attention_mask=attention), mask, None


def save(one, model):
    """Save as the peer does into clever.pt; returns {name: shape} of what is in it."""
    where = dict(run_name=one.folder, rank=0, delete_previous_checkpoint=False)
    more = dict(report_to_wandb=False, save_checkpoints_to_wandb=False)
    settings = step_settings(**where, **more)
    one.tune.save_checkpoint(model, one.optimizer, one.scheduler, 0, settings)
    path = os.path.join(one.folder, "clever.pt")
    os.replace(os.path.join(one.folder, "checkpoint_0.pt"), path)
    state = torch.load(path)["model_state_dict"]
    return {k: list(v.shape) for k, v in state.items()}


def load(one):
    """Return the peer's Inferencer of the two files, on a CPU and in float32."""
    import open_clip

    def fresh(**_):
        transform = open_clip.image_transform(peer.TOWER["image_size"], is_train=False)
        model, tokenizer = one.model()
        model.half = model.to = lambda *_: model
        return model, transform, tokenizer

    one.infer.create_model_and_transforms = fresh
    files = [os.path.join(one.folder, f) for f in ("checkpoint.pt", "clever.pt")]
    return one.infer.Inferencer(",".join(files), None, one.tuning_path, None)


def answer(one, inferencer):
    """Return a prompt, the Inferencer's greedy answer, and the argmax of whole forwards."""
    path = os.path.join(one.folder, "picture.png")
    side = peer.TOWER["image_size"]
    pixels = np.random.default_rng(4).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    model, noted = inferencer.model, {}
    published = model.generate

    def note(**given):
        noted.update(given, out=published(**given))
        return noted["out"]

    model.generate = note
    torch.Tensor.half = torch.Tensor.cuda = lambda self: self
    greedy = dict(num_beams=1, do_sample=False, top_k=None, top_p=None, temperature=None)
    inferencer(PROMPT, [path], max_new_token=NEW_TOKENS, no_repeat_ngram_size=0, **greedy)
    del model.generate
    vision, ids, mask = noted["vision_x"], noted["lang_x"], noted["attention_mask"]
    with torch.no_grad():
        right, margin = argmax(model, vision, ids, mask)
    start = ids.shape[1]
    return dict(
        prompt_ids=ids,
        prompt_vision=vision,
        answer=noted["out"][0, start:],
        right=right[0, start:],
        margin=margin,
    )


if __name__ == "__main__":
    main()
