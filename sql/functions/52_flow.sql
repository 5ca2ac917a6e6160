-- Flows: jobs that wait for others. A child's ticket is in blocked with the number of parents it
-- waits for; the parent whose end makes that zero moves it on, in the transaction of its own end.
--
-- A parent counts once: its row in dependency is marked with how it ended. What the failed, cancelled or
-- deleted parent does to a child is the child's on_failure: 'cancel' (it is cancelled, and what waits
-- for it sees that), 'run' (it counts like a completed one) or 'wait' (until the parent is retried and
-- completes; a parent that goes for good cancels it).
--
-- Locks: the parents' edges and the children's tickets, by job.

-- Says that jobs have ended, to what waits for them; how: completed, failed, cancelled or deleted.
create or replace function notifyq.parents_ended(jobs bigint[], how text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    children bigint[];
    doomed bigint[];
    cancelled bigint[];
    level bigint[] := parents_ended.jobs;
    ended notifyq.active[];
begin
    select array_agg(distinct d.child) into children
    from notifyq.dependency d
    where d.parent = any (parents_ended.jobs)
    and d.state is null;
    if children is null then
        return;
    end if;
    if parents_ended.how = 'completed' then
        perform from notifyq.blocked b where b.job = any (children) order by b.job for update;
    else
        -- With all that may be cancelled down the line, so that there is one order.
        perform from notifyq.blocked b
        where b.job = any (array(
            with recursive down as (
                select u.child from unnest(children) u (child)
                union
                select d.child
                from down
                join notifyq.blocked o on o.job = any (array[down.child]) and o.on_failure <> 'run'
                cross join lateral (select e.child from notifyq.dependency e where e.parent = o.job and e.state is null offset 0) d
            )
            select down.child from down
        ))
        order by b.job
        for update;
    end if;
    if parents_ended.how <> 'completed' then
        select array_agg(b.job order by b.job) into doomed
        from notifyq.blocked b
        where b.job = any (children)
        and b.parents > 0
        and (b.on_failure = 'cancel' or b.on_failure = 'wait' and parents_ended.how = 'deleted');
    end if;
    with counted as (
        update notifyq.dependency d
        set state = parents_ended.how
        from notifyq.blocked b
        where d.parent = any (parents_ended.jobs)
        and d.state is null
        and b.job = any (array[d.child])
        and b.parents > 0 -- and not for its key alone, taken back after it was cancelled
        and (parents_ended.how = 'completed' or b.on_failure = 'run')
        returning d.child
    )
    update notifyq.blocked b
    set parents = b.parents - c.number
    from (select counted.child, count(*)::int as number from counted group by counted.child) c
    where b.job = any (array[c.child]);
    with gone as (
        delete from notifyq.blocked b
        where b.job = any (children)
        and b.parents = 0
        and not b.job = any (coalesce(doomed, '{}'))
        and exists (select from notifyq.dependency d where d.child = b.job and d.parent = any (parents_ended.jobs) and d.state is not null offset 0)
        returning b.*
    ), later as (
        insert into notifyq.scheduled (job, queue, attempt, due_at)
        select g.job, g.queue, g.attempt, g.due_at
        from gone g
        where g.due_at > clock_timestamp()
    )
    insert into notifyq.ready (queue, priority, number, job, attempt)
    select g.queue, notifyq.line_priority(g.priority, q.ageing), notifyq.line_number(nextval('notifyq.job_id_seq'), g.priority, q.ageing), g.job, g.attempt
    from gone g
    join notifyq.queue q on q.number = any (array[g.queue])
    where (g.due_at > clock_timestamp()) is not true
    order by g.job;
    -- Level by level and then all at once: a call within a call for each would overflow the stack.
    while doomed is not null loop
        update notifyq.dependency d
        set state = case when cancelled is null then parents_ended.how else 'cancelled' end
        where d.parent = any (level)
        and d.child = any (doomed)
        and d.state is null;
        cancelled := cancelled || doomed;
        level := doomed;
        select array_agg(distinct b.job) into doomed
        from notifyq.dependency d
        join notifyq.blocked b on b.job = any (array[d.child])
        join notifyq.job j on j.id = any (array[d.parent])
        join notifyq.queue q on q.number = any (array[j.queue])
        where d.parent = any (level)
        and d.state is null
        and b.parents > 0
        and (b.on_failure = 'cancel' or b.on_failure = 'wait' and q.retention = '0');
    end loop;
    if cancelled is not null then
        select array_agg(w) into ended from notifyq.leave_waiting(cancelled, '{blocked}') w;
        perform notifyq.finish(ended, 'cancelled');
    end if;
end
$$;

-- The order in which the jobs of a flow can be made: names, parents before children. Raises NQ003.
create or replace function notifyq.flow_order(jobs jsonb) returns text[]
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    names text[] := array(select e.value ->> 'name' from jsonb_array_elements(flow_order.jobs) with ordinality e order by e.ordinality);
    known jsonb := (select jsonb_object_agg(n.name, true) from unnest(names) n (name) where n.name is not null);
    left_over jsonb := flow_order.jobs;
    placed text[] := '{}';
    done jsonb := '{}'; -- the names in placed: an object finds one sooner than an array
    next_ones text[];
    wrong record;
begin
    select n.name, count(*) into wrong from unnest(names) n (name) group by n.name having count(*) > 1 or n.name is null or n.name = '' limit 1;
    if found then
        raise exception 'a flow needs a name of its own for each job: % is given to %', coalesce(quote_literal(wrong.name), 'null'), wrong.count
        using errcode = 'NQ003';
    end if;
    select e.value ->> 'name' as name into wrong
    from jsonb_array_elements(flow_order.jobs) e
    where jsonb_typeof(e.value -> 'after') not in ('array', 'null')
    or jsonb_path_exists(e.value, '$.after[*] ? (@.type() != "string" && @.type() != "number")')
    limit 1;
    if found then
        raise exception 'after of job % of the flow must be an array of names or ids', quote_literal(wrong.name) using errcode = 'NQ003';
    end if;
    select e.value ->> 'name' as child, p.value #>> '{}' as parent into wrong
    from jsonb_array_elements(flow_order.jobs) e
    cross join lateral jsonb_array_elements(case jsonb_typeof(e.value -> 'after') when 'array' then e.value -> 'after' else '[]' end) p
    where jsonb_typeof(p.value) <> 'number'
    and not known ? (p.value #>> '{}')
    limit 1;
    if found then
        raise exception 'job % of the flow comes after %, which is not in it', quote_literal(wrong.child), quote_literal(wrong.parent)
        using errcode = 'NQ003', hint = 'after names jobs of the same flow, or gives the ids of jobs that were sent before.';
    end if;
    left_over := (select jsonb_agg(jsonb_build_object('name', e.value -> 'name', 'after', e.value -> 'after') order by e.ordinality)
        from jsonb_array_elements(flow_order.jobs) with ordinality e);
    while left_over is not null loop
        select array_agg(s.job ->> 'name' order by s.place) filter (where s.free), jsonb_agg(s.job order by s.place) filter (where not s.free)
        into next_ones, left_over
        from (
            select e.value as job, e.ordinality as place, not exists (
                select from jsonb_array_elements(case jsonb_typeof(e.value -> 'after') when 'array' then e.value -> 'after' else '[]' end) p
                where jsonb_typeof(p.value) = 'string'
                and not done ? (p.value #>> '{}')
            ) as free
            from jsonb_array_elements(left_over) with ordinality e
        ) s;
        if next_ones is null then
            raise exception 'the jobs % of the flow wait for each other', array(select n.name from unnest(names) n (name) where not done ? n.name order by n.name)
            using errcode = 'NQ003', hint = 'A flow has no cycles.';
        end if;
        placed := placed || next_ones;
        done := done || (select jsonb_object_agg(n.name, true) from unnest(next_ones) n (name));
    end loop;
    return placed;
end
$$;

-- Sends a flow: jobs is a JSON array of objects with name, queue, after (an array of names of the flow,
-- or of ids of jobs sent before), on_failure and the options of send_many(). All or nothing. Returns the
-- names and ids in the order in which they can run. Raises NQ001, NQ003, NQ004.
--
-- SECURITY DEFINER, like send().
create or replace function notifyq.send_flow(jobs jsonb) returns table (name text, id bigint)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    allowed constant text[] := array['name', 'queue', 'after', 'on_failure', 'data', 'priority', 'delay', 'due_at', 'retry_limit', 'retry_delay',
        'retry_delay_max', 'retry_backoff', 'timeout', 'expire_in', 'headers', 'id_key', 'key'];
    flow constant bigint := nextval('notifyq.job_id_seq');
    ids jsonb;
    entry jsonb;
    earlier bigint[] := '{}';
    siblings bigint[];
    sent record;
begin
    if jsonb_typeof(send_flow.jobs) is distinct from 'array' or jsonb_array_length(send_flow.jobs) = 0 then
        raise exception 'a flow is a JSON array of one job or more' using errcode = 'NQ003';
    end if;
    perform notifyq.check_options(e.value, allowed) from jsonb_array_elements(send_flow.jobs) e;
    select jsonb_object_agg(n.name, n.id) into ids
    from (
        select o.name, nextval('notifyq.job_id_seq') as id
        from unnest(notifyq.flow_order(send_flow.jobs)) with ordinality o (name, place)
        order by o.place
    ) n;
    -- All of them in their order, before one after the other: two flows may name the same ones, each in its own order.
    for entry in select e.value from jsonb_array_elements(send_flow.jobs) e loop
        earlier := earlier || array(
            select (p.value #>> '{}')::bigint
            from jsonb_array_elements(case jsonb_typeof(entry -> 'after') when 'array' then entry -> 'after' else '[]' end) p
            where jsonb_typeof(p.value) = 'number'
        );
    end loop;
    perform notifyq.lock_parents(earlier);
    for entry in
        select e.value
        from jsonb_array_elements(send_flow.jobs) e
        order by (ids ->> (e.value ->> 'name'))::bigint
    loop
        if coalesce(entry ->> 'on_failure', 'cancel') not in ('cancel', 'run', 'wait') then
            raise exception 'on_failure of job % must be cancel, run or wait, not %', quote_literal(entry ->> 'name'), entry -> 'on_failure' using errcode = 'NQ003';
        end if;
        select coalesce(array_agg(distinct (ids ->> (p.value #>> '{}'))::bigint) filter (where jsonb_typeof(p.value) = 'string'), '{}'),
            coalesce(array_agg(distinct (p.value #>> '{}')::bigint) filter (where jsonb_typeof(p.value) = 'number'), '{}')
        into siblings, earlier
        from jsonb_array_elements(case jsonb_typeof(entry -> 'after') when 'array' then entry -> 'after' else '[]' end) p;
        select s.id, s.created into sent
        from notifyq.send_one(
            notifyq.queue_named(entry ->> 'queue'), nullif(entry -> 'data', 'null'), (entry ->> 'priority')::int, notifyq.duration(entry -> 'delay'),
            (entry ->> 'due_at')::timestamptz, (entry ->> 'retry_limit')::int, notifyq.duration(entry -> 'retry_delay'),
            notifyq.duration(entry -> 'retry_delay_max'), (entry ->> 'retry_backoff')::boolean, notifyq.duration(entry -> 'timeout'),
            notifyq.duration(entry -> 'expire_in'), nullif(entry -> 'headers', 'null'), entry ->> 'id_key', entry ->> 'key', null, null,
            flow, cardinality(siblings) + notifyq.outstanding(earlier, flow, coalesce(entry ->> 'on_failure', 'cancel')),
            coalesce(entry ->> 'on_failure', 'cancel'), (ids ->> (entry ->> 'name'))::bigint
        ) s;
        if not sent.created then
            raise exception 'job % of the flow is not made: job % has its key', quote_literal(entry ->> 'name'), sent.id
            using errcode = 'NQ003', hint = 'A flow is sent whole or not at all. Wait for that job to end, or use another key.';
        end if;
        insert into notifyq.flow_job (job, flow, name) values (sent.id, flow, entry ->> 'name');
        insert into notifyq.dependency (parent, child, state)
        select p.job, sent.id, null
        from unnest(siblings) p (job)
        union all
        select p.job, sent.id, (select a.state from notifyq.archive a where a.id = p.job and (a.state = 'completed' or entry ->> 'on_failure' = 'run'))
        from unnest(earlier) p (job);
        name := entry ->> 'name';
        id := sent.id;
        return next;
    end loop;
exception when data_exception then
    raise exception 'an option of job % of the flow does not fit: %', quote_literal(entry ->> 'name'), sqlerrm using errcode = 'NQ003';
end
$$;

-- Locks jobs that were sent before, and finished ones, against their end and their retry, each kind by id.
create or replace function notifyq.lock_parents(parents bigint[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    parent bigint;
begin
    for parent in select distinct p.id from unnest(lock_parents.parents) p (id) order by p.id loop
        perform from notifyq.job j where j.id = parent for no key update;
    end loop;
    for parent in select distinct p.id from unnest(lock_parents.parents) p (id) order by p.id loop
        perform from notifyq.archive a where a.id = parent for update;
    end loop;
end
$$;

-- How many of these parents have still to end. Those sent before the flow are locked and marked, so
-- that their end counts. Raises NQ003 for one that is not there, or that has ended so that its child could never run.
create or replace function notifyq.outstanding(parents bigint[], flow bigint, on_failure text) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
    parent bigint;
    ended text;
    number int := 0;
begin
    foreach parent in array outstanding.parents loop
        -- Also if it is marked already: who ends it in a transaction that began before shall see that it comes too late.
        update notifyq.job j set flow = coalesce(j.flow, outstanding.flow) where j.id = parent;
        if found then
            number := number + 1;
            continue;
        end if;
        select a.state into ended from notifyq.archive a where a.id = parent for update;
        if not found then
            raise exception 'there is no job % to come after', parent
            using errcode = 'NQ003', hint = 'A parent is a job of this schema that has not been deleted.';
        end if;
        if ended <> 'completed' and outstanding.on_failure = 'cancel' then
            raise exception 'job % has % already: what comes after it would never run', parent, ended
            using errcode = 'NQ003', hint = 'Retry it first, or choose on_failure run or wait.';
        end if;
        if ended <> 'completed' and outstanding.on_failure = 'wait' then
            update notifyq.archive a set flow = coalesce(a.flow, outstanding.flow) where a.id = parent;
            number := number + 1;
        end if;
    end loop;
    return number;
end
$$;

-- The parents of a job: how each stands, and its output while it is kept.
create or replace function notifyq.parents(job bigint) returns table (id bigint, name text, queue text, state text, output jsonb)
language sql stable security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
    select d.parent, coalesce(f.name, d.parent::text), q.name, coalesce(a.state, d.state, 'waiting'), a.output
    from notifyq.dependency d
    left join notifyq.flow_job f on f.job = any (array[d.parent])
    left join notifyq.archive a on a.id = any (array[d.parent])
    left join notifyq.job j on j.id = any (array[d.parent])
    left join notifyq.queue q on q.number = any (array[coalesce(a.queue, j.queue)])
    where d.child = parents.job
    order by d.parent
$$;

-- The jobs of the flow that a job belongs to, in the order of their ids, with the ids they come after.
create or replace function notifyq.flow(job bigint) returns table (id bigint, name text, queue text, state text, after bigint[])
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    return query
    select f.job, f.name, v.queue, coalesce(v.state, 'forgotten'), array(select d.parent from notifyq.dependency d where d.child = f.job order by d.parent)
    from notifyq.flow_job f
    left join lateral (select j.queue, j.state from notifyq.jobs j where j.id = f.job) v on true
    where f.flow = (select o.flow from notifyq.flow_job o where o.job = "flow".job)
    order by f.job;
end
$$;
