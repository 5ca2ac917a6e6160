-- What an operator does to jobs: cancel, retry, resume, delete, redrive. The forms that take
-- an array return the ids they affected, the forms that take one job whether it was.

-- Cancels jobs. Waiting ones, and active ones claimed by hand, at once. Of those that a runtime
-- runs it is a request: a NOTIFY on the control channel now, and again with every beat, until
-- the runtime has cancelled the handler. Locks: tickets, active tickets by id, then jobs.
create or replace function notifyq.cancel(jobs bigint[]) returns bigint[]
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    left_over bigint[] := array(select c.job from unnest(cancel.jobs) c (job) order by c.job);
    ended notifyq.active[];
    requested bigint[];
    affected bigint[] := '{}';
begin
    -- A ticket can move while we look; what is waiting, active or being moved is found again, and may only now have a gate.
    for round in 1 .. 3 loop
        if exists (select from notifyq.gate) then
            perform notifyq.lock_gates(left_over);
        end if;
        select array_agg(t) into ended
        from (
            select w.* from notifyq.leave_waiting(left_over) w
            union all
            select a.* from notifyq.leave_active(left_over, null, null) a
        ) t;
        perform notifyq.finish(ended, 'cancelled');
        affected := affected || array(select e.job from unnest(ended) e);
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
-- Deleting the archived row is what keeps two callers from doing it twice. One whose key, by its queue's policy,
-- another job has by now stays.
create or replace function notifyq.revive(jobs bigint[], state text) returns bigint[]
language sql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
    with standing as materialized (
        select a.id, a.queue, a.key
        from notifyq.archive a
        where a.id = any (revive.jobs)
        and a.state = revive.state
        order by a.id
        for update
    ), chosen as materialized (
        select s.id, q.ageing
        from (select * from standing order by queue, key, id) s
        join notifyq.queue q on q.number = any (array[s.queue])
        where case when q.policy in ('short', 'stately', 'exclusive') then notifyq.reserve(q.number, 'p', coalesce(s.key, ''), 0, s.id) = s.id else true end
    ), gone as (
        delete from notifyq.archive a
        using chosen c
        where a.id = any (array[c.id])
        returning a.*, c.ageing
    ), job as (
        insert into notifyq.job (id, sent_at, retry_delay, retry_delay_max, timeout, queue, retry_limit, priority, retry_backoff, flow, key, id_key, headers, provenance, data)
        select g.id, g.sent_at, g.retry_delay, g.retry_delay_max, g.timeout, g.queue, g.retry_limit, g.priority, g.retry_backoff, g.flow, g.key, g.id_key, g.headers, g.provenance, g.data
        from gone g
    ), ticket as (
        insert into notifyq.ready (queue, priority, number, job, attempt)
        select g.queue, notifyq.line_priority(g.priority, g.ageing), notifyq.line_number(nextval('notifyq.job_id_seq'), g.priority, g.ageing), g.id, g.attempt
        from gone g
        order by g.id
    )
    select coalesce(array_agg(g.id), '{}')
    from gone g
$$;

-- Gives failed jobs one more attempt, at once, unless another job has their key, where the policy lets only one wait. Locks:
-- archived rows.
create or replace function notifyq.retry(jobs bigint[]) returns bigint[]
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    select notifyq.revive(retry.jobs, 'failed')
$$;

-- Puts cancelled jobs back in line, as retry(). Locks: archived rows.
create or replace function notifyq.resume(jobs bigint[]) returns bigint[]
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    select notifyq.revive(resume.jobs, 'cancelled')
$$;

-- Deletes jobs with all that is remembered of them, in any state or only in these (of jobs that
-- move meanwhile, those that stand in one of them). One that runs is not interrupted; settling it
-- later changes nothing. Locks: tickets, active tickets, archived rows, then jobs.
create or replace function notifyq.delete_in(states text[], jobs bigint[]) returns bigint[]
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    left_over bigint[] := array(select d.job from unnest(delete_in.jobs) d (job) order by d.job);
    active notifyq.active[];
    gone bigint[];
    affected bigint[] := '{}';
