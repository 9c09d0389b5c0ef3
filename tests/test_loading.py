"""``mmjax.load``: prompts and images in every form, one answer; and what it says when it cannot."""

import dataclasses
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import FuyuForCausalLM

import mmjax
from convert_weights import to_hf, to_jax
from mmjax.loaded import LoadedModel
from mmjax.models.fuyu.processor import FuyuProcessor
from mmjax.models.fuyu.processor_config import ProcessorConfig
from mmjax.parallel.mesh import make_mesh
from mmjax.prompts import image_list
from mmjax.types import BadSample, MMJaxError
from tests.parity import peer
from tests.tiny_tokenizer import build_tiny_tokenizer

QUESTION = "what colour is the circle?"
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 14, 3), np.uint8)
IDS = [1, 20, 5, 5, 6, 5, 5, 6, 33, 41, 9]
PATCHES = np.random.default_rng(1).uniform(-1, 1, (4, 48)).astype(np.float32)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder without tokenizer files, and its torch model."""
    folder = tmp_path_factory.mktemp("bare")
    model = peer.tiny_fuyu()
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with tokenizer and processor."""
    folder = tmp_path_factory.mktemp("whole")
    processor = FuyuProcessor(ProcessorConfig(patch_size=peer.PATCH), build_tiny_tokenizer())
    ids = processor.token_ids()
    eos = ids["eos_token_id"]
    model = peer.tiny_fuyu(vocab=ids["vocab_size"], image=ids["image_token_id"], eos=eos)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def loaded(whole):
    return mmjax.load(whole[0])


@pytest.fixture(scope="module")
def ids_only(bare):
    return mmjax.load(bare[0])


def torch_logits(model, ids, patches=None):
    kwargs = {} if patches is None else {"pixel_values": torch.from_numpy(patches)}
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **kwargs).logits[0].numpy()


def encoded(image, form):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def test_what_it_returns(loaded):
    assert loaded.family == "fuyu"
    assert loaded.config.decoder.rope_theta == 25_000.0
    assert loaded.config.eos_token_id == loaded.processor.eos_token_id
    tokens, logits = loaded.logits(QUESTION, [PIXELS])
    assert (tokens.dtype, logits.dtype) == (np.int32, np.float32)
    assert tokens.shape[0] == logits.shape[0] and logits.shape[1] == loaded.config.vocab_size
    assert (tokens == loaded.config.image_token_id).sum() == 2 * 4  # 7 x 14 in patches of 4


def test_string_prompts_have_the_peers_logits(loaded, whole):
    example = loaded.encode(QUESTION, [PIXELS])
    patches = loaded.processor.config.normalise(example["patches"])
    tokens, logits = loaded.logits(QUESTION, [PIXELS])
    want = torch_logits(whole[1], tokens.tolist(), patches)
    np.testing.assert_allclose(logits, want, atol=1e-4)
    tokens, logits = loaded.logits(QUESTION)
    np.testing.assert_allclose(logits, torch_logits(whole[1], tokens.tolist()), atol=1e-4)


def test_an_image_is_the_same_in_every_form(loaded, tmp_path):
    image = Image.fromarray(PIXELS)
    (tmp_path / "a.png").write_bytes(encoded(image, "PNG"))
    config = loaded.processor.config
    normalised = config.normalise(PIXELS)
    channels_first = np.ascontiguousarray(normalised.transpose(2, 0, 1))
    forms = [
        tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image, "PNG"), image, PIXELS,
        normalised, channels_first, channels_first[None],
    ]  # fmt: skip
    tokens, want = loaded.logits(QUESTION, [PIXELS])
    for form in forms:
        for images in ([form], form):
            got_tokens, got = loaded.logits(QUESTION, images)
            assert got_tokens.tolist() == tokens.tolist()
            np.testing.assert_allclose(got, want, atol=1e-5)
    example = loaded.encode(QUESTION, [PIXELS])
    patches = config.normalise(example["patches"])
    for ready in (patches, patches[None], torch.from_numpy(patches)):
        _, got = loaded.logits(tokens.tolist(), [ready])
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_images_stand_where_their_marks_stand(loaded, whole):
    other = PIXELS[:4, :8]
    tokens, logits = loaded.logits("the <image> circle <image> beside", [other, PIXELS])
    image = loaded.config.image_token_id
    patches = loaded.encode("the <image> circle <image> beside", [other, PIXELS])["patches"]
    assert np.flatnonzero(tokens == image).size == 2 + 8 == len(patches)
    want = torch_logits(whole[1], tokens.tolist(), loaded.processor.config.normalise(patches))
    np.testing.assert_allclose(logits, want, atol=1e-4)


