"""The queues, the functions registered on them, and the runtime that runs them: notifyq run reminders.wiring:runtime."""

from typing import Any

import notifyq

from . import functions
from .functions import Echo, Reminder

missed = notifyq.Queue("reminders/missed", Reminder)
"""Dead letters: reminders whose retries are used up."""

reminders = notifyq.Queue("reminders", Reminder, Echo, retry_limit=2, retry_delay=1, dead_letter=missed)
logged = notifyq.Queue("reminders/logged", Reminder, Echo, retry_limit=0)
orders = notifyq.Queue("orders", dict[str, Any], str)
"""Sent by a trigger on a table of orders: see orders.sql."""

reminders.worker(functions.remind)
logged.worker(concurrency=5, middleware=[functions.log_job])(functions.remind)
orders.worker(functions.confirm_order)

runtime = notifyq.Runtime([reminders, logged, orders])
