"""Breaks everything around notifyq while it works, and counts every job: ``make chaos``, and docs/faults.md.

| module | what |
|---|---|
| ``__main__`` | the command |
| ``cell`` | one fault: start, load, break, drain, judge |
| ``faults``, ``sessions``, ``hosts``, ``apart``, ``mixed`` | what is broken, and how |
| ``servers``, ``workers``, ``proxy``, ``wire`` | what there is to break |
| ``producers``, ``queues``, ``app`` | the load: who sends, what is sent, and what the worker processes run |
| ``ledger`` | what was sent and what ran, outside the database |
| ``verdict`` | holds the ledger against the database |
| ``results`` | the file and the table |
"""