def test_coordinates_of_an_answer_are_pixels_of_the_last_image(loaded):
    """As in the prompt that it follows, where a text means the image before it."""

    class Repeating(LoadedModel):
        def generate_tokens(self, examples, **options):
            return [example["tokens"][-5:-1] for example in examples]  # before <answer>

    small = loaded.processor.with_options(max_height=4, max_width=8)
    model = Repeating("fuyu", loaded.config, loaded.model, small, loaded.mesh)
    wide, tiny = np.zeros((8, 16, 3), np.uint8), PIXELS[:4, :8]
    tag = "<point>8, 4</point>"
    for images in ([wide, tiny], [tiny, wide], [wide], wide, [tiny], None):
        marks = "<image>" * len(image_list(images))
        assert model.generate(marks + tag, images) == [tag]
    assert model.coordinate_scale([tiny, wide]) == 0.5
    assert model.coordinate_scale([wide, tiny]) == model.coordinate_scale([]) == 1.0


def test_token_ids_are_used_as_they_are(ids_only, bare):
    want = torch_logits(bare[1], IDS, PATCHES)
    halves = [PATCHES[:3], PATCHES[3:]]  # images of their own, in order
    for prompt in (IDS, tuple(IDS), np.asarray(IDS), np.asarray(IDS, np.int64)):
        for images in ([PATCHES], [PATCHES[None]], halves):
            tokens, logits = ids_only.logits(prompt, images)
            assert tokens.tolist() == IDS
            np.testing.assert_allclose(logits, want, atol=1e-4)


def test_image_ids_without_images_are_plain_tokens(ids_only, bare):
    _, logits = ids_only.logits(IDS)
    np.testing.assert_allclose(logits, torch_logits(bare[1], IDS), atol=1e-4)


def test_a_folder_without_a_tokenizer_says_what_is_missing_for_a_string(ids_only, bare):
    for call in (ids_only.logits, ids_only.generate):
        with pytest.raises(MMJaxError, match=r"tokenizer\.json.*token ids"):
            call("what is it?")
    answer = ids_only.generate(IDS, [PATCHES], max_new_tokens=5)
    assert len(answer) == 1 and all(0 <= int(x) < peer.VOCAB for x in answer[0].split())


def test_generate_takes_one_prompt_or_many_and_each_is_answered_as_alone(loaded):
    prompts = [QUESTION, "is there a red triangle?", "the <image> and <image>", QUESTION]
    images = [PIXELS, None, [PIXELS[:4, :8], PIXELS[:4]], [PIXELS[:5, :5]]]
    together = loaded.generate(prompts, images, max_new_tokens=8)
    assert len(set(together)) > 1
    for prompt, image, answer in zip(prompts, images, together, strict=True):
        assert loaded.generate(prompt, image, max_new_tokens=8) == [answer]
    assert loaded.generate(prompts, images, max_new_tokens=8, batch_size=3) == together
    assert loaded.generate(prompts[1:2], max_new_tokens=8) == together[1:2]
    assert loaded.generate(prompts[:1], PIXELS[None], max_new_tokens=8) == together[:1]
    assert loaded.generate(prompts[:1], Image.fromarray(PIXELS), max_new_tokens=8) == together[:1]