begin
    -- A ticket can move while we look; what is waiting, active or being moved is found again, and may only now have a gate.
    for round in 1 .. 3 loop
        if exists (select from notifyq.gate) then
            perform notifyq.lock_gates(left_over);
        end if;
        if delete_in.states && '{scheduled,blocked,ready}' then
            affected := affected || array(select w.job from notifyq.leave_waiting(left_over, delete_in.states) w);
        end if;
        if 'active' = any (delete_in.states) then
            with ticket as (
                delete from notifyq.active a
                where a.job = any (left_over)
                returning a
            )
            select array_agg(t.a) into active from ticket t;
            perform notifyq.free(active, 'ended');
            affected := affected || array(select a.job from unnest(active) a);
        end if;
        if delete_in.states && '{completed,failed,cancelled}' then
            with old as (
                delete from notifyq.archive a
                where a.id = any (left_over)
                and a.state = any (delete_in.states)
                returning a.id
            )
            select array_agg(o.id) into gone from old o;
            perform notifyq.release_heads(gone);
            affected := affected || gone;
        end if;
        delete from notifyq.job j where j.id = any (affected);
        select array_agg(j.id) into left_over
        from notifyq.job j
        where j.id = any (left_over);
        exit when left_over is null;
    end loop;
    perform notifyq.parents_ended(affected, 'deleted');
    perform notifyq.forget(affected);
    return affected;
end
$$;

-- Deletes jobs in any state.
create or replace function notifyq.delete(jobs bigint[]) returns bigint[]
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    select notifyq.delete_in('{scheduled,blocked,ready,active,completed,failed,cancelled}', "delete".jobs)
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

-- Deletes a queue's jobs in one state, or in 'waiting' (scheduled, blocked and ready) or 'finished'
-- (completed, failed and cancelled) ones; null: all. Returns how many went.
create or replace function notifyq.delete_all(queue text, state text default null) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    q notifyq.queue := notifyq.queue_named(delete_all.queue);
    finished constant text[] := '{completed,failed,cancelled}';
    states constant text[] := case coalesce(delete_all.state, 'all')
        when 'all' then '{scheduled,blocked,ready,active,completed,failed,cancelled}'
        when 'waiting' then '{scheduled,blocked,ready}'
        when 'finished' then finished
        else array[delete_all.state]
    end;
    batch constant int := 10000;
    doomed bigint[];
    deleted bigint := 0;
    last_id bigint := 0;
begin
    if not states <@ '{scheduled,blocked,ready,active,completed,failed,cancelled}' then
        raise exception 'not a state: %', quote_literal(delete_all.state)
        using errcode = 'NQ003', hint = 'States are waiting, finished, scheduled, blocked, ready, active, completed, failed and cancelled.';
    end if;
    -- Looked for once: where one goes, another of its key comes to stand, which was not asked for.
    doomed := array(
        select s.job from notifyq.scheduled s where s.queue = q.number and 'scheduled' = any (states)
        union all
        select b.job from notifyq.blocked b where b.queue = q.number and 'blocked' = any (states)
        union all
        select r.job from notifyq.ready r where r.queue = q.number and 'ready' = any (states)
        union all
        select a.job from notifyq.active a where a.queue = q.number and 'active' = any (states)
    );
    for place in 1 .. cardinality(doomed) by batch loop
        deleted := deleted + cardinality(notifyq.delete_in(states, doomed[place:place + batch - 1]));
    end loop;
    -- By id, so that a large archive is walked once and not once a batch.
    while states && finished loop
        doomed := array(select a.id from notifyq.archive a where a.id > last_id and a.queue = q.number and a.state = any (states) order by a.id limit batch);
        exit when doomed = '{}';
        deleted := deleted + cardinality(notifyq.delete_in(states, doomed));
        last_id := doomed[cardinality(doomed)];
    end loop;
    return deleted;
end
$$;

