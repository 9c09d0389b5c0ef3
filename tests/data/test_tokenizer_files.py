"""Tokenizer files that transformers 4 reads, which the models' PyTorch code is pinned to."""

import json

import pytest

from mmjax.data.tokenize import load_tokenizer
from mmjax.data.tokenizer_files import make_readable, save_tokenizer
from tests.tiny_language_tokenizers import build_llama_tokenizer, build_neox_tokenizer

TEXT = "### Human: a red circle\n\n<image> a  small dog? <answer>"


@pytest.mark.parametrize("kind", ["neox", "llama", "first_only"])
def test_what_is_saved_is_in_words_of_both_versions_and_gives_the_same_tokens(kind, tmp_path):
    if kind == "neox":
        tokenizer = build_neox_tokenizer()
    else:
        tokenizer = build_llama_tokenizer(first_only=kind == "first_only")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<answer>"]})
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    tokenizer.chat_template = "{{ messages }}"
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<image>", "<answer>"]
    assert config["chat_template"] == "{{ messages }}"
    assert not {"extra_special_tokens", "backend", "is_local"} & config.keys()
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["model"]["merges"]
    assert all(isinstance(pair, str) for pair in saved["model"]["merges"])
    if kind == "first_only":
        assert saved["pre_tokenizer"]["add_prefix_space"] is True
    again = load_tokenizer(tmp_path)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.decode(again(TEXT)["input_ids"]) == tokenizer.decode(tokenizer(TEXT)["input_ids"])
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.chat_template == tokenizer.chat_template


def test_files_of_other_writers_stay_as_they_are(tmp_path):
    texts = {
        "tokenizer_config.json": '{"tokenizer_class": "CodeGenTokenizer"}',
        "tokenizer.json": '{"model": {"merges": [["a", "b"]]}}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    make_readable(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in texts} == texts


def test_pieces_with_a_space_stay_pairs(tmp_path):
    """As one string they could not be told apart."""
    (tmp_path / "tokenizer_config.json").write_text('{"backend": "tokenizers"}')
    model = {"type": "BPE", "vocab": {"a b": 0}, "merges": [["a ", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    make_readable(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"] == model