def test_token_id_prompts_one_or_many_are_told_apart(ids_only):
    short = [1, 9, 30]
    one = ids_only.generate(IDS, [PATCHES], max_new_tokens=6)
    two = ids_only.generate([IDS, short], [[PATCHES], None], max_new_tokens=6)
    assert (len(one), len(two)) == (1, 2)
    assert two == one + ids_only.generate(np.asarray(short), max_new_tokens=6)
    for kind in (torch.tensor, jax.numpy.asarray):  # elements of these are no integers of Python
        assert ids_only.generate(kind(short), max_new_tokens=6) == two[1:]
        assert ids_only.generate(kind([short, short]), max_new_tokens=6) == two[1:] * 2


def test_generated_text_is_the_peers_greedy_text(loaded, whole):
    example = loaded.encode(QUESTION, [PIXELS])
    ids = torch.from_numpy(example["tokens"]).long()[None]
    out = whole[1].generate(
        input_ids=ids,
        pixel_values=torch.from_numpy(loaded.processor.config.normalise(example["patches"])),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    want = loaded.processor.decode(out[0, ids.shape[1] :].tolist())
    assert loaded.generate(QUESTION, [PIXELS], max_new_tokens=12) == [want]


def test_sampling_is_seeded(ids_only):
    def draw(seed, batch_size):
        options = dict(max_new_tokens=12, temperature=2.0, seed=seed, batch_size=batch_size)
        return ids_only.generate([IDS] * 4, [[PATCHES]] * 4, **options)

    answers = draw(1, 2)
    assert len(set(answers)) == 4  # every prompt draws for itself
    assert draw(1, 4) == answers
    assert not set(draw(2, 2)) & set(answers)


BEAMS = dict(max_new_tokens=6, num_beams=3, length_penalty=0.0)


@pytest.mark.heavy
def test_beams_answer_each_prompt_as_alone_and_give_several_answers(ids_only):
    prompts, images = [IDS, [1, 9, 30], [4, 4]], [[PATCHES], None, None]
    best = ids_only.generate(prompts, images, batch_size=2, **BEAMS)
    assert best != ids_only.generate(prompts, images, max_new_tokens=6)
    several = ids_only.generate(prompts, images, num_return_sequences=2, **BEAMS)
    assert [row[0] for row in several] == best
    assert all(len(set(row)) == 2 for row in several)


@pytest.mark.heavy
def test_beams_follow_their_rows_of_an_int8_cache(ids_only):
    """Whatever stands beside a prompt; one program, for its shapes are the same."""

    def answers(*prompts):
        images = [[PATCHES] if p is IDS else None for p in prompts]
        return ids_only.generate(prompts, images, cache_dtype="int8", **BEAMS)

    first, second, _ = answers(IDS, [1, 9, 30], [4, 4])
    assert first != second and answers([1, 9, 30], [1, 9, 30], IDS) == [second, second, first]


def test_stop_takes_ids_and_tokens(loaded, ids_only):
    full = ids_only.generate(IDS, [PATCHES], max_new_tokens=6)[0].split()
    at = full.index(full[3])
    for stop in (int(full[3]), [int(full[3])]):
        assert ids_only.generate(IDS, [PATCHES], max_new_tokens=6, stop=stop) == [
            " ".join(full[:at])
        ]
    eos, tokenizer = loaded.config.eos_token_id, loaded.processor.tokenizer
    token = tokenizer.convert_ids_to_tokens(20)
    assert loaded.end_tokens([token, eos, 20, 21]) == (eos, 20, 21)
    assert loaded.end_tokens(token) == loaded.end_tokens(np.int32(20)) == (eos, 20)
    for model, stop in ((loaded, "<|nowhere|>"), (ids_only, "a"), (ids_only, 96), (ids_only, -1)):
        with pytest.raises(MMJaxError, match=f"stop holds {re.escape(repr(stop))}.*vocabulary"):
            model.generate([1, 2], stop=[stop])


def test_the_token_that_training_ends_an_answer_with_always_ends_one(loaded, ids_only):
    """The first revision of Fuyu-8B's config.json states 2, which no Fuyu ever says."""
    ends = loaded.processor.eos_token_id
    stated = dict(config=dataclasses.replace(loaded.config, eos_token_id=2), ends=(3,))
    first = dataclasses.replace(loaded, **stated)
    assert first.end_tokens() == (2, 3, ends) and loaded.end_tokens() == (ends,)
    other = dataclasses.replace(ids_only, processor=FuyuProcessor())
    assert other.end_tokens() == (peer.EOS,)  # 71013 is no token of its vocabulary


def test_ends_of_generation_config_end_an_answer_as_the_peers(tmp_path, bare, ids_only):
    folder = tmp_path / "instruct"
    shutil.copytree(bare[0], folder)
    full = ids_only.generate(IDS, [PATCHES], max_new_tokens=6)[0].split()
    stated = {"eos_token_id": [ids_only.config.eos_token_id, int(full[3]), 10**6]}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    model = mmjax.load(folder)
    assert model.end_tokens() == (ids_only.config.eos_token_id, int(full[3]))
    theirs = FuyuForCausalLM.from_pretrained(folder).generate(
        input_ids=torch.tensor([IDS]), pixel_values=torch.tensor(PATCHES)[None],
        max_new_tokens=6, do_sample=False,
    )  # fmt: skip
    ours = model.generate(IDS, [PATCHES], max_new_tokens=6)[0].split()
    assert ours == [str(int(i)) for i in theirs[0, len(IDS) : -1]] == full[: full.index(full[3])]
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(MMJaxError, match="generation_config.json: not a JSON object"):
        mmjax.load(folder)


@pytest.mark.parametrize("nested", [False, True])
def test_all_ends_of_config_json_end_an_answer_after_conversion_and_export(nested, tmp_path, bare):
    """A folder may have no generation_config.json; transformers then reads the list there."""
    folder, ends = tmp_path / "several", [peer.EOS, 33]
    shutil.copytree(bare[0], folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = ends
    config |= {} if nested else {"eos_token_id": ends}
    (folder / "config.json").write_text(json.dumps(config))
    to_jax.main([str(folder), str(tmp_path / "jax")])
    to_hf.main([str(tmp_path / "jax"), str(tmp_path / "hf")])
    for path in (folder, tmp_path / "jax", tmp_path / "hf"):
        assert mmjax.load(path).end_tokens() == tuple(ends), path
    peers = FuyuForCausalLM.from_pretrained(tmp_path / "hf")
    assert peers.generation_config.eos_token_id == ends


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_beams=0), "num_beams is 0"),
        (dict(num_beams=2.0), "num_beams is 2.0; give a whole number"),
        (dict(max_new_tokens=float("inf")), "max_new_tokens is inf; give a whole number"),
        (dict(max_new_tokens="3"), "max_new_tokens is '3'"),
        (dict(batch_size=True), "batch_size is True"),
        (dict(temperature="0.7"), "temperature='0.7'"),
        (dict(temperature=1.0, top_k=1.5), "top_k=1.5"),
        (dict(repetition_penalty=None), "repetition_penalty is None"),
        (dict(no_repeat_ngram_size=2.5), "no_repeat_ngram_size is 2.5"),
        (dict(num_beams=2, length_penalty=10**400), "length_penalty is 1000"),
        (dict(num_beams=97), "num_beams is 97.*vocabulary of 96"),
        (dict(num_beams=2, temperature=0.5), r"num_beams is 2 with temperature 0\.5"),
        (dict(num_beams=2, early_stopping="always"), "early_stopping is 'always'"),
        (dict(num_return_sequences=2), "num_return_sequences is 2 with num_beams=1"),
        (dict(num_beams=2, num_return_sequences=0), "num_return_sequences is 0"),
        (dict(repetition_penalty=0.0), r"repetition_penalty is 0\.0"),
        (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size is -1"),
        (dict(cache_dtype="int4"), 'cache_dtype is .int4.; give one of "float32".*"int8", or None'),
        (dict(min_new_tokens=5, max_new_tokens=4), "min_new_tokens is 5.*max_new_tokens 4"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(min_new_tokens=-1), "min_new_tokens is -1"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=1.5), r"top_p=1\.5"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(num_beams=2, early_stopping=1), "early_stopping is 1"),
        (dict(num_beams=2, length_penalty=float("nan")), "length_penalty is nan"),
    ],
)
def test_options_that_cannot_be_are_explained(ids_only, options, message):
    with pytest.raises(MMJaxError, match=message):
        ids_only.generate([1, 2], **options)