-- The dead letters ready in a queue whose source still exists and lets one of their key wait, oldest first, and that source.
create or replace function notifyq.redrivable(dead_letter int, source text, error_type text, how_many int)
returns table (job bigint, number bigint, priority smallint, source_name text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select r.job, r.number, r.priority, s.name
    from notifyq.ready r
    join notifyq.job j on j.id = any (array[r.job])
    join notifyq.queue s on s.name = any (array[j.provenance ->> 'queue'])
    where r.queue = redrivable.dead_letter
    and s.number <> redrivable.dead_letter
    and case when s.policy in ('short', 'stately', 'exclusive') then not exists (
        select from notifyq.reserved o
        where o.queue = s.number
        and o.kind = 'p'
        and o.key = coalesce(j.provenance ->> 'key', '')
        and o.slot = 0
    ) else true end
    and (redrivable.source is null or s.name = redrivable.source)
    and (redrivable.error_type is null or j.provenance -> 'error' ->> 'type' = redrivable.error_type)
    order by r.priority desc, r.number
    limit redrivable.how_many
$$;

-- Sends dead letters that are ready back to the queues they came from, oldest first: all, those
-- of one source, those whose last error has this type, at most how_many. A job whose source no
-- longer exists stays, and so does one whose key the source's policy has taken. preview: only says what would go, new_id null. What came back from a queue of
-- dead letters of dead letters has its earlier provenance again.
-- Locks: the dead letters' gate, tickets, stepping over those that others hold; then keys in their order, jobs.
create or replace function notifyq.redrive(
    dead_letter text,
    source text default null,
    error_type text default null,
    how_many int default null,
    preview boolean default false
) returns table (id bigint, queue text, new_id bigint)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    dead notifyq.queue := notifyq.queue_named(redrive.dead_letter);
    moved record;
    heads text[];
begin
    if redrive.how_many < 1 then
        raise exception 'how_many must be 1 or more, not %', redrive.how_many using errcode = 'NQ003';
    end if;
    if redrive.source is not null then
        perform notifyq.queue_named(redrive.source);
    end if;
    if redrive.preview then
        return query
        select c.job, c.source_name, null::bigint
        from notifyq.redrivable(dead.number, redrive.source, redrive.error_type, redrive.how_many) c
        order by c.job;
        return;
    end if;
    if dead.gated then
        perform notifyq.lock_gate(dead.number);
    end if;
    with candidate as materialized (
        select r.ctid as place, r.job, c.source_name, nextval('notifyq.job_id_seq') as new_id
        from notifyq.redrivable(dead.number, redrive.source, redrive.error_type, redrive.how_many) c
        cross join lateral (
            select o.ctid, o.job
            from notifyq.ready o
            where o.queue = dead.number
            and o.priority = c.priority
            and o.number = c.number
            offset 0
            for update skip locked
        ) r
    ), chosen as materialized (
        -- Of several of one key, where the source's policy lets one wait, the others stay.
        select c.*
        from (
            select c.*, j.provenance ->> 'key' as key
            from candidate c
            join notifyq.job j on j.id = any (array[c.job])
            order by c.source_name, j.provenance ->> 'key', c.new_id
        ) c
        join notifyq.queue q on q.name = any (array[c.source_name])
        where case when q.policy in ('short', 'stately', 'exclusive')
            then notifyq.reserve(q.number, 'p', coalesce(c.key, ''), 0, c.new_id) = c.new_id else true end
    ), ticket as (
        delete from notifyq.ready r
        using chosen c
        where r.ctid = c.place
        returning r.job, c.source_name, c.new_id
    ), gone as (
        delete from notifyq.job j
        using ticket t
        where j.id = any (array[t.job])
        returning j.*, t.source_name, t.new_id
    ), again as (
        insert into notifyq.job (id, queue, data, headers, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at, key, flow, provenance)
        select g.new_id, q.number, g.data, g.headers, coalesce((g.provenance ->> 'priority')::smallint, q.priority),
            q.retry_limit, q.retry_delay, q.retry_delay_max, q.retry_backoff, q.timeout, now() + q.expire_in, g.provenance ->> 'key', g.flow, nullif(g.provenance -> 'provenance', 'null')
        from gone g
        join notifyq.queue q on q.name = any (array[g.source_name])
        returning id, queue, priority
    ), rung as (
        insert into notifyq.ready (queue, priority, number, job)
        select a.queue, notifyq.line_priority(a.priority, q.ageing), notifyq.line_number(a.id, a.priority, q.ageing), a.id
        from again a
        join notifyq.queue q on q.number = any (array[a.queue])
        order by a.id
    )
    select array_agg(c.job) as jobs, array_agg(c.source_name) as queues, array_agg(c.new_id) as new_ids,
        array(select coalesce(g.key, '') from gone g) as keys
    into moved
    from chosen c;
    if dead.gated then
        -- As what leaves the line otherwise, see leave_line().
        heads := array(select k.key from notifyq.key k where k.queue = dead.number and k.head = any (moved.jobs));
        perform notifyq.free_keys(dead, heads);
        perform notifyq.advance(dead, moved.keys);
    end if;
    perform notifyq.unreserve(dead.number, m.key, m.job) from unnest(moved.keys, moved.jobs) m (key, job);
    -- What comes after it in a flow comes after the new one.
    update notifyq.dependency d
    set parent = m.new_id
    from unnest(moved.jobs, moved.new_ids) m (job, new_id)
    where d.parent = any (array[m.job])
    and d.state is null;
    perform notifyq.forget(moved.jobs);
    return query
    select * from unnest(moved.jobs, moved.queues, moved.new_ids) m (job)
    order by m.job;
end
$$;
