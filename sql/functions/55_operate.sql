-- What an operator does to jobs: cancel, retry, resume, delete, redrive. The forms that take
-- an array return the ids they affected, the forms that take one job whether it was.

-- Cancels jobs. Waiting ones, and active ones claimed by hand, at once. Of those that a runtime
-- runs it is a request: a NOTIFY on the control channel now, and again with every beat, until
-- the runtime has cancelled the handler. Locks: tickets, active tickets by id, then jobs.
create or replace function notifyq.cancel(jobs bigint[]) returns bigint[]
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    left_over bigint[] := cancel.jobs;
    ended notifyq.active[];
    requested bigint[];
    affected bigint[] := '{}';
begin
    -- A ticket can move while we look; what is waiting, active or being moved is found again.
    for round in 1 .. 3 loop
        select array_agg(t) into ended
        from (
            select w.* from notifyq.leave_waiting(left_over) w
            union all
            select a.* from notifyq.leave_active(left_over, null, null) a
        ) t;
        if ended is not null then
            perform notifyq.finish(ended, 'cancelled');
            affected := affected || (select array_agg(e.job) from unnest(ended) e);
        end if;
        with asked as (
            update notifyq.active a
            set cancel_requested_at = coalesce(a.cancel_requested_at, now())
            where a.job = any (left_over)
            and a.runtime is not null
            returning a.job
        )
        select array_agg(asked.job) into requested from asked;
        affected := affected || requested;
        select array_agg(j.id) into left_over
        from notifyq.job j
        where j.id = any (left_over)
        and j.id <> all (affected);
        perform notifyq.tell_runtimes('cancel', requested);
        exit when left_over is null;
    end loop;
    return affected;
end
$$;

-- Tells every runtime something about jobs, on the control channel; ids in chunks that fit a
-- payload (under 8,000 bytes).
create or replace function notifyq.tell_runtimes(what text, jobs bigint[]) returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    select pg_notify(notifyq.channel(0), tell_runtimes.what || ':' || string_agg(j.id::text, ','))
    from unnest(tell_runtimes.jobs) with ordinality j (id, ordinality)
    group by j.ordinality / 390
$$;

-- Takes finished jobs of one state back from the archive and puts them at the end of the line.
-- Deleting the archived row is what keeps two callers from doing it twice.
create or replace function notifyq.revive(jobs bigint[], state text) returns bigint[]
language sql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
    with gone as (
        delete from notifyq.archive a
        where a.id = any (revive.jobs)
        and a.state = revive.state
        returning a.*
    ), job as (
        insert into notifyq.job (id, sent_at, retry_delay, retry_delay_max, timeout, queue, retry_limit, priority, retry_backoff, id_key, headers, provenance, data)
        select g.id, g.sent_at, g.retry_delay, g.retry_delay_max, g.timeout, g.queue, g.retry_limit, g.priority, g.retry_backoff, g.id_key, g.headers, g.provenance, g.data
        from gone g
    ), ticket as (
        insert into notifyq.ready (queue, priority, number, job, attempt)
        select g.queue, g.priority, nextval('notifyq.job_id_seq'), g.id, g.attempt
        from gone g
        order by g.id
    )
    select coalesce(array_agg(g.id), '{}')
    from gone g
$$;

-- Gives failed jobs one more attempt, at once. Locks: archived rows.
create or replace function notifyq.retry(jobs bigint[]) returns bigint[]
language sql
set search_path = pg_catalog, pg_temp
as $$
    select notifyq.revive(retry.jobs, 'failed')
$$;

-- Puts cancelled jobs back in line. Locks: archived rows.
create or replace function notifyq.resume(jobs bigint[]) returns bigint[]
language sql
set search_path = pg_catalog, pg_temp
as $$
    select notifyq.revive(resume.jobs, 'cancelled')
$$;

-- Deletes jobs in any state with all that is remembered of them. One that runs is not
-- interrupted; settling it later changes nothing. Locks: tickets, active tickets, then jobs.
create or replace function notifyq.delete(jobs bigint[]) returns bigint[]
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    left_over bigint[] := "delete".jobs;
    gone bigint[];
    affected bigint[] := '{}';
begin
    for round in 1 .. 3 loop
        with ticket as (
            select w.job from notifyq.leave_waiting(left_over) w
        )
        select array_agg(t.job) into gone from ticket t;
        affected := affected || gone;
        with ticket as (
            delete from notifyq.active a
            where a.job = any (left_over)
            returning a.job
        )
        select array_agg(t.job) into gone from ticket t;
        affected := affected || gone;
        with old as (
            delete from notifyq.archive a
            where a.id = any (left_over)
            returning a.id
        )
        select array_agg(o.id) into gone from old o;
        affected := affected || gone;
        delete from notifyq.job j where j.id = any (affected);
        select array_agg(j.id) into left_over
        from notifyq.job j
        where j.id = any (left_over);
        exit when left_over is null;
    end loop;
    perform notifyq.forget(affected);
    return affected;
