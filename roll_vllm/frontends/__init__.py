"""The rollout engine in front of each generation of vLLM's engine."""
