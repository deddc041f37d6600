"""Engines on a Ray cluster: ``replica`` is one, ``deployment`` says how many there are, ``service`` asks them.

``session`` starts or finds a cluster for ``condense serve --engine ray``, and ``figures`` are for Prometheus. Ray Serve
does the rest: it places replicas, starts them again, counts them up and down with the load, and replaces them one by
one.
"""