end
$$;

create or replace function notifyq.cancel(job bigint) returns boolean
language sql
set search_path = pg_catalog, pg_temp
as $$
    select cardinality(notifyq.cancel(array[cancel.job])) = 1
$$;

create or replace function notifyq.retry(job bigint) returns boolean
language sql
set search_path = pg_catalog, pg_temp
as $$
    select cardinality(notifyq.retry(array[retry.job])) = 1
$$;

create or replace function notifyq.resume(job bigint) returns boolean
language sql
set search_path = pg_catalog, pg_temp
as $$
    select cardinality(notifyq.resume(array[resume.job])) = 1
$$;

create or replace function notifyq.delete(job bigint) returns boolean
language sql
set search_path = pg_catalog, pg_temp
as $$
    select cardinality(notifyq.delete(array["delete".job])) = 1
$$;

-- Deletes a queue's jobs in one state, or in 'waiting' (scheduled and ready) or 'finished'
-- (completed, failed and cancelled) ones; null: all. Returns how many went.
create or replace function notifyq.delete_all(queue text, state text default null) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    q notifyq.queue := notifyq.queue_named(delete_all.queue);
    states constant text[] := case delete_all.state
        when 'waiting' then array['scheduled', 'ready']
        when 'finished' then array['completed', 'failed', 'cancelled']
        else array[delete_all.state]
    end;
    doomed bigint[];
    deleted bigint := 0;
begin
    if delete_all.state not in ('waiting', 'finished', 'scheduled', 'ready', 'active', 'completed', 'failed', 'cancelled') then
        raise exception 'not a state: %', quote_literal(delete_all.state)
        using errcode = 'NQ003', hint = 'States are waiting, finished, scheduled, ready, active, completed, failed and cancelled.';
    end if;
    loop
        select array_agg(t.id) into doomed
        from (
            (select s.job as id from notifyq.scheduled s where s.queue = q.number and (delete_all.state is null or 'scheduled' = any (states)) limit 10000)
            union all
            (select r.job from notifyq.ready r where r.queue = q.number and (delete_all.state is null or 'ready' = any (states)) limit 10000)
            union all
            (select a.job from notifyq.active a where a.queue = q.number and (delete_all.state is null or 'active' = any (states)) limit 10000)
            union all
            (select a.id from notifyq.archive a where a.queue = q.number and (delete_all.state is null or a.state = any (states)) limit 10000)
        ) t;
        exit when doomed is null;
        deleted := deleted + cardinality(notifyq.delete(doomed));
    end loop;
    return deleted;
end
$$;

-- Sends the waiting jobs of a dead-letter queue back to the queues they came from, oldest
-- first: all, those of one source, those whose last error has this type, at most how_many.
-- A job whose source no longer exists stays. preview: only says what would go, new_id null.
-- Locks: tickets, stepping over those that others hold; then jobs.
create or replace function notifyq.redrive(
    dead_letter text,
    source text default null,
    error_type text default null,
    how_many int default null,
    preview boolean default false
) returns table (id bigint, queue text, new_id bigint)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    dead notifyq.queue := notifyq.queue_named(redrive.dead_letter);
begin
    if redrive.how_many < 1 then
        raise exception 'how_many must be 1 or more, not %', redrive.how_many using errcode = 'NQ003';
    end if;
    if redrive.source is not null then
        perform notifyq.queue_named(redrive.source);
    end if;
    return query
    with chosen as materialized (
        select r.ctid as place, r.job, s.name, case when not redrive.preview then nextval('notifyq.job_id_seq') end as new_id
        from notifyq.ready r
        join notifyq.job j on j.id = r.job
        join notifyq.queue s on s.name = j.provenance ->> 'queue'
        where r.queue = dead.number
        and (redrive.source is null or s.name = redrive.source)
        and (redrive.error_type is null or j.provenance -> 'error' ->> 'type' = redrive.error_type)
        order by r.priority desc, r.number
        limit redrive.how_many
        for update of r skip locked
    ), ticket as (
        delete from notifyq.ready r
        using chosen c
        where r.ctid = c.place
        and c.new_id is not null
        returning r.job
    ), gone as (
        delete from notifyq.job j
        using ticket t
        where j.id = t.job
        returning j.*
    ), again as (
        insert into notifyq.job (id, queue, data, headers, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at, provenance)
        select c.new_id, q.number, g.data, g.headers, coalesce((g.provenance ->> 'priority')::smallint, q.priority),
            q.retry_limit, q.retry_delay, q.retry_delay_max, q.retry_backoff, q.timeout, now() + q.expire_in, g.provenance
        from gone g
        join chosen c on c.job = g.id
        join notifyq.queue q on q.name = c.name
        returning id, queue, priority
    ), rung as (
        insert into notifyq.ready (queue, priority, number, job)
        select a.queue, a.priority, a.id, a.id
        from again a
        order by a.id
    )
    select c.job, c.name, c.new_id
    from chosen c
    order by c.job;
end
$$;
