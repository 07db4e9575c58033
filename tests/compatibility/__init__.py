"""The compatibility table: every method on every test network in 2D and 3D, each cell the figure of a numeric check.

    sight.py      one network, one volume, one score, and what is true of them: computed by MONAI's inferer and autograd
    graph.py      guided backpropagation by hooks on autograd's own graph, a second mechanism beside our rule engine
    checks.py     one small function a check, and the table row -> method, check
    peers.py      what other libraries give for the same rows
    store.py      the measured cells on disk; a cell is measured again only when its row or its check changes
    table.py      docs/compatibility.md
    test_covering.py   the part that runs in ``make test``

``python -m tests.compatibility`` measures what is missing and writes the table.
"""
