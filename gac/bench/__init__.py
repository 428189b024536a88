"""Benchmarks of the kernels and of whole training steps: what ``gac bench`` runs on a user's own machine.

``kernels`` times every operation beside its peers, ``step`` a transformers model with and without :func:`gac.patch`,
``host`` the cost of a hook and of the import; ``report`` turns results into tables, files and a picture.
"""
