"""LoRA layers: vLLM's arithmetic for CPUs, except for tokens without an adapter.

Here without the patches of :mod:`roll_vllm.patches.lora_base`, which plain vLLM does not get.
"""

from __future__ import annotations

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from roll_vllm.patches.lora_base import sparing_base


class ReferencePunicaWrapper(PunicaWrapperCPU):
    """Adds adapters to the outputs of layers, in place."""

    add_lora_linear = sparing_base("token_lora_indices")(PunicaWrapperCPU.add_lora_linear)
    add_lora_embedding = sparing_base("token_lora_indices")(PunicaWrapperCPU.add_lora_embedding)
    add_lora_logits = sparing_base("sampler_indices")(PunicaWrapperCPU.add_lora_logits)