def test_no_prompts_no_answers(loaded):
    assert loaded.generate([]) == []


@pytest.mark.parametrize(
    "prompt, images, message",
    [
        ([], None, "prompt is empty"),
        ([1, 96, 3], None, "token id 96.*vocabulary of 96"),
        ([1, -4, 30], None, "token id -4.*vocabulary of 96"),
        (IDS, [PATCHES[:3]], "4 image tokens.*3 patches"),
        (IDS, [PATCHES, PATCHES], "4 image tokens.*8 patches"),
        ([1, 2, 3], [PATCHES], "0 image tokens.*4 patches"),
        ([1, 5], [np.zeros((2, 7), np.float32)], r"patches \[p,48\].*got \[2, 7\]"),
        ([1.5, 2.0], None, "integer token ids"),
        (IDS, ["/nowhere/a.png"], "/nowhere/a.png"),
        (IDS, [b"\x89PNG not really"], "(?i)image"),
    ],
)
def test_bad_prompts_are_explained(ids_only, prompt, images, message):
    for call in (ids_only.logits, lambda p, i: ids_only.generate([p], [i], max_new_tokens=2)):
        with pytest.raises(MMJaxError, match=message):
            call(prompt, images)


def test_bad_string_prompts_are_explained(loaded):
    with pytest.raises(MMJaxError, match="1 <image> marks for 2 images"):
        loaded.logits("a <image> b", [PIXELS, PIXELS])
    with pytest.raises(BadSample, match="without a grid"):
        loaded.logits("a", [PATCHES])
    with pytest.raises(MMJaxError, match="2 prompts and images for 1"):
        loaded.generate(["a", "b"], [None])
    for image in ("a.jpg", b"jpg", Image.new("RGB", (4, 4))):  # one image, in whatever form
        with pytest.raises(MMJaxError, match="2 prompts and images for 1"):
            loaded.generate(["a", "b"], image)
    for none in (None, 3, iter("a"), np.array("a")):
        with pytest.raises(MMJaxError, match="prompts are .*; give a string, a list of token ids"):
            loaded.generate(none)
    with pytest.raises(MMJaxError, match="max_new_tokens is 0"):
        loaded.generate("a", max_new_tokens=0)


