"""transformers' Fuyu in miniature, and the way its inputs and tensors map to ours."""

import numpy as np
import torch
from transformers import FuyuConfig, FuyuForCausalLM

from mmjax.generate.loop import pad_batch
from mmjax.models.fuyu import weights
from mmjax.weights import rules
from mmjax.weights.writer import Arrays

VOCAB, WIDTH, HEADS, LAYERS, MLP, PATCH = 96, 64, 4, 2, 80, 4
IMAGE, EOS = 5, 7
THETA = 25_000.0


def tiny_fuyu(*, theta=THETA, vocab=VOCAB, image=IMAGE, eos=EOS, seed=0):
    """Return transformers' Fuyu of a few thousand random weights, biases and norms random too."""
    text = dict(
        model_type="persimmon",
        vocab_size=vocab,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=512,
        eos_token_id=eos,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": theta,
            "partial_rotary_factor": 0.5,
        },
    )
    config = FuyuConfig(text_config=text, patch_size=PATCH, image_token_id=image)
    config._attn_implementation = "eager"
    model = FuyuForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(start + 0.15 * torch.randn(p.shape, generator=generator))
    return model.eval()


def sample(seed, layout):
    """Return (ids int32[t], patches float32[p, pixels]).

    layout: text as numbers of tokens, images as grids (rows, columns), in their order.
    """
    rng = np.random.default_rng(seed)
    ids, patches = [], 0
    for part in layout:
        if isinstance(part, int):
            ids += rng.integers(8, VOCAB, part).tolist()
            continue
        for _ in range(part[0]):  # a row of patches and its end, as Fuyu's stream has it
            ids += [IMAGE] * part[1] + [6]
        patches += part[0] * part[1]
    pixels = rng.uniform(-1, 1, (patches, PATCH * PATCH * 3)).astype(np.float32)
    return np.asarray(ids, np.int32), pixels


def left_padded(samples):
    """Return the peer's inputs: ids padded on the left, the patches of all samples in one row."""
    longest = max(len(ids) for ids, _ in samples)
    ids = np.zeros((len(samples), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, (tokens, _) in enumerate(samples):
        ids[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    out = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    patches = np.concatenate([p for _, p in samples])
    if len(patches):
        out["pixel_values"] = patches
    return {k: torch.from_numpy(v) for k, v in out.items()}


def examples(samples):
    """Return the samples as our processor would make them."""
    out = []
    for ids, patches in samples:
        here = ids == IMAGE if len(patches) else np.zeros(len(ids), bool)
        visual = np.where(here, np.cumsum(here) - 1, -1).astype(np.int32)
        positions = np.arange(len(ids), dtype=np.int32)
        out.append(
            {"tokens": ids, "positions": positions, "visual_index": visual, "patches": patches}
        )
    return out


def right_padded(samples):
    """Return our batch of the samples, padded on the right to a bucket."""
    return pad_batch(examples(samples))[0]


def supervise(inputs, batch, samples, spans):
    """Add targets to the peer's inputs and to our batch.

    spans: for each sample the (first, last + 1) of every answer, in its own positions.
    """
    labels = torch.full_like(inputs["input_ids"], -100)
    longest = labels.shape[1]
    targets = [[i for a, b in row for i in range(a, b)] for row in spans]
    batch["target_index"] = np.full((len(samples), max(map(len, targets))), -1, np.int32)
    for row, (index, (ids, _)) in enumerate(zip(targets, samples, strict=True)):
        offset = longest - len(ids)
        labels[row, [offset + i for i in index]] = torch.from_numpy(ids[index]).long()
        batch["target_index"][row, : len(index)] = index
    inputs["labels"] = labels
    return inputs, batch


def hub_names(named):
    """Rename torch's {name: tensor} inside transformers 5 to the hub's names, as numpy."""
    return {weights.to_hub(k, "transformers5"): v.detach().numpy() for k, v in named.items()}


def to_hub(flat):
    """Return our {dotted name: array} as the hub's tensors, fused and transposed as they are."""
    flat = {name: np.asarray(value) for name, value in flat.items()}
    return {tensor.key: tensor.make() for tensor in rules.export(weights.rules(None), Arrays(flat))}


def assert_each_close(ours, theirs, relative):
    """Assert that every tensor differs by at most ``relative`` of its own norm."""
    assert ours.keys() == theirs.keys()
    worst = {k: np.linalg.norm(ours[k] - v) / np.linalg.norm(v) for k, v in theirs.items()}
    assert max(worst.values()) <= relative, sorted(worst.items(), key=lambda x: -x[1])[:5]
