-- fail, snooze, release, discard: an active job that did not complete.

-- Seconds until the next attempt after the n-th failed one. Fixed: retry_delay. With backoff:
-- d = min(retry_delay_max, retry_delay * 2^(n-1)), jittered evenly over [d/2, d] ("equal
-- jitter": AWS Architecture Blog, Exponential Backoff And Jitter, 2015). No pinned search_path, so that it is inlined.
create or replace function notifyq.backoff(retry_delay interval, retry_delay_max interval, retry_backoff boolean, attempt int) returns interval
language sql volatile
as $$
    select case when backoff.retry_backoff
        then make_interval(secs => least(
            extract(epoch from backoff.retry_delay_max)::float8,
            extract(epoch from backoff.retry_delay)::float8 * power(2, least(backoff.attempt - 1, 60))
        ) * (0.5 + random() / 2))
        else backoff.retry_delay
    end
$$;

-- Fails attempts of a batch: each is tried again later, or ends as failed (retries used up, or
-- final). errors is a JSON array of {type, message, traceback}, one a job. retry_in overrides
-- the backoff where not null. attempts null: whatever attempt is active. as_of: see snooze(). One with a
-- cancel request ends as cancelled.
--
-- Returns the jobs it affected and where they stand now: scheduled, ready, failed or cancelled. Ones
-- that are not active with this attempt and runtime are left alone.
-- Locks: active tickets in the order given (give them by id), then jobs.
create or replace function notifyq.fail(
    jobs bigint[],
    errors jsonb,
    attempts int[] default null,
    runtime uuid default null,
    final boolean[] default null,
    retry_in interval[] default null,
    as_of timestamptz[] default null
) returns table (id bigint, state text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    judged record;
begin
    if jsonb_typeof(fail.errors) is distinct from 'array' or jsonb_array_length(fail.errors) <> cardinality(fail.jobs) then
        raise exception 'errors must be a JSON array of {type, message, traceback} with one element a job' using errcode = 'NQ003';
    end if;
    if '100 years' < any (fail.retry_in) then
        perform notifyq.refuse_time('retry_in', max(r)) from unnest(fail.retry_in) r;
    end if;
    if exists (select from notifyq.gate) then
        perform notifyq.lock_gates(fail.jobs);
    end if;
    with gone as (
        delete from notifyq.active a
        using rows from (
            unnest(fail.jobs), unnest(fail.attempts), jsonb_array_elements(fail.errors), unnest(fail.final), unnest(fail.retry_in),
            unnest(fail.as_of)
        ) as o (job, attempt, error, final, retry_in, as_of)
        where a.job = any (array[o.job])
        and a.runtime is not distinct from fail.runtime
        and (fail.attempts is null or a.attempt = o.attempt)
        and a.claimed_at <= coalesce(o.as_of, fail.as_of[1], 'infinity')
        returning a as ticket, a.job, a.queue, a.attempt, a.key, a.cancel_requested_at, a.claimed_at, a.runtime, o.error, o.final, o.retry_in
    ), noted as (
        insert into notifyq.attempt (job, claimed_at, runtime, attempt, type, message, traceback)
        select g.job, g.claimed_at, g.runtime, g.attempt, coalesce(g.error ->> 'type', 'Error'), coalesce(g.error ->> 'message', ''), g.error ->> 'traceback'
        from gone g
    ), verdict as materialized (
        select g.ticket, g.job, g.queue, g.attempt, g.key, j.priority,
            case
                when g.cancel_requested_at is not null then 'cancelled'
                when g.final or g.attempt > j.retry_limit then 'failed'
                when d.delay > '0' then 'scheduled'
                else 'ready'
            end as state,
            d.delay
        from gone g
        join notifyq.job j on j.id = any (array[g.job])
        cross join lateral (
            select coalesce(g.retry_in, notifyq.backoff(j.retry_delay, j.retry_delay_max, j.retry_backoff, g.attempt)) as delay
        ) d
    ), later as (
        insert into notifyq.scheduled (job, queue, attempt, due_at)
        select v.job, v.queue, v.attempt, clock_timestamp() + v.delay
        from verdict v
        where v.state = 'scheduled'
    ), again as (
        insert into notifyq.ready (queue, priority, number, job, attempt)
        select v.queue, notifyq.line_priority(v.priority, q.ageing), notifyq.line_number(nextval('notifyq.job_id_seq'), v.priority, q.ageing), v.job, v.attempt
        from verdict v
        join notifyq.queue q on q.number = any (array[v.queue])
        where v.state = 'ready'
    )
    select array_agg(v.job) as jobs, array_agg(v.state) as states,
        array_agg(v.ticket) filter (where v.state = 'failed') as failed,
        array_agg(v.ticket) filter (where v.state = 'cancelled') as cancelled,
        array_agg(v.ticket) filter (where v.state in ('scheduled', 'ready') and v.key is not null) as again
    into judged
    from verdict v;
    if judged.again is not null then
        perform notifyq.free(judged.again, 'again');
    end if;
    perform notifyq.finish(judged.failed, 'failed');
    perform notifyq.finish(judged.cancelled, 'cancelled');
    return query
    select * from unnest(judged.jobs, judged.states);
end
$$;

-- Fails the attempt of one job that was claimed by hand. Returns where the job stands now, or
-- null if it was not active.
create or replace function notifyq.fail(
    job bigint,
    message text,
    type text default 'Error',
    attempt int default null,
    final boolean default false,
    retry_in interval default null
) returns text
language sql
set search_path = pg_catalog, pg_temp
as $$
    select f.state
    from notifyq.fail(array[fail.job], jsonb_build_array(jsonb_build_object('type', fail.type, 'message', fail.message)),
        case when fail.attempt is null then null else array[fail.attempt] end, null::uuid, array[fail.final], array[fail.retry_in]) f
$$;

-- Puts active jobs off without spending an attempt; a delay of zero: to the end of the line. One
-- with a cancel request ends as cancelled. Returns the ids affected. Locks: active tickets in the
-- order given, then jobs.
--
-- as_of: a moment at which the claim that is meant had been made, for each job; where one is missing, or null, the first
-- one counts, so that one is enough for all. The next claim has the same attempt and may be the same runtime's: a call that
-- is repeated, or comes through late, must not end that one. None, or the first one null: whatever claim.
create or replace function notifyq.snooze(
    jobs bigint[], delays interval[], attempts int[] default null, runtime uuid default null, as_of timestamptz[] default null
) returns bigint[]
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    affected bigint[];
    cancelled notifyq.active[];
    again notifyq.active[];
begin
    if '100 years' < any (snooze.delays) then
        perform notifyq.refuse_time('delays', max(d)) from unnest(snooze.delays) d;
    end if;
    if exists (select from notifyq.gate) then
        perform notifyq.lock_gates(snooze.jobs);
    end if;
    with gone as materialized (
        delete from notifyq.active a
        using rows from (unnest(snooze.jobs), unnest(snooze.attempts), unnest(snooze.delays), unnest(snooze.as_of)) as o (job, attempt, delay, as_of)
        where a.job = any (array[o.job])
        and a.runtime is not distinct from snooze.runtime
        and (snooze.attempts is null or a.attempt = o.attempt)
        and a.claimed_at <= coalesce(o.as_of, snooze.as_of[1], 'infinity')
        returning a as ticket, a.job, a.queue, a.attempt, a.key, a.cancel_requested_at is not null as cancelled, o.delay
    ), later as (
        insert into notifyq.scheduled (job, queue, attempt, due_at)
        select g.job, g.queue, g.attempt - 1, clock_timestamp() + g.delay
        from gone g
        where not g.cancelled
        and g.delay > '0'
    ), again as (
        insert into notifyq.ready (queue, priority, number, job, attempt)
        select g.queue, notifyq.line_priority(j.priority, q.ageing), notifyq.line_number(nextval('notifyq.job_id_seq'), j.priority, q.ageing), g.job, g.attempt - 1
        from gone g
        join notifyq.job j on j.id = any (array[g.job])
        join notifyq.queue q on q.number = any (array[g.queue])
        where not g.cancelled
        and coalesce(g.delay, '0') <= '0'
    )
    select coalesce(array_agg(g.job), '{}'), array_agg(g.ticket) filter (where g.cancelled),
        array_agg(g.ticket) filter (where not g.cancelled and g.key is not null)
    into affected, cancelled, again
    from gone g;
    perform notifyq.free(again, 'again');
    perform notifyq.finish(cancelled, 'cancelled');
    return affected;
end
$$;

-- Hands back claimed jobs that were not started: same place in the line, no attempt spent. One
-- with a cancel request ends as cancelled. as_of: see snooze(). Returns the ids affected. Locks: active tickets by id.
create or replace function notifyq.release(
    jobs bigint[], attempts int[] default null, runtime uuid default null, as_of timestamptz[] default null
) returns bigint[]
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    affected bigint[];
    cancelled notifyq.active[];
    again notifyq.active[];
    moved notifyq.ready[];
begin
    if exists (select from notifyq.gate) then
        perform notifyq.lock_gates(release.jobs);
    end if;
    with gone as materialized (
        select g as ticket, g.job, g.queue, g.attempt, g.key, g.number, g.cancel_requested_at is not null as cancelled
        from notifyq.leave_active(release.jobs, release.attempts, release.runtime, release.as_of) g
    ), back as (
        insert into notifyq.ready as t (queue, priority, number, job, attempt)
        select g.queue, notifyq.line_priority(j.priority, q.ageing), g.number, g.job, g.attempt - 1
        from gone g
        join notifyq.job j on j.id = any (array[g.job])
        join notifyq.queue q on q.number = any (array[g.queue])
        where not g.cancelled
        order by g.number
        returning t as ticket
    )
    select coalesce(array_agg(g.job), '{}'), array_agg(g.ticket) filter (where g.cancelled),
        array_agg(g.ticket) filter (where not g.cancelled and g.key is not null),
        (select array_agg(b.ticket) from back b)
    into affected, cancelled, again, moved
    from gone g;
    perform notifyq.ring_back(moved);
    perform notifyq.free(again, 'again');
    perform notifyq.finish(cancelled, 'cancelled');
    return affected;
end
$$;

-- Ends active jobs as cancelled: their worker discarded them, or confirms a cancel request.
-- as_of: see snooze(). Returns the ids affected. Locks: active tickets by id, then jobs.
create or replace function notifyq.discard(
    jobs bigint[], attempts int[] default null, runtime uuid default null, as_of timestamptz[] default null
) returns bigint[]
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    ended notifyq.active[];
begin
    if exists (select from notifyq.gate) then
        perform notifyq.lock_gates(discard.jobs);
    end if;
    select array_agg(a) into ended
    from notifyq.leave_active(discard.jobs, discard.attempts, discard.runtime, discard.as_of) a;
    perform notifyq.finish(ended, 'cancelled');
    return array(select e.job from unnest(ended) e);
end
$$;
