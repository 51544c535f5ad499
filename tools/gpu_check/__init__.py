"""``make gpu-check``: everything that only a card can show, in one go of a few minutes, offline.

``python -m tools.gpu_check --minutes 9`` with the torch that is there; beside torch it needs pytest, hypothesis and
ninja, uses pytest-xdist, transformers, compute-sanitizer and ncu where they are, and lists what is missing.
``--rehearse`` runs the same steps where no card is. Results: ``benchmarks/results/<card>/``.
"""
