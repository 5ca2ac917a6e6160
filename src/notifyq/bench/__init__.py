"""``python -m notifyq.bench``: how fast this installation is, on this machine, beside the limit of plain psycopg.

Producers and workers are separate processes. Only jobs whose completion is committed count.
"""