@pytest.mark.heavy
def test_images_of_both_kinds_in_one_call_are_answered_as_alone(loaded):
    normalised = loaded.processor.config.normalise(PIXELS)
    both = loaded.generate([QUESTION] * 2, [PIXELS, normalised], max_new_tokens=4)
    assert both == loaded.generate(QUESTION, PIXELS, max_new_tokens=4) * 2


def test_a_converted_folder_answers_as_the_checkpoint(loaded, whole, tmp_path):
    to_jax.main([str(whole[0]), str(tmp_path / "jax")])
    converted = mmjax.load(tmp_path / "jax")
    assert converted.config == loaded.config
    tokens, logits = converted.logits(QUESTION, [PIXELS])
    want_tokens, want = loaded.logits(QUESTION, [PIXELS])
    assert tokens.tolist() == want_tokens.tolist()
    assert np.array_equal(logits, want)


@pytest.mark.heavy
def test_a_mesh_of_several_devices_gives_the_same_answers(ids_only, bare):
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    spread = mmjax.load(bare[0], mesh=mesh)
    kernel = spread.model.decoder.layers.mlp.up.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 32, 40)
    _, want = ids_only.logits(IDS, [PATCHES])
    _, logits = spread.logits(IDS, [PATCHES])
    np.testing.assert_allclose(logits, want, atol=1e-4)
    prompts, images = [IDS, [1, 9, 30], [4, 4]], [[PATCHES], None, None]
    want = ids_only.generate(prompts, images, max_new_tokens=6)
    assert spread.generate(prompts, images, max_new_tokens=6) == want
    want = ids_only.generate(prompts, images, **BEAMS)
    assert spread.generate(prompts, images, **BEAMS) == want


