"""``python -m notifyq.bench``: how fast this installation is, on this machine, beside the limit of plain psycopg.

Producers and workers are separate processes. Only jobs whose completion is committed count.

``--json FILE`` writes an object whose names stay: ``schema`` (1), ``notifyq``, ``python``, ``psycopg``, ``machine``,
``server_version``, ``server_settings``, ``settings`` (the options), and ``workloads``, which has for each workload the
medians of its runs, and the ``runs`` themselves:

| figure | meaning |
|---|---|
| ``enqueue.jobs_per_second`` | bulk sends, from the first call to the last commit |
| ``drain.jobs_per_second`` | from the commit that makes the jobs ready to the commit of the last completion |
| ``drain.processes``, ``drain.kept`` | worker processes; whether finished jobs were kept |
| ``latency.p50_ms``, ``p95_ms``, ``p99_ms``, ``max_ms`` | from the call of send to the worker's first line, one at a time |
| ``latency.limit_p50_ms`` | the same by hand in plain psycopg: insert, trigger, notify, delete |
| ``latency.p50_over_limit`` | one over the other, of the same run |
"""
