-- finish: jobs that will not run again move to the archive. Also the ways out of active that
-- fail(), snooze(), release() and discard() share.

-- Takes tickets out of active, by id; returns them. A ticket that is not active with this
-- attempt (attempts null: any) and this runtime (null: claimed by hand) stays.
create or replace function notifyq.leave_active(jobs bigint[], attempts int[], runtime uuid, as_of timestamptz[] default null)
returns setof notifyq.active
language sql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
    delete from notifyq.active a
    using (
        select o.job, o.attempt, o.as_of
        from rows from (unnest(leave_active.jobs), unnest(leave_active.attempts), unnest(leave_active.as_of)) o (job, attempt, as_of)
        order by o.job
    ) o
    where a.job = any (array[o.job])
    and a.runtime is not distinct from leave_active.runtime
    and (leave_active.attempts is null or a.attempt = o.attempt)
    and a.claimed_at <= coalesce(o.as_of, leave_active.as_of[1], 'infinity')
    returning a.*
$$;

-- A ticket that was never claimed, in the shape of an active one. No pinned search_path, so that it is inlined.
create or replace function notifyq.as_active(job bigint, number bigint, queue int, attempt int) returns notifyq.active
language sql immutable
as $$
    select row(as_active.job, as_active.number, null, null, null, null, as_active.queue, as_active.attempt, null, null)::notifyq.active
$$;

-- Takes the tickets of jobs that wait in these states, all or only those without a spent attempt,
-- shaped as active ones that were never claimed. Scheduled and blocked before ready: that is the way
-- a ticket moves. The next of their keys go on. Locks: tickets, then keys.
create or replace function notifyq.leave_waiting(jobs bigint[], states text[] default '{scheduled,blocked,ready}', unstarted boolean default false)
returns setof notifyq.active
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    gone notifyq.active[];
    blocked notifyq.active[];
    more notifyq.active[];
begin
    if cardinality(leave_waiting.jobs) = 0 then
        return; -- as lock_gates() says
    end if;
    with ticket as (
        delete from notifyq.scheduled s
        where s.job = any (leave_waiting.jobs)
        and 'scheduled' = any (leave_waiting.states)
        and (s.attempt = 0 or not leave_waiting.unstarted)
        returning s.*
    )
    select array_agg(notifyq.as_active(t.job, t.job, t.queue, t.attempt)) into gone from ticket t;

    with ticket as (
        delete from notifyq.blocked b
        where b.job = any (leave_waiting.jobs)
        and 'blocked' = any (leave_waiting.states)
        and (b.attempt = 0 or not leave_waiting.unstarted)
        returning b.*
    )
    select array_agg(notifyq.as_active(t.job, t.number, t.queue, t.attempt)) into blocked from ticket t;

    with ticket as (
        delete from notifyq.ready r
        where r.ctid = any (array(
            select t.ctid
            from notifyq.job j
            cross join lateral (
                select o.ctid
                from notifyq.ready o
                where o.queue = j.queue
                and o.priority = j.priority
                and o.number = j.id
                and o.job = j.id
                offset 0
            ) t
            where j.id = any (leave_waiting.jobs)
        ))
        and 'ready' = any (leave_waiting.states)
        and (r.attempt = 0 or not leave_waiting.unstarted)
        returning r.*
    )
    select array_agg(notifyq.as_active(t.job, t.number, t.queue, t.attempt)) into more from ticket t;
    gone := gone || more;

    with ticket as (
        delete from notifyq.ready r
        where r.job = any (leave_waiting.jobs)
        and r.number <> r.job
        and 'ready' = any (leave_waiting.states)
        and (r.attempt = 0 or not leave_waiting.unstarted)
        returning r.*
    )
    select array_agg(notifyq.as_active(t.job, t.number, t.queue, t.attempt)) into more from ticket t;
    gone := gone || more;

    if gone is not null then
        perform notifyq.leave_line(array(select g.job from unnest(gone) g));
    end if;
    if blocked is not null then
        perform notifyq.leave_line(array(select b.job from unnest(blocked) b), were_blocked => true);
    end if;
    return query
    select * from unnest(gone || blocked);
end
$$;