def test_bfloat16_is_close_and_half_the_size(ids_only, bare):
    half = mmjax.load(bare[0], dtype="bfloat16")
    assert half.model.decoder.head.kernel[...].dtype == "bfloat16"
    _, want = ids_only.logits(IDS, [PATCHES])
    _, logits = half.logits(IDS, [PATCHES])
    assert logits.dtype == np.float32
    assert np.abs(logits - want).max() < 0.1 * np.abs(want).max()


@pytest.fixture(scope="module")
def adapter(bare, tmp_path_factory):
    """A PEFT adapter on every linear map of the blocks, none of its factors zero."""
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    model = get_peft_model(peer.tiny_fuyu(), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, model


def test_an_adapter_is_loaded_onto_its_base(adapter, bare, ids_only):
    adapted = mmjax.load(adapter[0], base=bare[0])
    _, logits = adapted.logits(IDS, [PATCHES])
    want = torch_logits(adapter[1], IDS, PATCHES)
    np.testing.assert_allclose(logits, want, atol=1e-4)
    assert np.abs(want - ids_only.logits(IDS, [PATCHES])[1]).max() > 0.1


def test_an_adapter_finds_the_base_that_its_config_names(adapter, bare, tmp_path):
    about = json.loads((adapter[0] / "adapter_config.json").read_text())
    about["base_model_name_or_path"] = str(bare[0])
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    weights = adapter[0] / "adapter_model.safetensors"
    (tmp_path / "adapter_model.safetensors").write_bytes(weights.read_bytes())
    _, logits = mmjax.load(tmp_path).logits(IDS, [PATCHES])
    np.testing.assert_allclose(logits, torch_logits(adapter[1], IDS, PATCHES), atol=1e-4)


def test_a_tokenizer_of_another_model_is_refused(bare, tmp_path):
    FuyuProcessor(ProcessorConfig(patch_size=4), build_tiny_tokenizer()).save_pretrained(tmp_path)
    for file in bare[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(MMJaxError, match=r"vocab_size is 96.*different models"):
        mmjax.load(tmp_path)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_dtype_that_is_none_is_named(bare, dtype):
    with pytest.raises(MMJaxError, match=f"dtype is '{dtype}'; give \"float32\""):
        mmjax.load(bare[0], dtype=dtype)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MMJaxError, match="nothing-here"):
        mmjax.load(tmp_path / "nothing-here")
    with pytest.raises(MMJaxError, match="hf download adept/fuyu-8b --local-dir fuyu-8b$"):
        mmjax.load("adept/fuyu-8b")
    with pytest.raises(MMJaxError, match=str(tmp_path)):
        mmjax.load(tmp_path)


def test_a_mesh_that_does_not_divide_the_model_is_told(bare):
    for axis, size in (("tensor", 3), ("fsdp", 5)):
        mesh = make_mesh({axis: size}, jax.devices()[:size])
        says = rf"parameter \S+ has shape .*does not divide over {axis} {size}; set mesh\.{axis}"
        with pytest.raises(MMJaxError, match=says):
            mmjax.load(bare[0], mesh=mesh)
    with pytest.raises(MMJaxError, match="does not divide over tensor 8; set mesh.tensor to a"):
        mmjax.load(bare[0], mesh={"tensor": -1})  # of all devices, in a recipe's words
    for mesh in (jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), "fsdp=2"):
        with pytest.raises(MMJaxError, match=r"such as \{'fsdp': -1\}, or a mesh of mmjax"):
            mmjax.load(bare[0], mesh=mesh)
