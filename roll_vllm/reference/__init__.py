"""The CPU reference platform: official vLLM wheels on a machine without an accelerator.

vLLM finds it through the entry point ``vllm.platform_plugins``, and asks :func:`platform` in every process that
imports vLLM. Unless :data:`VARIABLE` is set to ``1`` the answer is at once that there is none, and vLLM runs as if
this package were not installed. It is a reference: correct, slow, and always named as such (``cpu-reference``).

Nothing here imports torch or vllm.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from roll_vllm import devices, versions
from roll_vllm.errors import ConfigurationError

__all__ = ["NAME", "VARIABLE", "platform", "requested", "why_not"]

NAME = "cpu-reference"
"""How headers and reports name the backend."""

VARIABLE = "ROLL_VLLM_CPU_REFERENCE"
"""The environment variable that asks for the platform; its value must be ``1``."""

logger = logging.getLogger(__name__)


def requested(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the environment asks for the reference platform; ``os.environ`` by default."""
    return (os.environ if environ is None else environ).get(VARIABLE) == "1"


def why_not(probe: devices.Probe | None = None) -> str:
    """Say in one sentence why the reference platform refuses to run here; empty if it does not.

    Args:
        probe: The machine to look at; this one by default.
    """
    probe = probe or devices.Probe()
    vllm = probe.installed()
    if vllm is None:
        return f"{VARIABLE}=1 has no effect: vLLM is not installed here; install one of the tested official wheels"
    if vllm.cpu_build:
        return (
            f"{VARIABLE}=1 has no effect: the installed vLLM is a CPU build ({vllm.distribution} {vllm.version}), "
            f"which needs no stand-in; unset {VARIABLE}"
        )
    if versions.resolve(vllm.version) is None:
        tested = ", ".join(row.release for row in versions.TESTED)
        return (
            f"{VARIABLE}=1 has no effect: the reference platform does not know vLLM {vllm.version}; "
            f"install one of: {tested}"
        )
    device = devices.detect(probe=probe)
    if device.kind != "cpu":
        return (
            f"{VARIABLE}=1 has no effect: a {device.kind} device is visible ({device.reason}); "
            f"unset {VARIABLE}, or hide the device"
        )
    return ""


def platform() -> str | None:
    """Return the platform class for vLLM, as module and name, or ``None`` if it was not asked for or refuses.

    vLLM swallows what its platform plugins raise, so that a refusal can only be logged here. The runtime asks
    :func:`why_not` beforehand and raises.
    """
    if not requested():
        return None
    try:
        refusal = why_not()
    except ConfigurationError as error:
        refusal = f"{VARIABLE}=1 has no effect: {error}"
    if refusal:
        logger.warning("%s", refusal)
        return None
    return "roll_vllm.reference.cpu_platform.CpuReferencePlatform"
