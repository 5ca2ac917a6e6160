-- claim: ready tickets become active ones.

-- Moves up to how_many due tickets of a queue to ready, by due time and then in the order in which they
-- were sent, but for those that waited for the rate of an ordered key, which have their places; returns
-- how many. alone: one session at a time, so that the timers of many runtimes do not all do it; the
-- others find nothing to do.
--
-- The moment is a variable because clock_timestamp() is volatile: the index could not be asked for it.
create or replace function notifyq.promote(
    queue int,
    how_many int default 1000,
    alone boolean default true,
    due_floor timestamptz default '-infinity'
) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    moment constant timestamptz := clock_timestamp();
    promoted int;
begin
    if promote.alone and not pg_try_advisory_xact_lock(notifyq.lock_class('promote'), promote.queue) then
        return 0;
    end if;
    with due as (
        select s.job
        from notifyq.scheduled s
        where s.queue = promote.queue
        and s.due_at between promote.due_floor and moment
        order by s.due_at, s.job
        limit promote.how_many
        for update skip locked
    ), gone as (
        delete from notifyq.scheduled s
        using due
        where s.job = any (array[due.job])
        returning s.job, s.queue, s.attempt, s.due_at
    )
    insert into notifyq.ready (queue, priority, number, job, attempt, turn)
    select g.queue, notifyq.line_priority(j.priority, q.ageing),
        case when k.turn is not null and q.ageing is null then g.job else notifyq.line_number(nextval('notifyq.job_id_seq'), j.priority, q.ageing) end,
        g.job, g.attempt,
        case when q.fair and g.attempt = 0
            and not exists (
                select from notifyq.blocked b
                where b.queue = g.queue and b.key = coalesce(j.key, '') and b.parents = 0
                and b.generation = (select notifyq.generation(promote.queue))
            )
            and not exists (
                select from notifyq.blocked b
                where b.queue = g.queue and b.key = coalesce(j.key, '') and b.parents = 0
                and b.generation is null
            )
            then coalesce(j.key, '') end
    from gone g
    cross join lateral (select * from notifyq.job o where o.id = g.job offset 0) j
    cross join lateral (select * from notifyq.queue o where o.number = g.queue offset 0) q
    left join lateral (
        select o.turn from notifyq.key o
        where q.policy = 'ordered' and g.attempt = 0 and o.queue = g.queue and o.key = coalesce(j.key, '') and o.turn = g.job
        and o.generation = (select notifyq.generation(promote.queue))
        offset 0
    ) k on true
    order by g.due_at, g.job;
    get diagnostics promoted = row_count;
    return promoted;
end
$$;

-- Says why a claim like this is none. Raises NQ006 and NQ003.
create or replace function notifyq.refuse_claim(how_many int, lease interval) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'claim works in READ COMMITTED transactions only, not %', upper(current_setting('transaction_isolation'))
        using errcode = 'NQ006', hint = 'Claim in a transaction of its own, or set its isolation level.';
    end if;
    if (refuse_claim.lease > '0' and refuse_claim.lease <= '100 years') is false then
        raise exception 'lease must be above zero and at most 100 years, not %', refuse_claim.lease using errcode = 'NQ003';
    end if;
    raise exception 'how_many must be 1 or more, not %', coalesce(refuse_claim.how_many::text, 'null') using errcode = 'NQ003';
end
$$;

