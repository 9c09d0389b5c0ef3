"""The words of docs/benchmarks.md: what each section measures, and how to read it."""

INTRO = """# Benchmarks

Written by `{command}`; the raw rows are in `{raw}`.

Every time is measured beside the peer (PyTorch's own operators, or Hugging Face transformers on
them) in the same run on the same machine, each in its own process. The two take turns (ours, peer,
ours, peer, ours); times are medians over all turns after warm-up, compilation is not in them.
`ratio` is the peer's time over ours: above 1 mmjax is faster. `noise` is the spread of one side's
medians from turn to turn: a ratio closer to 1 than that says nothing. `parity` is the difference of
the results on the same weights and inputs, and a row whose parity is missing or above its bound
does not count. Where a peer fails, ours is measured alone, and does not count either.
`load n` marks rows during which other programs kept n cores busy: those say little, torch's threads
above all wait for each other; run them again on a quiet machine.
"""

SUITES = {
    "probe": (
        "Probe",
        "What the machine and the installed versions can do, measured by mmjax alone in a process "
        "of its own. *Attention* runs a causal case of 128 tokens through each implementation, "
        "forward and backward, on a GPU also packed rows with padding, grouped heads and ALiBi: "
        "the largest difference from float64 over the largest value, or what kept it from running; "
        "off a GPU `triton` runs interpreted. *Matmul* and *copy* are the fastest of five turns; a "
        "copy counts what it reads and what it writes.",
    ),
    "attention": (
        "Attention",
        "`mmjax.ops.attention.attention` under `jax.jit`, by implementation, against "
        "`torch.nn.functional.scaled_dot_product_attention` on its own layout, all causal. "
        "*Packed* rows hold several documents that do not see each other: ours gets their ranges "
        "of keys, the peer a boolean mask, or a call for each document. Backward: the gradients of "
        "q, k and v. Parity: largest difference over largest value of the output and of each "
        "gradient, first and last head (bound {bound:g}). Units are {unit}: 4 h operations for "
        "each visible pair of query and key forward and 10 h backward, on both sides alike, "
        "whatever a side computes.",
    ),
    "loss": (
        "Loss head",
        "`mmjax.ops.xent.chunked_nll` of the supervised rows, loss and gradients of hidden states "
        "and head, against `linear` and `cross_entropy` in float32. *Answers*: a quarter of the "
        "tokens. *All logits*: the peer computes those of every token, with labels -100 where "
        "there is no target; *gathered logits*: it takes the supervised rows first. Parity: "
        "largest difference over largest value of the loss and of both gradients (bound "
        "{bound:g}). Units are tokens, supervised or not.",
    ),
    "train": (
        "Train step",
        "A full AdamW step with clipping: `mmjax.train.step` against `FuyuForCausalLM` with "
        '`attn_implementation="sdpa"` and the faster of fused and foreach AdamW, float32, dropout '
        "0. Three quarters of a row are image patches. *Loss on answers*: the peer gets labels "
        "-100 elsewhere; *gathered logits* is the peer told to compute only the logits that the "
        "loss needs. *scan_unroll of all layers* is ours with that setting. Parity: largest "
        "relative difference of losses and gradient norms over four optimizer steps (bound "
        "{bound:g}). Units are tokens.",
    ),
    "decode": (
        "Generation",
        "Greedy answers with one image of 12 x 16 patches in the prompt: `mmjax.load(...)."
        "generate_tokens` against `generate` with its default cache, sdpa, float32; the prefill "
        "is in the time. Parity: share of new tokens that differ (bound {bound:g}). Units are new "
        "tokens.",
    ),
    "flamingo": (
        "Flamingo",
        "Beside OpenFlamingo's own code (open-flamingo 2.0.1 in an environment of its own, today's "
        "torch and transformers), built by its factory on a random MPT; its state dict is the "
        "checkpoint that mmjax reads. float32, dropout 0. *Train step*: language model and tower "
        "are frozen; resampler, gated blocks and the embeddings of `<image>` and `<|endofchunk|>` "
        "are trained, the loss is on what follows an image. `mmjax.train.step` against the peer's "
        "forward with labels, backward, mask of the embedding's gradient, clipping and the fastest "
        "of torch's plain, fused and foreach AdamW; ours normalises the pictures in the step, the "
        "peer's are normalised beforehand. *Generation*: greedy answers to prompts with solved "
        "examples, `mmjax.load(...).generate_tokens` against `Flamingo.generate`; the tower and "
        "the prefill are in the time. `use_cache=False` is what the peer does unless told "
        "otherwise, for that is MPT's default: the whole text again for each token; `use_cache="
        "True` is the peer told to keep keys and values. Parity: largest relative difference of "
        "losses and gradient norms over four optimizer steps (bound {bound:g}); share of new "
        "tokens that differ (bound 0). Units are tokens, in generation new ones.",
    ),
    "bunny": (
        "Bunny",
        "Beside the classes of transformers that Bunny's own are made of, for its code does not "
        "run with today's: `PhiForCausalLM` without a bias in its head, `SiglipVisionModel` "
        "without its last layer (`hidden_states[-2]` of the whole) and a torch `Sequential`, "
        "joined by `masked_scatter` and run with `inputs_embeds`, sdpa. Both read one random model "
        "in the form of Bunny's merge script. float32, dropout 0. *Train step*: stage 2 of Bunny's "
        "scripts, the tower frozen: language model and projector, or adapters (PEFT's on the "
        "peer's side) and projector; rows of an image, questions and answers, of different "
        "lengths and padded on the right on both sides, the loss on the answers; "
        "`mmjax.train.step` against forward, backward, clipping and the fastest of torch's plain, "
        "fused and foreach AdamW. *sdpa* is what Bunny does: the padding's mask, and logits of "
        "every token; *gathered logits* computes those alone that the loss needs, and no mask; "
        "*compiled layers* runs each layer of it under `torch.compile`. Ours normalises the "
        "pictures in the step, the peer's are normalised beforehand. *Generation*: greedy answers "
        "to prompts of different lengths, each with its own image, "
        "`mmjax.load(...).generate_tokens` against `generate` with its default cache, left-padded; "
        "tower, projector and prefill are in the time. Parity: largest relative difference of "
        "losses and gradient norms over four optimizer steps (bound {bound:g}); share of new "
        "tokens that differ (bound 0). Units are tokens, padding not counted, in generation new "
        "ones.",
    ),
    "input": (
        "Processor",
        "`FuyuProcessor.encode_prompt` of one decoded RGB picture and a question against the "
        "peer's `FuyuProcessor` call. *uint8 patches* is what mmjax trains and answers from (the "
        "model normalises); *float patches* adds the peer's normalisation. The peer's image "
        "processor is `FuyuImageProcessorPil`, the one without torchvision, unless the row says "
        "torchvision. Parity: tokens equal, patches within one grey level where Pillow resizes "
        "and equal where nothing is resized. Units are images.",
    ),
    "train_8b": (
        "Train step of Fuyu-8B",
        "One GPU, the model at its full size, weights drawn on the device, bfloat16. *Adapters*: "
        "LoRA of rank 16 on every linear map of the layers, AdamW; `mmjax.train.step`, whose "
        "remat is `names`, against transformers and PEFT, in the settings that the row names. "
        "*Packed*: ours gets one row, the peer a batch of the documents. *All weights*: float32 "
        "masters and Adafactor, without a peer. Parity: largest relative difference of losses and "
        "gradient norms over four optimizer steps of a small model that both sides read, in "
        "float32, adapters on all but query, key and value (bound {bound:g}). Units are tokens.",
    ),
    "decode_8b": (
        "Generation of Fuyu-8B",
        "One GPU, the model at its full size, weights drawn on the device, bfloat16, greedy "
        "answers behind one image: `LoadedModel.generate_tokens` against `generate`; the prefill "
        "is in the time. Parity: share of the new tokens of a small model in float32 that differ "
        "(bound {bound:g}). Units are new tokens.",
    ),
    "length": (
        "Length of the rows",
        "`mmjax.train.step` of a Fuyu with AdamW, in float32, every batch of as many tokens, three "
        "quarters of them image patches, a target in sixteen tokens. *Time* and *FLOPs* are those "
        "of a step over the first line's; FLOPs are what training counts for MFU, in which "
        "attention alone grows with the length. Medians of steps that take turns, after one to "
        "warm up; there is no peer.",
    ),
    "shard": (
        "Sharding",
        "`mmjax.train.step` of a Fuyu with AdamW on meshes of eight simulated CPU devices; no "
        "statement on speed. Collectives are counted in the compiled program; one inside the loop "
        "over layers counts once. Bytes are those of one device, from the compiler: *arguments* "
        "are its share of parameters, optimizer state and batch, *temporary* what a step needs "
        "beside them. Compiled without LLVM's optimisation, which changes neither. Parity: largest "
        "relative difference of the losses of two steps from those of the same run on one device "
        "(bound {bound:g}).",
    ),
}


