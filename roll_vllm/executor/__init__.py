"""The Ray executor: one worker for each bundle that the caller listed, in the caller's order.

- :mod:`.placement`: what the caller may pass, made into one plain form. Imports no Ray.
- :mod:`.variables`: the environment of one rank. Imports no Ray either.
- :mod:`.cluster`: what is asked of the cluster: to be connected, its groups, its resources.
- :mod:`.actor`: a worker's process, from its first line on.
- :mod:`.ray_executor`: the executor itself, on top of the one that vLLM has.
"""