-- Claims up to how_many jobs of a queue, in order, spending an attempt of each.
--
-- With a runtime: its lease must be live (NQ005 otherwise) and protects the claim. Without
-- one (a claim by hand): the job must be settled or touched within lease (default: the job's
-- timeout). priorities (falling) and floors: look only from floors[i] on at priorities[i], and at what is due
-- from due_floor on; null: look from the beginning. What is ready in an ordered queue is always looked at from
-- there. READ COMMITTED only (NQ006). Jobs whose time to start is over are not claimed
-- but fail as 'expired'; with many of those a claim may return fewer than there are. A paused queue gives
-- nothing. min_priority, max_priority: only these and what lies between; not together with floors, whose
-- priorities say it. key_limit: the claim brings no more than so many of one key, less those that at_work
-- counts ('{"key": number}'); the others it steps over. durably: false does not wait until the claim is
-- on disk; a crash of the server may then forget it, and the jobs run again.
--
-- look: one more row at the end, of nulls but for attempt, whether tickets are left (1 or 0), sent_at,
-- what time it is, and timeout, the due_floor of a claim that comes soon (in seconds of the epoch): no ticket that could
-- be seen is due before it. If the claim brought fewer than were asked for, others hold those, and may let go of them
-- without a word (their claim is undone, say), so it is to be tried again. Whether any are left is null with
-- floors or a key_limit, and for queues that are paused or have a gate: nobody takes their tickets side by
-- side, and some may not start.
--
-- Locks: the runtime's row (key share), the gate, then tickets in order. Tickets locked by others are
-- stepped over. An edit writes the ticket anew: a query that sees the ticket sees the job as it was
-- edited, and one that began before finds a ticket that has gone.
create or replace function notifyq.claim(
    queue text,
    how_many int default 1,
    runtime uuid default null,
    lease interval default null,
    priorities smallint[] default null,
    floors bigint[] default null,
    min_priority int default null,
    max_priority int default null,
    key_limit int default null,
    at_work jsonb default null,
    durably boolean default true,
    look boolean default false,
    due_floor timestamptz default null
)
returns table (
    id bigint, attempt int, number bigint, priority smallint, retry_limit int, timeout float8,
    sent_at timestamptz, data jsonb, headers jsonb, provenance jsonb, key text
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    began constant timestamptz := clock_timestamp();
    moment timestamptz := began;
    n int;
    claimed int;
    live boolean;
    first_due timestamptz;
    gated boolean;
    ageing boolean;
    jobs bigint[];
    numbers bigint[];
    attempts int[];
    more_jobs bigint[];
    more_numbers bigint[];
    more_attempts int[];
    late notifyq.active[];
begin
    -- One expression where several would read better: each is paid for by every claim.
    if (
        current_setting('transaction_isolation') = 'read committed'
        and claim.how_many > 0
        and coalesce(claim.lease > '0' and claim.lease <= '100 years', true)
        and (claim.durably is not false or set_config('synchronous_commit', 'off', true) = 'off')
    ) is not true then
        perform notifyq.refuse_claim(claim.how_many, claim.lease);
    end if;
    <<claiming>>
    begin
        -- The usual case in one query: with several, a claim on an idle system takes a third longer. Nothing is due
        -- or late, no rule holds, and all that is ready may be claimed. What this does not claim is left to what follows.
        if claim.floors is null and num_nonnulls(claim.min_priority, claim.max_priority, claim.key_limit) = 0 then
            return query
            with line as (
                select q.number
                from notifyq.queue q
                where q.name = claim.queue
                and not q.paused
                and not q.gated
                and not exists (select from notifyq.scheduled s where s.queue = q.number and s.due_at <= moment offset 0)
                and not exists (select from notifyq.job j where j.expires_at <= moment)
                and (
                    claim.runtime is null
                    or exists (
                        select from notifyq.runtime r
                        where r.id = claim.runtime
                        and r.lease_until > clock_timestamp()
                        and not r.stopping
                        for key share
                    )
                )
            ), gone as (
                delete from notifyq.ready r
                where r.ctid = any (array(
                    select t.ctid
                    from notifyq.ready t
                    where t.queue = (select l.number from line l)
                    order by t.priority desc, t.number
                    limit claim.how_many
                    for update skip locked
                ))
                returning r.job, r.queue, r.number, r.attempt, r.priority
            ), claimed as materialized (
                select j.id, g.queue, g.attempt + 1 as attempt, g.number, j.priority, j.retry_limit, j.timeout,
                    j.sent_at, j.data, j.headers, j.provenance, j.key, g.priority as place
                from gone g
                cross join lateral (select * from notifyq.job o where o.id = g.job offset 0) j
            ), active as (
                insert into notifyq.active (job, queue, attempt, number, runtime, claimed_at, deadline)
                select c.id, c.queue, c.attempt, c.number, claim.runtime, clock_timestamp(),
                    clock_timestamp() + case when claim.runtime is null then coalesce(claim.lease, c.timeout) else c.timeout + interval '1 minute' end
                from claimed c
            )
            select c.id, c.attempt, c.number, c.priority, c.retry_limit, date_part('epoch', c.timeout),
                c.sent_at, c.data, c.headers, c.provenance, c.key
            from claimed c
            order by c.place desc, c.number;
            exit claiming when found;
        end if;
        select
            q.number,
            claim.runtime is null or exists (
                select from notifyq.runtime r
                where r.id = claim.runtime
                and r.lease_until > clock_timestamp()
                and not r.stopping
                for key share
            ),
            (
                select s.due_at
                from notifyq.scheduled s
                where s.queue = q.number
                and s.due_at >= coalesce(claim.due_floor, '-infinity')
                order by s.due_at
                limit 1
            ),
            q.gated,
            q.ageing is not null
        into n, live, first_due, gated, ageing
        from notifyq.queue q
        where q.name = claim.queue
        and not q.paused;
        if (live and coalesce(first_due > moment, true)) is not true then
            if n is null then
                perform notifyq.queue_named(claim.queue);
                exit claiming; -- paused
            end if;
            if not live then
                raise exception 'runtime % has no live lease', claim.runtime
                using errcode = 'NQ005', hint = 'Register it with notifyq.register(), and call notifyq.beat() in time.';
            end if;
            if gated then
                perform notifyq.lock_gate(n);
            end if;
            -- A claim by hand may be in a long transaction: it takes no more than it can use, and no lock.
            perform notifyq.promote(n, case when claim.runtime is null then claim.how_many else 1000 end, claim.runtime is not null,
                coalesce(claim.due_floor, '-infinity'));
        end if;

        if gated or claim.key_limit is not null then
            -- The gate may have been waited for: what it takes for expired has to be just what is below, and its
            -- moment is the start that rates count by.
            select a.jobs, a.numbers, a.attempts, a.moment into jobs, numbers, attempts, moment
            from notifyq.admit(n, claim.how_many, coalesce(claim.min_priority, (select min(p) from unnest(claim.priorities) p), -32768),
                coalesce(claim.max_priority, (select max(p) from unnest(claim.priorities) p), 32767), claim.key_limit, claim.at_work,
                claim.priorities, claim.floors) a;
        elsif claim.floors is null or ageing then
            with gone as (
                delete from notifyq.ready r
                where r.ctid = any (array(
                    select t.ctid
                    from notifyq.ready t
                    where t.queue = n
                    and t.priority between coalesce(claim.min_priority, -32768) and coalesce(claim.max_priority, 32767)
                    order by t.priority desc, t.number
                    limit claim.how_many
                    for update skip locked
                ))
                returning r.job, r.number, r.attempt, r.priority
            )
            select array_agg(g.job), array_agg(g.number), array_agg(g.attempt)
            into jobs, numbers, attempts
            from (select * from gone order by priority desc, number) g;
        else
            for i in 1 .. cardinality(claim.floors) loop
                with gone as (
                    delete from notifyq.ready r
                    where r.ctid = any (array(
                        select t.ctid
                        from notifyq.ready t
                        where t.queue = n
                        and t.priority = claim.priorities[i]
                        and t.number >= claim.floors[i]
                        order by t.priority desc, t.number
                        limit claim.how_many - coalesce(cardinality(jobs), 0)
                        for update skip locked
                    ))
                    returning r.job, r.number, r.attempt
                )
                select array_agg(g.job), array_agg(g.number), array_agg(g.attempt)
                into more_jobs, more_numbers, more_attempts
                from (select * from gone order by number) g;
                jobs := jobs || more_jobs;
                numbers := numbers || more_numbers;
                attempts := attempts || more_attempts;
                exit when cardinality(jobs) >= claim.how_many;
            end loop;
        end if;
        exit claiming when jobs is null;

        return query
        with claimed as materialized (
            select j.id, t.attempt + 1 as attempt, t.number, j.priority, j.retry_limit, j.timeout,
                j.sent_at, j.data, j.headers, j.provenance, j.key, t.place
            from rows from (unnest(jobs), unnest(numbers), unnest(attempts)) with ordinality t (job, number, attempt, place)
            cross join lateral (select * from notifyq.job o where o.id = t.job offset 0) j
            where (j.expires_at <= moment and t.attempt = 0) is not true
        ), active as (
            insert into notifyq.active (job, queue, attempt, number, runtime, key, claimed_at, deadline)
            select c.id, n, c.attempt, c.number, claim.runtime, case when gated then coalesce(c.key, '') end, case when gated then moment else clock_timestamp() end,
                clock_timestamp() + case when claim.runtime is null then coalesce(claim.lease, c.timeout) else c.timeout + interval '1 minute' end
            from claimed c
        )
        select c.id, c.attempt, c.number, c.priority, c.retry_limit, date_part('epoch', c.timeout),
            c.sent_at, c.data, c.headers, c.provenance, c.key
        from claimed c
        order by c.place;
        get diagnostics claimed = row_count;
        if gated then
            perform notifyq.free_waiting_keys(n, jobs);
        end if;
        if claimed < cardinality(jobs) then
            late := array(
                select notifyq.as_active(t.job, t.number, n, t.attempt)
                from rows from (unnest(jobs), unnest(numbers), unnest(attempts)) t (job, number, attempt)
                where not exists (select from notifyq.active a where a.job = t.job)
            );
            if gated then
                perform notifyq.leave_line(array(select l.job from unnest(late) l));
            end if;
            perform notifyq.end_expired(late);
            -- Fewer than were asked for looks like there are no more: who claims is told to look again.
            if cardinality(jobs) >= claim.how_many then
                perform pg_notify(notifyq.channel(n), 'look');
            end if;
        end if;
    end;
    if claim.look then
        if claim.floors is null and claim.key_limit is null then
            select exists (
                select from notifyq.ready t
                where t.queue = q.number
                and t.priority between coalesce(claim.min_priority, -32768) and coalesce(claim.max_priority, 32767)
            )::int
            into attempt
            from notifyq.queue q
            where q.name = claim.queue
            and not q.paused
            and not q.gated;
        end if;
        -- A second is for who is slow to commit: see TRAIL_SECONDS in _demand.py.
        timeout := extract(epoch from least(first_due, began - interval '1 second'));
        sent_at := clock_timestamp();
        return next;
    end if;
end
$$;

-- Tells the other runtimes of a queue that these tickets, named by their numbers, are taken, and no others were left.
create or replace function notifyq.say_taken(queue int, numbers text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if (say_taken.queue is not null and octet_length(say_taken.numbers) < 7990) is not true then
        raise exception 'a queue''s number and fewer than 7990 bytes of numbers are needed' using errcode = 'NQ003'; -- a notification holds no more
    end if;
    perform pg_notify(notifyq.channel(say_taken.queue), 't:' || say_taken.numbers);
end
$$;

-- The moment of the next due ticket of a queue, or when its rate lets the next one start, or null, also
-- when it is paused: nothing is to be done then. Tickets due before due_floor are not looked at.
create or replace function notifyq.next_due(queue int, due_floor timestamptz default '-infinity') returns timestamptz
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select least(
        (
            select s.due_at
            from notifyq.scheduled s
            where s.queue = next_due.queue
            and s.due_at >= next_due.due_floor
            order by s.due_at
            limit 1
        ),
        (select g.next_start_at from notifyq.gate g where g.queue = next_due.queue order by g.generation desc limit 1)
    )
    where exists (select from notifyq.queue q where q.number = next_due.queue and not q.paused)
$$;
