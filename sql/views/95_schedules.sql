-- What people read of schedules and subscriptions.

create or replace view notifyq.schedules as
select
    q.name as queue,
    s.name,
    s.cron,
    s.every,
    s.timezone,
    s.missed,
    s.data,
    s.headers,
    s.declared,
    s.next_at,
    s.fired_for,
    s.job,
    s.error,
    s.changed_at
from notifyq.schedule s
join notifyq.queue q on q.number = s.queue;
comment on view notifyq.schedules is 'fired_for, job: of the last firing. next_at is null until a runtime has worked it out. error: why it cannot fire, or why the last firing made no job.';

create or replace view notifyq.subscriptions as
select
    p.event,
    q.name as queue,
    p.subscribed_at
from notifyq.subscription p
join notifyq.queue q on q.number = p.queue;
