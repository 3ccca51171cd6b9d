"""How weights travel from a trainer to an engine.

``manifest`` says what is sent, ``shared_memory`` and ``bucket`` carry it between processes of one host,
``collective`` carries it through a torch process group, and ``session`` drives one complete update.
"""
