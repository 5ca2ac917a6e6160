"""``python -m notifyq.bench``: how fast this installation is, on this machine, beside the limit of plain psycopg.

Producers and workers are separate processes. Only jobs whose completion is committed count.

``--json FILE`` writes an object whose names stay: ``schema`` (1), ``notifyq``, ``python``, ``psycopg``, ``machine``,
``server_version``, ``server_settings``, ``settings`` (the options; ``settings.each`` has those that differ by workload), and
``workloads``, which has for each workload the medians of its runs, and the ``runs`` themselves, with their samples. What is
called ``limit`` is the same work by hand on a bare table in the same run.

| figure | meaning |
|---|---|
| ``enqueue.jobs_per_second`` | bulk sends, from the first call to the last commit |
| ``enqueue.limit_jobs_per_second``, ``fraction_of_limit`` | bare inserts from JSON, as many at once; our part of that |
| ``drain.jobs_per_second`` | from the commit that makes the jobs ready to the commit of the last completion |
| ``drain.processes``, ``drain.kept`` | worker processes; whether finished jobs were kept |
| ``drain.limit_jobs_per_second``, ``fraction_of_limit`` | bare deletes of 100 rows, inserted elsewhere if kept; our part |
| ``latency.p50_ms``, ``p95_ms``, ``p99_ms``, ``max_ms`` | from the call of send to the worker's first line, one at a time |
| ``latency.limit_p50_ms`` | the same by hand in plain psycopg: insert, trigger, notify, delete |
| ``latency.p50_over_limit`` | one over the other, of the same run |
| ``keys.singleton_N_jobs_per_second``, ``key_limit_5_N_…`` | jobs of N keys, others hold 100,000 back (or 20 ``--jobs``) |
| ``keys.freed_p50_ms``, ``plain_p50_ms`` | end of a job to the start of the next of its key; plain pickup |
| ``keys.freed_over_plain`` | one over the other |
| ``keys.limit_N_jobs_per_second`` | bare deletes of N rows at a time, 100 at most, each batch durable before the next |
| ``senders.always_sends_per_second``, ``over_always`` | the same with ``bell="always"``; by how much the default is faster |
| ``flows.sent_jobs_per_second``, ``run_jobs_per_second`` | 10,000 jobs between one before and one after them |
| ``flows.limit_sent_jobs_per_second``, ``limit_run_…`` | as many bare rows that wait for nothing: inserted, deleted |
| ``scaling.jobs_per_second``, ``processes`` | of ``notifyq run --processes``, jobs that compute for a millisecond |
| ``scaling.one_process_jobs_per_second``, ``over_one_process`` | of one process; one over the other |
| ``scaling.limit_jobs_per_second``, ``fraction_of_limit`` | as many processes that only compute as much; our part |
| ``scaling.limit_over_one_process`` | what so many of those bring over one |
| ``senders.sends_per_second`` | ``notifyq.send()`` of one job a transaction, by all senders, while workers are busy |
| ``senders.no_notify_sends_per_second``, ``fraction_of_no_notify`` | the same with ``bell="never"``; one over the other |
| ``senders.limit_sends_per_second``, ``fraction_of_limit`` | bare inserts, no trigger; our part of that |
| ``senders.senders``, ``client_cores`` | connections; processor time a second of all sending processes |
| ``sustained.jobs_per_second`` | durably completed by one process in a steady state: 2,500 wait or run at any time |
| ``sustained.p50_ms``, ``p99_ms`` | from the call of send to the worker's first line, in that state |
| ``sustained.limit_jobs_per_second``, ``fraction_of_limit`` | bare inserts and deletes in such a state; our part of that |
| ``pinned.jobs_per_second`` | the same of plain, failing, delayed and keyed jobs, a snapshot held open all the time |
| ``pinned.last_over_first`` | jobs/s in the last sixth, or minute if that is less, over those in the first |
| ``pinned.control_…`` | both of a run before it, without snapshot |
| ``pinned.limit_…`` | both of a bare table under such a snapshot |
| ``idle.statements_per_second``, ``counted`` | of a runtime whose queues stay empty; whether as statements or transactions |
| ``idle.connections``, ``cpu_fraction``, ``queues`` | its sessions; processor time of its process a second; queues |
| ``idle.limit_statements_per_second``, ``limit_connections`` | of a session in plain psycopg that listens |
| ``backlog.claim_ratio``, ``claim_100_ratio`` | time of a claim of 50, of 100, with ``jobs`` waiting over one with 10,000 |
| ``backlog.claim_ms``, ``jobs`` | the former with ``jobs`` waiting; how many that is |
| ``backlog.claim_ratio_kept``, ``claim_100_ratio_kept`` | the ratios with 10,000 waiting and as many finished ones kept |
| ``backlog.complete_ratio_kept`` | the same for the completion of 50 |
| ``backlog.blocked_claim_ratio``, ``blocked_complete_ratio`` | of 25 free keys, as many blocked behind keys that are held |
| ``backlog.limit_claim_ratio``, ``limit_claim_ms`` | deletes of 50 from bare tables of as many rows |
| ``backlog.runtime_mib`` | most memory of a runtime with its slots full and as many waiting |
| ``queues.queues``, ``claim_ratio``, ``claim_ms`` | claims of 50 of 50,000 jobs in so many queues, over those in one |
| ``queues.limit_claim_ratio``, ``limit_claim_ms`` | deletes from bare tables with as many queues in a column |
| ``queues.pickup_p50_ms``, ``one_pickup_p50_ms``, ``pickup_ratio`` | by a runtime of all by a pattern; of one; over it |

Samples in a run: ``latency`` and ``sustained`` have ``samples_ms`` (pickups), ``latency`` has ``limit_samples_ms``;
``sustained`` and ``pinned`` have ``throughput`` (jobs/s by time, and ``control_…``, ``limit_…``), and ``throughput_at``, the
seconds it is of.
"""
