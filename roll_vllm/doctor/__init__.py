"""``roll-vllm doctor``: what is installed here, what is wrong with it, and what to do next.

:func:`~roll_vllm.doctor.diagnosis.diagnose` looks at a :class:`~roll_vllm.doctor.machine.Machine` and gives a
:class:`~roll_vllm.doctor.diagnosis.Diagnosis`. Nothing here imports torch or vllm: what is asked about may be broken.
"""
