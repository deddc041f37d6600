"""Load for a running server, and what it did under it: ``condense bench serve``.

``mix`` says what is asked, ``connection`` carries it, ``driver`` decides when and notes what became of each request;
``record`` counts, ``table`` and ``plot`` show. Nothing here imports torch: the driver shares a machine with the server.
"""
