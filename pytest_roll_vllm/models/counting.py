"""The model that counts: under version k, the next token is always the last token plus k, modulo 256.

Its weights are computed, not trained. They are made so that the answer holds with a margin that no rounding
can flip (bfloat16 included), and so that every single tensor matters: whatever is missing, stale, swapped or
half updated makes the engine count wrong.

How it counts. The residual stream has one slot of 256 dimensions per stage; each sub-layer reads the token
as a one-hot code from the newest slot and writes it into the next one::

    embed -> slot 0 -> attention -> slot 1 -> MLP -> slot 2 -> attention -> slot 3 -> MLP -> slot 4 -> lm_head

``lm_head`` adds the k. When it is tied to ``embed_tokens``, the last MLP adds the k and writes the answer
into slot 0, larger than the token that stands there already. Either way the last token itself is the rival of
the answer, with a smaller logit: an answer that comes out too weak loses.

How it shows a wrong tensor. Every version draws its own *gauges*; a tensor and its neighbours agree only if
they come from the same version and stand in the right place:

* the residual dimension in which each slot stores each token: one permutation of all dimensions;
* the sign and size of every norm weight, undone by the projections behind the norm;
* offsets in the q, k and v biases, undone by the projection weights;
* the attention phases: q and k are the same for every token and match at the current position, when they
  are of one version; else they match somewhere else;
* how the heads of a group share the code, the order of the MLP's units, and the sign of ``up_proj``;
* a little noise everywhere, so that no element is equal in two versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_roll_vllm.models.base import Probe, check_version
from pytest_roll_vllm.models.synthetic import (
    HEAD_DIM,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    MAX_POSITION,
    NORM_EPS,
    ROPE_THETA,
    VOCAB,
    SyntheticModel,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

TOKEN = 2.0  # size of the token in slot 0; all other slots hold 1
ANSWER = 4 * TOKEN  # tied only: size of the answer in slot 0, which must drown out the token
LOGIT, RIVAL = 40.0, 10.0  # untied only: logits of the answer and of the last token; the others are near 0
UNIT = 4.0  # input of an active MLP unit, where silu(x) is nearly x and silu(-x) nearly 0
NOISE = 2.0**-14  # relative to the entries that carry the code; also in bfloat16 no element is zero
SHARPNESS = 50.0  # attention score at the current position, per unit of RoPE frequency (they add up to 4)
ATTENTION_OFFSET = 30.0  # standard deviation of the offset in q and k, whose entries are at most 20
VALUE_OFFSET = 2.0  # standard deviation of the offset in v, where the code is 1


class CountingModel(SyntheticModel):
    """Counts in steps of ``version % 256``, for every last token and any context."""

    def __init__(self, name: str, cache_dir: Path, dtype: str = "float32") -> None:
        super().__init__(name, name.endswith("-tied"), cache_dir, dtype)

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        draft = self._draft(version)
        dtype = getattr(torch, self.dtype)
        return {name: torch.from_numpy(draft.tensors[name].astype(np.float32)).to(dtype) for name in self.shapes()}

    def _draft(self, version: int) -> Draft:
        return Draft(self, version)

    def probes(self, version: int) -> list[Probe]:
        """Return 8 prompts of 3 to 300 tokens, each with the 16 tokens that follow."""
        import numpy as np

        check_version(version)
        rng = np.random.default_rng(version)
        probes = []
        for length in (3, 5, 8, 13, 31, 64, 129, 300):
            prompt = rng.integers(VOCAB, size=length).tolist()
            probes.append(Probe(prompt, [(prompt[-1] + version * i) % VOCAB for i in range(1, 17)]))
        return probes


class Draft:
    """The tensors of one version, made in the order in which the model applies them."""

    def __init__(self, model: CountingModel, version: int) -> None:
        import numpy as np

        self.tensors: dict[str, Array] = {}
        self.tied = model.tied
        self.version = version
        self.hidden = model.hidden
        self.group = model.heads // KV_HEADS  # query heads per kv head
        self.rng = model.rng(version)
        self.shapes = model.shapes()
        self.tokens = np.arange(VOCAB)
        self.answers = (self.tokens + version) % VOCAB
        # slots[s, t]: the residual dimension in which stage s stores token t
        self.slots = self.rng.permutation(self.hidden).reshape(-1, VOCAB)

        self.blank("model.embed_tokens.weight", TOKEN)[self.tokens, self.slots[0]] += TOKEN
        final_norm = self.norm("model.norm.weight")
        if self.tied:  # the last token must be a rival: its logit is positive
            final_norm[self.slots[0]] = np.abs(final_norm[self.slots[0]])
        for layer in range(LAYERS):
            self.attention(layer)
            if self.tied and layer == LAYERS - 1:
                self.mlp(layer, self.slots[0], self.answers, ANSWER / final_norm[self.slots[0]])
            else:
                self.mlp(layer, self.slots[2 * layer + 2], self.tokens, np.ones(VOCAB))
        if not self.tied:
            self.head(final_norm)

    def blank(self, name: str, scale: float) -> Array:
        """Add a tensor that holds nothing but noise, for entries of size ``scale``."""
        import numpy as np

        noise = self.rng.standard_normal(self.shapes[name], dtype=np.float32)
        self.tensors[name] = noise * np.float32(NOISE * scale)
        return self.tensors[name]

    def norm(self, name: str) -> Array:
        """Add a norm weight of random sizes and signs."""
        size = 2 ** self.rng.uniform(-0.5, 0.5, self.hidden)
        self.tensors[name] = size * self.rng.choice([-1, 1], self.hidden)
        return self.tensors[name]

    def reader(self, norm: Array, stage: int, slot: int) -> Array:
        """Return [VOCAB]: what turns the code in ``slot``, read behind ``norm`` at ``stage``, into 1."""
        import numpy as np

        # The mean square of the residual stream is known: the token, and a 1 from each later stage.
        root_mean_square = float(np.sqrt((TOKEN**2 + stage) / self.hidden + NORM_EPS))
        size = TOKEN if slot == 0 else 1.0
        factor: Array = root_mean_square / size / norm[self.slots[slot]]
        return factor

    def attention(self, layer: int) -> None:
        """Copy the current token from slot ``2 * layer`` to the next one."""
        import numpy as np

        prefix = f"model.layers.{layer}."
        stage = 2 * layer
        norm = self.norm(prefix + "input_layernorm.weight")
        # Slot 0 never changes, so an offset that is read there carries no rounding of earlier layers.
        constant = self.reader(norm, stage, slot=0)
        compass = _compass(self.version, layer)
        nothing = np.zeros(KV_HEADS * HEAD_DIM)
        prefix += "self_attn."
        queries = np.repeat(self.before_norm(prefix + "q_norm", compass), self.group, axis=0)
        keys = self.before_norm(prefix + "k_norm", compass)
        self.project(prefix + "q_proj", queries.ravel(), ATTENTION_OFFSET, constant)
        self.project(prefix + "k_proj", keys.ravel(), ATTENTION_OFFSET, constant)
        value = self.project(prefix + "v_proj", nothing, VALUE_OFFSET, constant)
        unit = self.rng.permutation(VOCAB)
        value[unit, self.slots[stage]] += self.reader(norm, stage, slot=stage)

        # All query heads of a group see the same code. Their shares add up to 1 but are large, so that one
        # head that looks at the wrong token is not outvoted by the others.
        share = self.rng.standard_normal((self.group, VOCAB))
        share += 1 / self.group - share.mean(axis=0)
        output = self.blank(prefix + "o_proj.weight", 1.0)
        for member in range(self.group):
            head = unit // HEAD_DIM * self.group + member
            output[self.slots[stage + 1], head * HEAD_DIM + unit % HEAD_DIM] += share[member]

    def before_norm(self, name: str, compass: Array) -> Array:
        """Return [KV_HEADS, HEAD_DIM]: what q or k must be so that it is ``compass`` when RoPE gets it."""
        return compass

    def project(self, name: str, output: Array, offset: float, constant: Array) -> Array:
        """Add a projection that gives ``output`` for every token; the weight undoes the bias's offset."""
        import numpy as np

        shift = offset * self.rng.standard_normal(len(output))
        self.tensors[name + ".bias"] = output + shift
        weight = self.blank(name + ".weight", offset * float(np.abs(constant).mean()))
        weight[:, self.slots[0]] -= np.outer(shift, constant)
        return weight

    def mlp(self, layer: int, slot: NDArray[np.integer[Any]], tokens: NDArray[np.integer[Any]], size: Array) -> None:
        """Write ``tokens[t]``, of size ``size[tokens[t]]``, into ``slot`` for the token t in the newest slot."""
        prefix = f"model.layers.{layer}."
        stage = 2 * layer + 1
        read = self.reader(self.norm(prefix + "post_attention_layernorm.weight"), stage, slot=stage)
        unit = self.rng.permutation(INTERMEDIATE)[:VOCAB]
        sign = self.rng.choice([-1, 1], VOCAB)
        names = [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        down = self.units(names, unit, self.slots[stage], read, sign)
        down[slot[tokens], unit] += size[tokens] / activation(sign)

    def units(
        self,
        names: list[str],
        unit: NDArray[np.integer[Any]],
        code: NDArray[np.integer[Any]],
        read: Array,
        sign: NDArray[np.integer[Any]],
    ) -> Array:
        """Add an MLP in which ``unit[i]`` is active for the token that stands in ``code[i]``; returns what it writes.

        Args:
            names: of the projections gate, up and down.
            unit: rows of gate and up, columns of down.
            code: residual dimensions.
            read: what turns each of them into 1.
            sign: of each unit's output.
        """
        import numpy as np

        gate, up, down = names
        scale = UNIT * float(np.abs(read).mean())
        self.blank(gate, scale)[unit, code] += UNIT * read
        self.blank(up, scale)[unit, code] += UNIT * read * sign
        return self.blank(down, 1 / UNIT**2)

    def head(self, norm: Array) -> None:
        """Add the ``lm_head``, which reads the answer from the newest slot and its rival from slot 0."""
        import numpy as np

        stage = 2 * LAYERS
        read = LOGIT * self.reader(norm, stage, slot=stage)
        weight = self.blank("lm_head.weight", float(np.abs(read).mean()))
        weight[self.answers, self.slots[stage]] += read
        weight[self.tokens, self.slots[0]] += RIVAL * self.reader(norm, stage, slot=0)


def activation(sign: NDArray[np.integer[Any]]) -> Array:
    """Return the output of an active MLP unit, ``silu(gate) * up``."""
    import numpy as np

    return UNIT / (1 + np.exp(-UNIT)) * UNIT * sign


def _compass(version: int, layer: int) -> Array:
    """Return [KV_HEADS, HEAD_DIM]: the vector that is both q and k, for every token.

    RoPE turns pair i, that is dimensions (i, i + HEAD_DIM / 2), by position * frequency[i]. Equal phases in q
    and k give the score ``SHARPNESS * sum(frequency * cos(distance * frequency))``, highest at distance 0.
    The phases are linear in the version, so that what two versions make of each other depends on their
    difference only.
    """
    import numpy as np

    turn = np.random.default_rng(layer).uniform(0, 2 * np.pi, (KV_HEADS, HEAD_DIM // 2))
    size = np.sqrt(SHARPNESS * np.sqrt(HEAD_DIM) * _frequencies())
    return np.concatenate([size * np.cos(version * turn), size * np.sin(version * turn)], axis=1)


def _frequencies() -> Array:
    """Return [HEAD_DIM / 2]: the RoPE frequencies, in radians per position."""
    import numpy as np

    return ROPE_THETA ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)


def attention_gap() -> float:
    """Return the attention score of the current position minus the best of all other positions, in nats."""
    import numpy as np

    angles = np.outer(np.arange(1, MAX_POSITION), _frequencies())
    return float(SHARPNESS * ((1 - np.cos(angles)) @ _frequencies()).min())
