-- Leases: a runtime holds one row and renews it; what a dead one held is rescued.

-- Registers a runtime, or renews the registration of one whose lease was lost. queues: names, and
-- patterns with * for any run of characters: see served(). Raises NQ003.
create or replace function notifyq.register(
    runtime uuid,
    queues text[],
    lease interval default '12 seconds',
    pid int default 0,
    hostname text default '',
    version text default ''
) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if num_nulls(register.runtime, register.queues, register.pid, register.hostname, register.version) > 0 then
        raise exception 'runtime, queues, pid, hostname and version must not be null' using errcode = 'NQ003';
    end if;
    if (register.lease > '0' and register.lease <= '1 year') is not true then
        raise exception 'lease must be above zero and at most a year, not %', coalesce(register.lease::text, 'null') using errcode = 'NQ003';
    end if;
    insert into notifyq.runtime (id, queues, lease, lease_until, pid, hostname, version)
    values (register.runtime, register.queues, register.lease, clock_timestamp() + register.lease, register.pid, register.hostname, register.version)
    on conflict (id) do update
    set (lease, lease_until, beat_at, stopping) = (excluded.lease, excluded.lease_until, excluded.beat_at, false);
end
$$;

-- Renews a runtime's lease, and is its poll: what it must know if every NOTIFY was lost.
--
-- renewed: false when the runtime is not registered, or only until the rest of its jobs is rescued (its lease lapsed).
-- cancels: its jobs with an outstanding cancel request. ready: the numbers of those of these queues that
-- have ready or due jobs and are not paused; of the i-th queue only jobs with priorities from lows[i] to
-- highs[i] (null: all) count. due_in: seconds until the next due time by queue number. lapse_in:
-- seconds until somebody else's lease, or a claim by hand, lapses: rescue() is due then. schedules:
-- another number than before when some schedule was made, changed or removed. clock: the server's. serves:
-- changes when one of the queues it was registered for is made, deleted, paused, resumed, made fair or given rules: see served(). fleet: how
-- many live runtimes are registered for the same, this one included; place: how many of them come before it.
-- look: false leaves out what reads all that is ready and due: ready is null, and due_in is empty.
--
-- Locks: the runtime's row.
create or replace function notifyq.beat(
    runtime uuid,
    queues int[] default '{}',
    lows int[] default null,
    highs int[] default null,
    look boolean default true,
    out renewed boolean,
    out cancels bigint[],
    out ready int[],
    out due_in jsonb,
    out lapse_in float8,
    out schedules bigint,
    out clock float8,
    out serves text,
    out fleet int,
    out place int
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
as $$
declare
    registered_for text[];
begin
    update notifyq.runtime r
    set beat_at = clock_timestamp(), lease_until = clock_timestamp() + r.lease
    where r.id = beat.runtime
    and r.lease_until > 'epoch' -- rescue() has set it if it has begun
    returning r.queues into registered_for;
    renewed := found;
    select count(*), count(*) filter (where r.id < beat.runtime)
    into fleet, place
    from notifyq.runtime r
    where r.queues = registered_for
    and r.lease_until > clock_timestamp()
    and not r.stopping;
    select md5(string_agg(s.number || case when s.paused then ' paused' else '' end || case when s.fair then ' fair' else '' end
        || case when s.gated then ' gated' else '' end, ',' order by s.number))
    into serves
    from notifyq.served(registered_for) s;
    cancels := array(select a.job from notifyq.active a where a.runtime = beat.runtime and a.cancel_requested_at is not null);
    select case when beat.look then coalesce(array_agg(n.queue) filter (where n.standing or n.due <= clock_timestamp()), '{}') end,
        coalesce(jsonb_object_agg(n.queue, extract(epoch from n.due - clock_timestamp())) filter (where n.due is not null), '{}')
    into ready, due_in
    from (
        select u.queue, notifyq.next_due(u.queue) as due,
            exists (select from notifyq.queue q where q.number = u.queue and not q.paused)
            and exists (
                select from notifyq.ready t
                where t.queue = u.queue
                and t.priority between coalesce(u.low, -32768) and coalesce(u.high, 32767)
            ) as standing
        from rows from (unnest(beat.queues), unnest(beat.lows), unnest(beat.highs)) u (queue, low, high)
        where beat.look
    ) n;
    select extract(epoch from min(l.lapses) - clock_timestamp()) into lapse_in
    from (
        select min(greatest(r.lease_until, pg_postmaster_start_time() + r.lease)) as lapses
        from notifyq.runtime r
        where r.id <> beat.runtime
        union all
        select min(a.deadline) from notifyq.active a where a.runtime is null
    ) l;
    select coalesce(sum(s.number), 0) into schedules from notifyq.schedule s;
    -- A NOTIFY queue that was full stays so when the listener that held it up has gone, until somebody asks for its usage.
    perform pg_notification_queue_usage();
    clock := extract(epoch from clock_timestamp());
end
$$;

-- Says that a runtime claims no more: it is finishing what it runs.
create or replace function notifyq.stop(runtime uuid) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    update notifyq.runtime r set stopping = true where r.id = stop.runtime
$$;

-- The jobs a runtime holds: what it does not know of it hands back, and of what it does not hold it cancels the handlers.
--
-- Reads all of active, as deregister() does: an index by runtime would be written with every claim, and read rarely.
create or replace function notifyq.held(runtime uuid) returns table (job bigint, attempt int, claimed_at timestamptz)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select a.job, a.attempt, a.claimed_at
    from notifyq.active a
    where a.runtime = held.runtime
$$;

-- Gives an active job this much time from now; true if it was active. Raises NQ003.
create or replace function notifyq.touch(job bigint, extend interval, attempt int default null, runtime uuid default null) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if (touch.extend between '0' and '100 years') is not true then
        perform notifyq.refuse_time('extend', touch.extend);
    end if;
    update notifyq.active a
    set deadline = clock_timestamp() + touch.extend + case when a.runtime is null then interval '0' else interval '1 minute' end
    where a.job = touch.job
    and (touch.attempt is null or a.attempt = touch.attempt)
    and a.runtime is not distinct from touch.runtime;
    return found;
end
$$;

-- Stores the progress of an active job, visible while it runs; true if it was active.
create or replace function notifyq.progress(job bigint, progress jsonb, attempt int default null, runtime uuid default null) returns boolean
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    with reported as (
        update notifyq.active a
        set progress = progress.progress
        where a.job = progress.job
        and (progress.attempt is null or a.attempt = progress.attempt)
        and a.runtime is not distinct from progress.runtime
        returning a.job
    )
    select exists (select from reported)
$$;

-- Puts lost jobs back in their places in line, their attempt spent, so that a job that kills
-- its process does not loop for ever: one with no retries left fails as 'lost', one with a
-- cancel request is cancelled. Call with the tickets just taken out of active.
create or replace function notifyq.recover(lost notifyq.active[]) returns table (job bigint, state text)
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    back notifyq.active[];
    failed notifyq.active[];
    cancelled notifyq.active[];
    moved notifyq.ready[];
begin
    insert into notifyq.attempt (job, claimed_at, runtime, attempt, type, message)
    select l.job, l.claimed_at, l.runtime, l.attempt, 'lost', 'its runtime stopped without settling it, or its deadline passed'
    from unnest(recover.lost) l;
    select array_agg(l) filter (where l.cancel_requested_at is not null),
        array_agg(l) filter (where l.cancel_requested_at is null and l.attempt > j.retry_limit),
        array_agg(l) filter (where l.cancel_requested_at is null and l.attempt <= j.retry_limit)
    into cancelled, failed, back
    from unnest(recover.lost) l
    join notifyq.job j on j.id = any (array[l.job]);
    with ticket as (
        insert into notifyq.ready as t (queue, priority, number, job, attempt)
        select b.queue, notifyq.line_priority(j.priority, q.ageing), b.number, b.job, b.attempt
        from unnest(back) b
        join notifyq.job j on j.id = any (array[b.job])
        join notifyq.queue q on q.number = any (array[b.queue])
        order by b.number
        returning t as ticket
    )
    select array_agg(t.ticket) into moved from ticket t;
    perform notifyq.ring_back(moved);
    perform notifyq.free(back, 'again');
    perform notifyq.finish(failed, 'failed');
    perform notifyq.finish(cancelled, 'cancelled');
    return query
    select b.job, 'ready' from unnest(back) b
    union all
    select f.job, 'failed' from unnest(failed) f
    union all
    select c.job, 'cancelled' from unnest(cancelled) c;
end
$$;

-- Ends a runtime's registration; what it still holds is recovered.
create or replace function notifyq.deregister(runtime uuid) returns table (job bigint, state text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    jobs bigint[];
    lost notifyq.active[];
begin
    perform from notifyq.runtime r where r.id = deregister.runtime for update; -- from here on it claims nothing
    jobs := array(select h.job from notifyq.held(deregister.runtime) h order by h.job);
    perform notifyq.lock_gates(jobs);
    select array_agg(a) into lost
    from notifyq.leave_active(jobs, null, deregister.runtime) a;
    delete from notifyq.runtime r where r.id = deregister.runtime;
    return query
    select * from notifyq.recover(lost);
end
$$;

-- The active jobs of dead runtimes, and those whose deadline has passed. No index has all of these, so the table is read: page
-- by page, and not in the order of another index, which its callers' settings would lead to.
create or replace function notifyq.lapsed(dead uuid[], moment timestamptz) returns table (job bigint, queue int, runtime uuid)
language sql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = on
as $$
    select a.job, a.queue, a.runtime from notifyq.active a where a.deadline < lapsed.moment or a.runtime = any (lapsed.dead)
$$;

-- Recovers what runtimes with a lapsed lease hold, and jobs past their deadline (claims by
-- hand; for others the deadline is a backstop, a minute after the timeout). For one lease after
-- the server started nobody's lease counts as lapsed: they could not renew.
--
-- What somebody has locked stays until the next time, as does all that is of a queue whose gate is in use: a worker
-- that stands still between a completion and its commit must not hold up what is of other queues. A runtime of which
-- something is left keeps its row, so that it is found again; if some of its jobs have been taken, the
-- lease is no longer renewed, see beat(): it has to learn that it was lost.
--
-- Reads all of active: once, and if somebody is dead and not all could be taken once more.
--
-- Locks: runtimes' rows, stepping over those in use (a claim under way), then gates, then tickets.
create or replace function notifyq.rescue() returns table (job bigint, state text)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    moment constant timestamptz := clock_timestamp();
    dead uuid[];
    lost bigint[];
    their_queues int[];
    in_use int[];
    taken notifyq.active[];
begin
    dead := array(
        select r.id
        from notifyq.runtime r
        where r.lease_until < moment
        and pg_postmaster_start_time() + r.lease < moment
        order by r.id
        for update skip locked
    );
    select array_agg(l.job), array_agg(distinct l.queue) into lost, their_queues from notifyq.lapsed(dead, moment) l;
    if lost is not null then
        in_use := notifyq.try_lock_gates(array(select q.number from notifyq.queue q where q.number = any (their_queues) and q.gated));
        with gone as (
            delete from notifyq.active a
            where a.job = any (array(
                select p.job
                from notifyq.active p
                where p.job = any (lost)
                and p.queue <> all (in_use)
                and (p.deadline < moment or p.runtime = any (dead))
                order by p.job
                for update skip locked
            ))
            returning a.*
        )
        select array_agg(g) into taken from (select * from gone) g;
    end if;
    delete from notifyq.runtime r
    where r.id = any (dead)
    and (cardinality(taken) = cardinality(lost) or lost is null or r.id <> all (array(select l.runtime from notifyq.lapsed(dead, '-infinity') l)));
    update notifyq.runtime r
    set lease_until = 'epoch'
    where r.id = any (dead)
    and r.id = any (array(select t.runtime from unnest(taken) t));
    return query
    select * from notifyq.recover(taken);
end
$$;
