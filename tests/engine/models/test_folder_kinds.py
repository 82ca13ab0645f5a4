"""What people pass instead of a decoder-only model is named, and what is one is left alone."""

import json
import shutil
import subprocess
import sys

import pytest
import tiny

from djinn_lib.engine.models.folder_kinds import explain_folder

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
VISION = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def config(**fields):
    return {"config.json": {**LLAMA, **fields}, "model.safetensors": ""}


def saved(architecture, **fields):
    return config(architectures=[architecture], **fields)


CERTAIN = [
    (
        {"adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "a/b"},
         "adapter_model.safetensors": ""},
        "a LoRA adapter (adapter_config.json) for 'a/b': merge it into its base model",
    ),
    ({"adapter_config.json": {"peft_type": "IA3"}}, "a IA3 adapter"),
    ({"adapter_config.json": "{"}, "a PEFT adapter (adapter_config.json): merge it"),
    ({**config(), "adapter_config.json": {}}, "and model weights that may or may not include it"),
    ({"model_index.json": {"_class_name": "FluxPipeline"}, "unet/config.json": "{}"},
     "a diffusers pipeline (FluxPipeline)"),
    ({"config.json": {"_class_name": "UNet2DModel", "_diffusers_version": "1"}},
     "a part of a diffusers pipeline (UNet2DModel)"),
    ({**saved("BertModel"), "modules.json": "[]"}, "an embedding model (modules.json"),
    ({**config(), "config_sentence_transformers.json": {}}, "an embedding model"),
    (saved("LlamaForSequenceClassification"), "a classifier or reward model (LlamaForSequence"),
    (saved("BertForTokenClassification"), "a classifier or reward model"),
    (saved("Qwen2ForRewardModel"), "a classifier or reward model"),
    (saved("InternLM2ForRewardModel"), "a classifier or reward model"),
    (saved("T5ForConditionalGeneration", is_encoder_decoder=True),
     "an encoder-decoder (T5ForConditionalGeneration)"),
    (config(architectures=None, model_type="bart", is_encoder_decoder=True),
     "an encoder-decoder (bart)"),
    (config(quantization_config={"quant_method": "gptq", "bits": 4}),
     "a quantised checkpoint (gptq, config.json): serve it with vLLM"),
    (config(quantization={"bits": 4}), "a quantised checkpoint (config.json)"),
    (config(text_config={"quantization_config": {"quant_method": "fp8"}}), "(fp8, config.json)"),
    ({**config(), "quantize_config.json": {"bits": 4}}, "checkpoint (quantize_config.json)"),
    ({"refs/main": "x", "snapshots/abc/config.json": "{}", "blobs/1": ""},
     "a cache folder of the hub: pass snapshots/abc in it"),
    ({"config.json": LLAMA, "model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"},
     "a clone without its large files (model.safetensors): run `git lfs pull`"),
    ({"config.json": LLAMA, "model-Q4.gguf": b"GGUF"}, "a GGUF file (model-Q4.gguf): convert it"),
    ({"model.gguf": b"GGUF"}, "a GGUF file (model.gguf)"),
    ({"config.json": LLAMA, "pytorch_model.bin": b"PK", "training_args.bin": b"PK"},
     "pickled weights (pytorch_model.bin), which can run code when loaded: convert"),
    ({"config.json": LLAMA, "model.pt": b"PK"}, "pickled weights (model.pt)"),
    ({"consolidated.00.pth": b"PK", "params.json": "{}"}, "weights in Meta's own format"),
    ({"consolidated.safetensors": b"", "params.json": "{}"}, "weights in Mistral's own format"),
    ({"config.json": LLAMA, "tf_model.h5": b""}, "weights for TensorFlow (tf_model.h5)"),
    ({"config.json": LLAMA, "flax_model.msgpack": b""}, "weights for Flax"),
    ({"config.json": LLAMA, "model.onnx": b""}, "weights for ONNX"),
    ({"global_step100/zero_pp_rank_0.pt": b""}, "parts of a distributed training run (global_st"),
    ({"checkpoint-9/config.json": "{}", "checkpoint-10/config.json": "{}"},
     "a folder of checkpoints: pass one of them, such as checkpoint-10"),
    ({"y.pt": b"PK", "notes.txt": ""},
     "a folder without config.json, so it is no checkpoint (it has y.pt): check the path"),
    ({"net.onnx": b""}, "a folder without config.json, so it is no checkpoint (it has net.onnx)"),
    ({"llama/config.json": "{}", "y.pt": b"PK"}, "a folder of models: pass one of them"),
    ({"llama/config.json": "{}"}, "a folder of models: pass one of them, such as llama in it"),
    ({"preprocessor_config.json": "{}"}, "a processor without a model (preprocessor_config.json)"),
    ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, "a tokenizer without a model"),
    ({}, "an empty folder"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "said"), CERTAIN, ids=lambda value: str(value)[:50])
