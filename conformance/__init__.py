"""The contracts that a vLLM rollout engine must keep for reinforcement learning.

Run them with ``pytest --pyargs conformance``. One module for each group of contracts; the ids are stable.
"""
