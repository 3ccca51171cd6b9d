"""The body that the synthetic kinds share: architecture, configuration files and tokenizer.

A small ``Qwen2ForCausalLM``: grouped-query attention, biases on q, k and v, RoPE, RMSNorm, gated MLP. Kinds
of one body that agree on ``tied`` share one directory, so that one engine can serve the weights of both.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_roll_vllm.models.base import Model, check_version
from pytest_roll_vllm.models.cache import publish

if TYPE_CHECKING:
    import numpy as np

VOCAB = 256
LAYERS = 2
HEAD_DIM = 64
KV_HEADS = 4
INTERMEDIATE = 256
MAX_POSITION = 2048
ROPE_THETA = 10000.0
NORM_EPS = 1e-6


class SyntheticModel(Model):
    """Configuration and tokenizer; the subclass makes the weights.

    The directory holds no weights. There are no special tokens (``bos``, ``eos`` and ``pad`` are null):
    token ``i`` is the word ``str(i)``, so ``"5 6 7"`` is the prompt ``[5, 6, 7]``, generation never stops
    by itself, and a word that is not a number below 256 is an error of the tokenizer.
    """

    vocab_size = VOCAB
    body = "synthetic"
    """The architecture's part of the directory's name."""

    def __init__(self, name: str, tied: bool, cache_dir: Path, dtype: str) -> None:
        self.name = name
        self.tied = tied
        self.dtype = dtype
        self.hidden = (4 if tied else 5) * VOCAB
        self.heads = self._heads()
        files = self._files()
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()

        def fill(directory: Path) -> None:
            for file, text in files.items():
                (directory / file).write_text(text)

        self.path = publish(cache_dir, f"{self.body}-tied" if tied else self.body, digest, fill)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the checkpoint, by HF name."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, self.hidden)}
        for index in range(LAYERS):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in self._layer().items()}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (VOCAB, self.hidden)
        return shapes

    def rng(self, version: int) -> np.random.Generator:
        """Return the random source of one version of this kind.

        Raises:
            ValueError: ``version`` is negative.
        """
        import numpy as np

        check_version(version)
        return np.random.default_rng([*self.name.encode(), version])

    def _heads(self) -> int:
        """Return the number of query heads."""
        return self.hidden // HEAD_DIM

    def _layer(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one layer's tensors, by their names in it."""
        kv = KV_HEADS * HEAD_DIM
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.q_proj.bias": (self.hidden,),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, self.hidden),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (INTERMEDIATE, self.hidden),
            "mlp.up_proj.weight": (INTERMEDIATE, self.hidden),
            "mlp.down_proj.weight": (self.hidden, INTERMEDIATE),
        }

    def _config(self) -> dict[str, Any]:
        """Return the content of ``config.json``."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads,
            "num_key_value_heads": KV_HEADS,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_POSITION,
            "rms_norm_eps": NORM_EPS,
            "rope_theta": ROPE_THETA,
            "sliding_window": None,
            "use_sliding_window": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": self.dtype,
            "vocab_size": VOCAB,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def _files(self) -> dict[str, str]:
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_POSITION,
            "clean_up_tokenization_spaces": False,
        }
        return {
            "config.json": json.dumps(self._config(), indent=2),
            "generation_config.json": json.dumps({"do_sample": False}),
            "tokenizer_config.json": json.dumps(tokenizer_config, indent=2),
            "tokenizer.json": _tokenizer(),
        }


def _tokenizer() -> str:
    """Return ``tokenizer.json``: the words are the numbers 0 to 255, separated by whitespace."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(VOCAB)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return str(tokenizer.to_str())