CONVERT = """## Conversion

`python -m bench.convert`: a checkpoint in the hub's layout with random bfloat16 weights, converted
by `convert_weights.to_jax` and written back by `convert_weights.to_hf`, each in a process of its
own. Peak is the resident memory that the kernel reports for that process, mapped files included;
"at most" marks a row whose peak may be that of the process that started it. *Changed* counts the
tensors that came back with any bit different. Load average is that at the end, of this and other
programs: above 1 the times say little. There is no peer here.
"""


PIPELINE = """## Pipeline

`python -m bench.pipeline`: a LLaVA file of conversations, each with one of the JPEG pictures drawn
at random, through `make_train_iterator` (source, template `fuyu_chat`, `FuyuProcessor`, packing,
data workers) and, with as many workers, through the peer's `FuyuProcessor` (the Pillow one) in a
torch `DataLoader`, a sample at a time. Both decode the same files and resize nothing; the peer does
not pack, and goes over the first records of the same order alone. Pictures are used several times,
so the files come from the page cache on both sides. *Per core* divides by the processor seconds of
the process and its workers, their start included; *noise* is by how much that differs, behind the
first batch, between all records and a tenth of them before the peer's turn. *Padding* is the share
of the tokens of all batches that are no sample's. Memory is resident, pages that several processes
share counted once, shared memory included: medians over 40-60 % of the records and over the last
20 %. *Own* is without shared memory, where finished batches wait for the trainer; their number is
bounded by the workers' buffers, which fill early on. Parity: share of token ids that differ and
largest difference of grey levels, ours taken out of the packed batches.
"""