-- Copies failed jobs to their queues' dead-letter queues, saying where they came from. The copy
-- takes the dead-letter queue's options; a dead letter's own provenance stays inside the new one.
-- Call before finish() and after noting the attempt.
create or replace function notifyq.copy_to_dead_letter(jobs bigint[]) returns void
language sql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
    with copy as (
        insert into notifyq.job (queue, data, headers, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at, provenance)
        select d.number, j.data, j.headers, d.priority, d.retry_limit, d.retry_delay, d.retry_delay_max, d.retry_backoff, d.timeout, now() + d.expire_in,
            jsonb_build_object(
                'queue', q.name, 'id', j.id, 'sent_at', j.sent_at, 'priority', j.priority,
                'attempts', coalesce(e.attempt, 0), 'error', jsonb_build_object('type', e.type, 'message', e.message),
                'key', j.key, 'provenance', j.provenance
            )
        from unnest(copy_to_dead_letter.jobs) f (job)
        join notifyq.job j on j.id = any (array[f.job])
        join notifyq.queue q on q.number = any (array[j.queue])
        join notifyq.queue d on d.number = any (array[q.dead_letter])
        left join lateral (
            select a.attempt, a.type, a.message
            from notifyq.attempt a
            where a.job = j.id
            order by a.attempt desc, a.failed_at desc
            limit 1
        ) e on true
        order by f.job
        returning id, queue, priority
    )
    insert into notifyq.ready (queue, priority, number, job)
    select c.queue, notifyq.line_priority(c.priority, q.ageing), notifyq.line_number(c.id, c.priority, q.ageing), c.id
    from copy c
    join notifyq.queue q on q.number = any (array[c.queue])
    order by c.id
$$;

-- Archives jobs whose tickets were taken, or forgets those whose queue keeps nothing, and
-- announces them; null: none. complete() does the same within its one statement.
create or replace function notifyq.finish(ended notifyq.active[], state text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    unkept bigint[];
    in_flow bigint[];
    lost bigint[];
    tally record;
begin
    if finish.ended is null then
        return;
    end if;
    if finish.state = 'failed' then
        perform notifyq.copy_to_dead_letter((select array_agg(e.job) from unnest(finish.ended) e));
    end if;
    with done as (
        delete from notifyq.job j
        using (select * from unnest(finish.ended) e order by e.job) e
        where j.id = any (array[e.job])
        returning j.*, e.attempt, e.runtime, e.claimed_at
    ), judged as materialized (
        select d.*, q.retention, q.retention is null or q.retention > '0' as kept
        from done d
        join notifyq.queue q on q.number = any (array[d.queue])
    ), kept as (
        insert into notifyq.archive (
            id, sent_at, expires_at, retry_delay, retry_delay_max, timeout, queue, retry_limit, priority, retry_backoff, flow, key, id_key,
            headers, provenance, data, finished_at, claimed_at, runtime, attempt, leaves_on, state
        )
        select k.id, k.sent_at, k.expires_at, k.retry_delay, k.retry_delay_max, k.timeout, k.queue, k.retry_limit, k.priority, k.retry_backoff, k.flow, k.key, k.id_key,
            k.headers, k.provenance, k.data, now(), k.claimed_at, k.runtime, k.attempt, notifyq.leaves_on(k.retention), finish.state
        from judged k
        where k.kept
    )
    select array_agg(j.id) filter (where not j.kept), array_agg(j.id) filter (where j.flow is not null),
        array_agg(j.id) filter (where j.flow is not null and not j.kept)
    into unkept, in_flow, lost
    from judged j;
    if in_flow is not null then
        perform notifyq.parents_ended(in_flow, finish.state);
    end if;
    if lost is not null then
        -- It cannot be retried: what waits for that would wait for ever.
        perform notifyq.parents_ended(lost, 'deleted');
    end if;
    perform notifyq.free(finish.ended, case finish.state when 'failed' then 'failed' else 'ended' end);
    if unkept is not null then
        if finish.state = 'failed' then
            perform notifyq.release_heads(unkept); -- of an ordered key, which they would hold for ever
        end if;
        perform notifyq.forget(unkept);
    end if;
    for tally in select e.queue, array_agg(e.job order by e.job) as jobs from unnest(finish.ended) e group by e.queue loop
        perform notifyq.announce(tally.queue, tally.jobs);
    end loop;
end
$$;

-- Drops what is remembered of jobs beside their rows: failed attempts, idempotency keys, their places in flows.
create or replace function notifyq.forget(jobs bigint[]) returns void
language sql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
    delete from notifyq.attempt a where a.job = any (forget.jobs);
    delete from notifyq.id_key k where k.job = any (forget.jobs);
    delete from notifyq.dependency d where d.child = any (forget.jobs);
    delete from notifyq.flow_job f where f.job = any (forget.jobs);
$$;

-- Fails jobs that were not started in their time, as 'expired'. Call with tickets just taken.
create or replace function notifyq.end_expired(tickets notifyq.active[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
begin
    insert into notifyq.attempt (job, attempt, type, message)
    select e.job, e.attempt, 'expired', 'not started in its time, which ended at ' || j.expires_at
    from unnest(end_expired.tickets) e
    join notifyq.job j on j.id = any (array[e.job]);
    perform notifyq.finish(end_expired.tickets, 'failed');
end
$$;

-- The day on which a row that is kept this long may go, in UTC. No pinned search_path, so that it is inlined: it was a
-- fifth of a completion in a batch.
create or replace function notifyq.leaves_on(retention interval) returns date
language sql stable
as $$
    select case
        when leaves_on.retention <= interval '31 days' then ((now() + leaves_on.retention) at time zone 'utc')::date + 1
        else 'infinity'
    end
$$;
