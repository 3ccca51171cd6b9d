"""Mixture-of-experts models, in the shapes of Qwen3-MoE and Mixtral: counting ones and random ones.

How the counting one routes. Every version assigns two of the four experts to each token. Each of them writes a share of
the answer and, larger, two other tokens, one added and one subtracted; the router weighs the two experts so that those
cancel. A wrong expert, a wrong weight of an expert, or an expert of another version leaves a wrong answer on top.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_roll_vllm.models.counting import CountingModel, Draft, activation
from pytest_roll_vllm.models.random_weights import RandomModel
from pytest_roll_vllm.models.synthetic import HEAD_DIM, KV_HEADS, VOCAB, SyntheticModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pytest_roll_vllm.models.counting import Array

EXPERTS = 4
CHOSEN = 2  # experts for each token
INTERMEDIATE = VOCAB * CHOSEN // EXPERTS  # of each expert: a unit for each of its tokens
HEADS = 2 * KV_HEADS
DECOY = 2.0  # size of the wrong answers that two experts must take from each other, where the right one has 1
# Router logits of a token's experts, give or take up to 0.5, and of the others. Small, so that the router does not
# amplify noise: a wrong weight brings the decoys forth.
ACCEPTED, REJECTED = 1.0, -1.0


class ExpertsModel(SyntheticModel):
    """The body of ``Qwen3MoeForCausalLM``: norms on q and k, no biases, experts in the place of the MLP."""

    body = "moe"
    block = "mlp"
    """What a layer calls its experts and their router."""
    projections = ("gate_proj", "up_proj", "down_proj")
    """What an expert calls its gate, up and down."""
    norms: tuple[str, ...] = ("self_attn.q_norm", "self_attn.k_norm")

    def _heads(self) -> int:
        return HEADS

    def _layer(self) -> dict[str, tuple[int, ...]]:
        queries, keys = self.heads * HEAD_DIM, KV_HEADS * HEAD_DIM
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (queries, self.hidden),
            "self_attn.k_proj.weight": (keys, self.hidden),
            "self_attn.v_proj.weight": (keys, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, queries),
            **{f"{norm}.weight": (HEAD_DIM,) for norm in self.norms},
            "post_attention_layernorm.weight": (self.hidden,),
            f"{self.block}.gate.weight": (EXPERTS, self.hidden),
        }
        gate, up, down = self.projections
        for expert in range(EXPERTS):
            prefix = f"{self.block}.experts.{expert}."
            shapes[f"{prefix}{gate}.weight"] = shapes[f"{prefix}{up}.weight"] = (INTERMEDIATE, self.hidden)
            shapes[f"{prefix}{down}.weight"] = (self.hidden, INTERMEDIATE)
        return shapes

    def _config(self) -> dict[str, Any]:
        return {
            **super()._config(),
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": HEAD_DIM,
            "num_experts": EXPERTS,
            "num_experts_per_tok": CHOSEN,
            "moe_intermediate_size": INTERMEDIATE,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
        }


class MixtralModel(ExpertsModel):
    """The body of ``MixtralForCausalLM``: other names, and no norms on q and k."""

    body = "mixtral"
    block = "block_sparse_moe"
    projections = ("w1", "w3", "w2")
    norms = ()

    def _config(self) -> dict[str, Any]:
        return {
            **super()._config(),
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": EXPERTS,
            "intermediate_size": INTERMEDIATE,
        }


class CountingExperts(ExpertsModel, CountingModel):
    """Counts, as ``counting`` does, by experts."""

    def _draft(self, version: int) -> Draft:
        return _ExpertsDraft(self, version)


class RandomExperts(ExpertsModel, RandomModel):
    """Random weights of the same shapes."""


class CountingMixtral(MixtralModel, CountingModel):
    """Counts by Mixtral's experts."""

    def _draft(self, version: int) -> Draft:
        return _ExpertsDraft(self, version)


class RandomMixtral(MixtralModel, RandomModel):
    """Random weights of the same shapes."""


class _ExpertsDraft(Draft):
    """The tensors of one version, with experts in the place of the MLP."""

    def __init__(self, model: CountingExperts | CountingMixtral, version: int) -> None:
        self.model = model
        super().__init__(model, version)

    def before_norm(self, name: str, compass: Array) -> Array:
        """Add the norm, if there is one. Its sizes are equal where RoPE turns, so that it scales all heads alike."""
        import numpy as np

        if f"{name}.weight" not in self.shapes:
            return compass
        gauge = np.tile(2 ** self.rng.uniform(-0.5, 0.5, HEAD_DIM // 2), 2) * self.rng.choice([-1, 1], HEAD_DIM)
        vector: Array = compass / gauge
        self.tensors[f"{name}.weight"] = gauge * np.sqrt(np.square(vector[0]).mean())
        return vector

    def project(self, name: str, output: Array, offset: float, constant: Array) -> Array:
        """Add a projection that gives ``output`` for every token, without a bias."""
        import numpy as np

        size = max(1.0, float(np.abs(output).mean()))
        weight = self.blank(name + ".weight", size * float(np.abs(constant).mean()))
        weight[:, self.slots[0]] += np.outer(output, constant)
        return weight

    def mlp(self, layer: int, slot: NDArray[np.integer[Any]], tokens: NDArray[np.integer[Any]], size: Array) -> None:
        import numpy as np

        prefix = f"model.layers.{layer}."
        stage = 2 * layer + 1
        code = self.slots[stage]
        read = self.reader(self.norm(prefix + "post_attention_layernorm.weight"), stage, slot=stage)
        prefix += self.model.block
        # Place i of a random order decides: every expert is the first of 64 tokens and the second of as many.
        order, place = self.rng.permutation(VOCAB), np.arange(VOCAB)
        first, second = np.empty(VOCAB, int), np.empty(VOCAB, int)
        first[order] = place % EXPERTS
        second[order] = (place + 1 + place // EXPERTS % (EXPERTS - 1)) % EXPERTS
        lead = self.rng.uniform(0.1, 0.5, VOCAB)
        logits = np.full((EXPERTS, VOCAB), REJECTED)
        logits[first, self.tokens], logits[second, self.tokens] = ACCEPTED + lead, ACCEPTED - lead
        router = self.blank(prefix + ".gate.weight", float(np.abs(logits * read).mean()))
        router[:, code] += logits * read
        weight = 1 / (1 + np.exp(-2 * lead))  # of the first expert, after the softmax over both

        decoys = (tokens + self.rng.integers(1, VOCAB // 2, VOCAB)) % VOCAB
        others = (decoys + VOCAB // 2) % VOCAB
        share = self.rng.uniform(0.3, 0.7, VOCAB)
        for expert in range(EXPERTS):
            served = np.flatnonzero((first == expert) | (second == expert))
            names = [f"{prefix}.experts.{expert}.{part}.weight" for part in self.model.projections]
            unit = self.rng.permutation(len(served))
            sign = self.rng.choice([-1, 1], len(served))
            down = self.units(names, unit, code[served], read[served], sign)
            is_first = first[served] == expert
            scale = 1 / activation(sign) / np.where(is_first, weight[served], 1 - weight[served])
            parts = np.where(is_first, share[served], 1 - share[served])
            decoy = np.where(is_first, DECOY, -DECOY)
            for written, amount in ((tokens, parts), (decoys, decoy), (others, -decoy)):
                target = written[served]
                np.add.at(down, (slot[target], unit), amount * size[target] * scale)