def test_what_is_no_decoder_only_model(tmp_path, files, said):
    fill(tmp_path, files)
    assert said in explain_folder(tmp_path)
    assert said in explain_folder(tmp_path, refused=True)


IF_REFUSED = [
    ({"config.json": {**VISION, "vision_config": {"x": 1}}, "model.safetensors": ""},
     "a model of vision (LlavaForConditionalGeneration)"),
    ({"config.json": {"model_type": "x", "audio_config": {}, "vision_config": {}},
      "model.safetensors": ""}, "a model of audio and vision (x)"),
    ({**config(), "processor_config.json": "{}"}, "a model of more than text"),
    (saved("BertForMaskedLM"), "an encoder (BertForMaskedLM)"),
    (saved("MistralModel"), "a model without a language-model head (MistralModel)"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "said"), IF_REFUSED, ids=lambda value: str(value)[:50])
def test_what_transformers_may_serve_is_named_when_it_does_not(tmp_path, files, said):
    fill(tmp_path, files)
    assert explain_folder(tmp_path) is None
    assert said in explain_folder(tmp_path, refused=True)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nothing_is_said_against_a_model(tmp_path, name):
    shutil.copytree(tiny.saved(name), tmp_path, dirs_exist_ok=True)
    fill(tmp_path, {"optimizer.bin": b"", "README.md": "", "onnx/model.onnx": b"",
                    "original/consolidated.00.pth": b""})  # fmt: skip
    assert explain_folder(tmp_path) is None
    assert explain_folder(tmp_path, refused=True) is None


BROKEN = ["", "{", "[]", "5", "null", b"\xff\xfe", "[" * 10**5, '{"architectures": 5}',
          '{"architectures": [5]}', '{"architectures": {}}', '{"text_config": 5}']  # fmt: skip


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: str(content)[:20])
def test_a_config_that_cannot_be_read_says_nothing(tmp_path, content):
    fill(tmp_path, {"config.json": content, "model.safetensors": ""})
    assert explain_folder(tmp_path) is None
    assert explain_folder(tmp_path, refused=True) is None


def test_files_and_places_that_are_no_folder(tmp_path):
    fill(tmp_path, {"a.gguf": b"", "a.bin": b"", "a.safetensors": b""})
    assert "a GGUF file (a.gguf)" in explain_folder(tmp_path / "a.gguf")
    assert "pickled weights (a.bin)" in explain_folder(tmp_path / "a.bin")
    assert "pass the folder that holds it" in explain_folder(tmp_path / "a.safetensors")
    assert "an empty folder" in explain_folder(tmp_path / "nowhere")
    (tmp_path / "config.json").mkdir()
    assert explain_folder(tmp_path) is None


def test_it_needs_neither_torch_nor_transformers():
    program = (
        "import sys, djinn_lib.engine.models.folder_kinds\n"
        "print({'torch', 'transformers'} & {*sys.modules})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"
