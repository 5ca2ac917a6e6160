-- What people and BI tools read. A job is found by id through indexes alone.

create or replace view notifyq.jobs as
select
    j.id,
    q.name as queue,
    case
        when a.job is not null then 'active'
        when s.job is not null then 'scheduled'
        when b.job is not null then 'blocked'
        when coalesce(r.job, m.job) is not null then 'ready'
    end as state,
    a.job is null and coalesce(s.attempt, b.attempt, r.attempt, m.attempt) > 0 as retrying,
    coalesce(a.attempt, s.attempt, b.attempt, r.attempt, m.attempt) as attempt,
    j.retry_limit,
    j.priority,
    j.data,
    null::jsonb as output,
    last.error,
    a.progress,
    j.sent_at,
    coalesce(s.due_at, b.due_at) as due_at,
    a.claimed_at,
    a.deadline,
    a.cancel_requested_at,
    null::timestamptz as finished_at,
    j.expires_at,
    a.runtime,
    j.timeout,
    j.key,
    j.flow,
    j.id_key,
    j.headers,
    j.provenance
from notifyq.job j
join notifyq.queue q on q.number = j.queue
left join notifyq.active a on a.job = j.id
left join notifyq.scheduled s on s.job = j.id
left join notifyq.blocked b on b.job = j.id
left join notifyq.ready r on r.queue = j.queue and r.priority = j.priority and r.number = j.id and r.job = j.id
left join notifyq.ready m on m.job = j.id and m.number <> m.job
left join lateral (
    select jsonb_build_object('type', e.type, 'message', e.message, 'traceback', e.traceback, 'attempt', e.attempt, 'failed_at', e.failed_at) as error
    from notifyq.attempt e
    where e.job = j.id
    order by e.attempt desc, e.failed_at desc
    limit 1
) last on true
union all
select
    j.id,
    q.name,
    j.state,
    false,
    j.attempt,
    j.retry_limit,
    j.priority,
    j.data,
    j.output,
    last.error,
    null,
    j.sent_at,
    null,
    j.claimed_at,
    null,
    null,
    j.finished_at,
    j.expires_at,
    j.runtime,
    j.timeout,
    j.key,
    j.flow,
    j.id_key,
    j.headers,
    j.provenance
from notifyq.archive j
join notifyq.queue q on q.number = j.queue
left join lateral (
    select jsonb_build_object('type', e.type, 'message', e.message, 'traceback', e.traceback, 'attempt', e.attempt, 'failed_at', e.failed_at) as error
    from notifyq.attempt e
    where e.job = j.id
    order by e.attempt desc, e.failed_at desc
    limit 1
) last on true;
comment on view notifyq.jobs is 'Every job, live or kept: retrying says that it waits for its next attempt.';

create or replace view notifyq.queue_stats as
select
    q.name as queue,
    coalesce(r.jobs, 0) as ready,
    coalesce(s.jobs, 0) as scheduled,
    coalesce(b.jobs, 0) as blocked,
    coalesce(r.retrying, 0) + coalesce(b.retrying, 0) + coalesce(s.retrying, 0) as retrying,
    coalesce(a.jobs, 0) as active,
    coalesce(f.completed, 0) as completed,
    coalesce(f.failed, 0) as failed,
    coalesce(f.cancelled, 0) as cancelled,
    (
        select clock_timestamp() - min(j.sent_at)
        from (
            select t.job from notifyq.ready t where t.queue = q.number order by t.priority desc, t.number limit 1
        ) t
        join notifyq.job j on j.id = t.job
    ) as head_age,
    (select s.due_at from notifyq.scheduled s where s.queue = q.number order by s.due_at limit 1) as next_due,
    coalesce(s.due, 0) as due,
    f.last_finished_at,
    q.paused
from notifyq.queue q
left join (select t.queue, count(*) as jobs, count(*) filter (where t.attempt > 0) as retrying from notifyq.ready t group by t.queue) r on r.queue = q.number
left join (
    select
        t.queue,
        count(*) as jobs,
        count(*) filter (where t.attempt > 0) as retrying,
        count(*) filter (where t.due_at <= clock_timestamp()) as due
    from notifyq.scheduled t
    group by t.queue
) s on s.queue = q.number
left join (select t.queue, count(*) as jobs, count(*) filter (where t.attempt > 0) as retrying from notifyq.blocked t group by t.queue) b on b.queue = q.number
left join (select t.queue, count(*) as jobs from notifyq.active t group by t.queue) a on a.queue = q.number
left join (
    select
        t.queue,
        count(*) filter (where t.state = 'completed') as completed,
        count(*) filter (where t.state = 'failed') as failed,
        count(*) filter (where t.state = 'cancelled') as cancelled,
        max(t.finished_at) as last_finished_at
    from notifyq.archive t
    group by t.queue
) f on f.queue = q.number;
comment on view notifyq.queue_stats is 'Counts by queue; finished ones count while they are kept. due: scheduled ones whose time has come. head_age: since the job next in line was sent.';

create or replace view notifyq.runtimes as
select
    r.id,
    r.hostname,
    r.pid,
    r.version,
    r.queues,
    r.started_at,
    r.beat_at,
    r.lease_until,
    case when r.lease_until < clock_timestamp() then 'lost' when r.stopping then 'stopping' else 'running' end as state,
    coalesce(a.jobs, 0) as active
from notifyq.runtime r
left join (select t.runtime, count(*) as jobs from notifyq.active t group by t.runtime) a on a.runtime = r.id;

create or replace view notifyq.blocked_keys as
select
    q.name as queue,
    b.key,
    b.jobs as blocked,
    array(
        select a.job from notifyq.active a where a.queue = q.number and a.key = b.key
        union
        select k.head where k.head is not null
        order by 1
    ) as held_by
from (select t.queue, t.key, count(*) as jobs from notifyq.blocked t where t.parents = 0 group by t.queue, t.key) b
join notifyq.queue q on q.number = b.queue
left join notifyq.key k on k.queue = b.queue and k.key = b.key
    and k.generation = (select g.generation from notifyq.gate g where g.queue = b.queue order by g.generation desc limit 1);
comment on view notifyq.blocked_keys is 'The keys that hold jobs back, and the jobs that hold them: active ones, or the waiting or failed head of an ordered or stately key.';
