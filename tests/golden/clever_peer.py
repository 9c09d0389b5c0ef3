"""instruct_flamingo's own modules, from a checkout, on today's torch and transformers.

CHECKOUT is github.com/ChenDelong1999/instruct_flamingo at 4dd4d6d, as its Clever Flamingo v2 was
trained; its model is OpenFlamingo's, here open-flamingo 2.0.1 (flamingo_peer.py). The modules run
as they are. What they import and these goldens never call is an empty stand-in: wandb, webdataset,
and data_utils, which makes loaders of tar shards. PEFT now refuses their task_type, which then
named nothing either.
"""

import importlib.machinery
import importlib.util
import os
import sys
import types

import flamingo_peer

FOLDER = os.path.join("open_flamingo", "instruction_tuning")


def import_module(checkout, name):
    """Return a module of the checkout's instruction_tuning: data, train_utils or inferencer."""
    flamingo_peer.import_peer()
    for absent in ("wandb", "webdataset", "data_utils"):
        if absent not in sys.modules:
            sys.modules[absent] = types.ModuleType(absent)
            sys.modules[absent].__spec__ = importlib.machinery.ModuleSpec(absent, None)
    if name == "inferencer":  # it takes these from the package, which the checkout extends
        import open_flamingo

        train_utils = import_module(checkout, "train_utils")
        for one in ("prepare_model_for_tuning", "resume_from_checkpoints"):
            setattr(open_flamingo, one, getattr(train_utils, one))
        open_flamingo.create_model_and_transforms_v1 = None
        open_flamingo.get_params_count_summary = None
    module = from_file(os.path.join(checkout, FOLDER, f"{name}.py"), f"clever_{name}")
    if name == "train_utils":
        module.LoraConfig = lora_config
    return module


def lora_config(task_type, **settings):
    """Return PEFT's LoraConfig without a task."""
    import peft

    return peft.LoraConfig(**settings)


def from_file(path, name):
    """Return the module in a file."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def tuning_configs(checkout):
    """Return the published tuning configs, {name: path}."""
    folder = os.path.join(checkout, FOLDER, "tuning_config")
    return {f.removesuffix(".json"): os.path.join(folder, f) for f in sorted(os.listdir(folder))}


def add_tokens(tokenizer):
    """Add the special tokens as the factory does; returns the tokenizer."""
    marks = {"additional_special_tokens": ["<|endofchunk|>", "<image>"]}
    tokenizer.add_special_tokens(marks)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    return tokenizer
