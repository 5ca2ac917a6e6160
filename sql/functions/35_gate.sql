-- The gate: which tickets of a queue with keys or limits may start, and what an end lets start.
--
-- Sends know nothing of it: they write to ready, and never wait for each other. admit() looks at
-- the tickets in front, takes those that may start, and moves the others to blocked, once each.
-- What takes a ticket out of active frees its slot and moves the next one of that key back to ready
-- (advance()), where the bell hangs. So neither a claim nor an end depends on how many wait.
--
-- What holds between transactions, for every key with a limit: as long as tickets of it are
-- blocked, those active and those in ready make up the limit, or more.
--
-- Locks: whatever moves tickets of a gated queue, but for sends and promote(), locks its gate first
-- (lock_gates()): one transaction at a time, to its end, so that nothing here can deadlock.
--
-- Plans: rows are found by ctid, by ON CONFLICT, or in lateral subqueries, never by a join that could scan a
-- queue's all: see the README.

-- How many starts a rate has left at this moment. A start counts until a period after the end of
-- the hundredth of a period that it fell in, so never more than limit fall into any period.
create or replace function notifyq.rate_room(starts bigint[], counts int[], rate_limit int, rate_period interval, moment timestamptz) returns int
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select rate_room.rate_limit - coalesce(sum(s.number), 0)::int
    from unnest(rate_room.starts, rate_room.counts) s (slot, number)
    where (s.slot + 101) * extract(epoch from rate_room.rate_period) / 100 > extract(epoch from rate_room.moment)
$$;

-- When a rate that is used up lets the next one start.
create or replace function notifyq.rate_next(starts bigint[], rate_period interval, moment timestamptz) returns timestamptz
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select to_timestamp((min(s.slot) + 101) * extract(epoch from rate_next.rate_period)::float8 / 100)
    from unnest(rate_next.starts) s (slot)
    where (s.slot + 101) * extract(epoch from rate_next.rate_period) / 100 > extract(epoch from rate_next.moment)
$$;

-- The starts of a rate with some more, that come at a time of their own; those that no longer count at the moment go.
create or replace function notifyq.rate_add(
    inout starts bigint[],
    inout counts int[],
    how_many int,
    rate_period interval,
    started_at timestamptz,
    moment timestamptz
)
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select array_agg(a.slot order by a.slot), array_agg(a.number order by a.slot)
    from (
        select s.slot, sum(s.number)::int as number
        from (
            select * from unnest(rate_add.starts, rate_add.counts) o (slot, number)
            union all
            select floor(extract(epoch from rate_add.started_at) * 100 / extract(epoch from rate_add.rate_period))::bigint, rate_add.how_many
        ) s
        where (s.slot + 101) * extract(epoch from rate_add.rate_period) / 100 > extract(epoch from rate_add.moment)
        group by s.slot
    ) a
$$;

-- Whether a transaction has been committed that this one's snapshot does not see.
create or replace function notifyq.has_come_since(locker xid) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
declare
    now_at constant bigint := pg_current_xact_id()::text::bigint;
    -- One of the last 2^32 numbers; one that is older than all that is remembered came before. Where a transaction has locked
    -- it in a savepoint, too, the mark is another number, and says nothing.
    it constant bigint := now_at - (now_at - has_come_since.locker::text::bigint) % 4294967296;
begin
    return it between 3 and now_at
        and it >= pg_snapshot_xmin(pg_current_snapshot())::text::bigint
        and not pg_visible_in_snapshot(it::text::xid8, pg_current_snapshot())
        and pg_xact_status(it::text::xid8) = 'committed';
end
$$;

-- Locks a queue's gate. In a REPEATABLE READ or SERIALIZABLE transaction, raises 40001 if somebody was there since it began:
-- what a claim has blocked meanwhile it would not see, and leave blocked.
create or replace function notifyq.lock_gate(queue int) returns notifyq.gate
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    gate notifyq.gate;
    locker xid;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        -- As it is before it is waited for: the mark of the last one who locked it stays.
        select g.xmax into locker from notifyq.gate g where g.queue = lock_gate.queue order by g.generation desc limit 1 for update;
        if notifyq.has_come_since(locker) then
            raise exception 'could not serialize access to a queue with rules: others have claimed or ended its jobs meanwhile'
            using errcode = 'serialization_failure', hint = 'Try the transaction again, or use READ COMMITTED.';
        end if;
    end if;
    loop
        select * into gate from notifyq.gate g where g.queue = lock_gate.queue order by g.generation desc limit 1 for update;
        exit when found;
        insert into notifyq.gate (queue)
        values (lock_gate.queue)
        on conflict do nothing;
    end loop;
    return gate;
end
$$;

-- The generation that a queue's keys are of, see renew_keys(). To be asked for by each statement anew if there may have been a
-- renewal since; as (select generation()), so that it is asked once.
--
-- From the highest down: what is dead of those before is not met, however many they are.
create or replace function notifyq.generation(queue int) returns int
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
begin
    return (select g.generation from notifyq.gate g where g.queue = generation.queue order by g.generation desc limit 1);
end
$$;

-- Locks the gates of the queues that these jobs are in, or keep a key of though they have failed; call
-- before their tickets are touched.
create or replace function notifyq.lock_gates(jobs bigint[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
begin
    if cardinality(lock_gates.jobs) = 0 then
        -- To the planner an empty array implies whatever a partial index asks for: it may read all of one.
        return;
    end if;
    perform notifyq.lock_gate(g.queue)
    from (
        select j.queue
        from notifyq.job j
        join notifyq.queue q on q.number = any (array[j.queue])
        where j.id = any (lock_gates.jobs)
        and q.gated
        union
        select k.queue
        from notifyq.key k
        where k.head = any (lock_gates.jobs)
        order by queue
    ) g;
end
$$;

-- The same for those who may come again: locks the gates of these queues, and gives those of them whose gates are in use.
--
-- A transaction that hangs keeps its gate, so nothing is waited for while another gate is locked; but the first one for a
-- moment, or nobody would get at the gate of a busy queue, which is always in use. As nobody waits for long, the order is any.
create or replace function notifyq.try_lock_gates(queues int[]) returns int[]
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '250ms'
as $$
declare
    queue int;
    in_use int[] := '{}';
begin
    for queue in select g.queue from unnest(try_lock_gates.queues) g (queue) order by random() loop
        begin
            perform notifyq.lock_gate(queue);
        exception when lock_not_available then
            in_use := in_use || queue;
        end;
        perform set_config('lock_timeout', '1ms', true);
    end loop;
    return in_use;
end
$$;

-- Takes up to how_many tickets that may start, of priorities from low to high, out of ready, or blocked,
-- in order; claim() makes them active. Among them are those that have expired at this moment: they hold
-- no slot, and claim() has them leave the line.
--
-- key_limit, at_work: the claiming process runs so many of each key already, and may have up to key_limit;
-- what it may not have is left where it is, for others.
--
-- priorities, floors: looks only from floors[i] on at priorities[i]. Not where the order is strict: what is further back
-- might have to come first.
create or replace function notifyq.admit(
    queue int,
    how_many int,
    low int,
    high int,
    key_limit int,
    at_work jsonb,
    priorities smallint[],
    floors bigint[],
    out jobs bigint[],
    out numbers bigint[],
    out attempts int[],
    out moment timestamptz
)
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    most_looked_at constant int := 5000;
    q notifyq.queue;
    g notifyq.gate;
    room int := admit.how_many;
    sifted record;
    window_size int;
    looked_at int := 0;
    key_by_key boolean;
    started_keys text[] := '{}';
    rated_keys text[] := '{}';
    queued_keys text[] := '{}';
    working jsonb := admit.at_work;
    started int;
    lows int[] := array[admit.low];
    highs int[] := array[admit.high];
    floors bigint[] := array[-9223372036854775808];
begin
    if admit.key_limit <= 0 then
        raise exception 'key_limit must be 1 or more, not %', admit.key_limit using errcode = 'NQ003';
    end if;
    if jsonb_path_exists(admit.at_work, 'strict $ ? (@.type() != "object" || exists (@.* ? (@.type() != "number" || @ < 0 || @ > 1000000)))') then
        raise exception 'at_work must be an object with the number of jobs of each key, like {"key": 1}, not %', admit.at_work
            using errcode = 'NQ003';
    end if;
    g := notifyq.lock_gate(admit.queue);
    -- Not before: who has waited for the gate starts now. Starts are counted later than this, when the looking is done.
    moment := clock_timestamp();
    select * into q from notifyq.queue o where o.number = admit.queue;
    room := least(room, q.active_limit - g.held, case when q.rate_limit is not null
        then notifyq.rate_room(g.starts, g.counts, q.rate_limit, q.rate_period, moment) end);
    if admit.floors is not null and q.policy <> 'ordered' and q.ageing is null then
        lows := admit.priorities;
        highs := admit.priorities;
        floors := admit.floors;
    end if;
    window_size := greatest(room, 16);
    while room > 0 loop
        key_by_key := looked_at >= most_looked_at;
        exit when key_by_key and not q.fair;
        select * into sifted
        from notifyq.sift(q, window_size, room, lows, highs, floors, admit.key_limit, working, started_keys, moment, key_by_key);
        exit when sifted.looked_at = 0;
        looked_at := looked_at + sifted.looked_at;
        jobs := jobs || sifted.jobs;
        numbers := numbers || sifted.numbers;
        attempts := attempts || sifted.attempts;
        started_keys := started_keys || sifted.started_keys;
        rated_keys := rated_keys || sifted.rated_keys;
        queued_keys := queued_keys || sifted.queued_keys;
        room := room - cardinality(sifted.started_keys);
        if admit.key_limit is not null then
            working := notifyq.add_keys(working, sifted.started_keys);
        end if;
        exit when key_by_key or sifted.looked_at < window_size;
        window_size := least(window_size * 4, 2000);
    end loop;
    if (q.fair or q.key_rate_limit is not null) and cardinality(started_keys || rated_keys || queued_keys) > 0 then
        select * into sifted from notifyq.take_turns(q, started_keys, rated_keys, queued_keys, greatest(room, 0), admit.low, admit.high,
            admit.key_limit, working, moment);
        jobs := jobs || sifted.jobs;
        numbers := numbers || sifted.numbers;
        attempts := attempts || sifted.attempts;
        started_keys := started_keys || sifted.started_keys;
        room := room - cardinality(sifted.started_keys);
    end if;
    if looked_at >= most_looked_at then
        perform notifyq.ring_look(q);
    end if;
    started := cardinality(started_keys);
    if q.active_limit is not null or q.rate_limit is not null then
        if q.rate_limit is not null and started > 0 then
            select r.starts, r.counts into g.starts, g.counts
            from notifyq.rate_add(g.starts, g.counts, started, q.rate_period, clock_timestamp(), moment) r;
        end if;
        g.next_start_at := case
            when q.rate_limit is not null and notifyq.rate_room(g.starts, g.counts, q.rate_limit, q.rate_period, moment) <= 0
                and exists (select from notifyq.ready t where t.queue = q.number)
            then notifyq.rate_next(g.starts, q.rate_period, moment)
        end;
        update notifyq.gate o
        set held = o.held + started, starts = g.starts, counts = g.counts, next_start_at = g.next_start_at
        where o.queue = admit.queue
        and o.generation = (select notifyq.generation(admit.queue));
        if g.next_start_at is not null then
            perform pg_notify(notifyq.channel(q.number), 'd:' || extract(epoch from g.next_start_at));
        end if;
    end if;
end
$$;

-- How many of each key are at work, with those that start.
create or replace function notifyq.add_keys(at_work jsonb, started_keys text[]) returns jsonb
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(add_keys.at_work, '{}') || coalesce(jsonb_object_agg(s.key, s.number + coalesce((add_keys.at_work -> s.key)::int, 0)), '{}')
    from (select u.key, count(*)::int as number from unnest(add_keys.started_keys) u (key) group by u.key) s
$$;

-- Where the first ticket in ready of each key of a fair queue is, in the order of the line; steps from
-- key to key, over at most a thousand of them, however many tickets each has.
create or replace function notifyq.first_of_keys(queue notifyq.queue, how_many int, low int, high int, had_turn text[]) returns tid[]
language sql stable
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
    with recursive step as (
        (
            select t.turn from notifyq.ready t
            where t.queue = (first_of_keys.queue).number and t.turn is not null
            order by t.turn
            limit 1
        )
        union all
        select (
            select t.turn from notifyq.ready t
            where t.queue = (first_of_keys.queue).number and t.turn > s.turn
            order by t.turn
            limit 1
        )
        from step s
        where s.turn is not null
    )
    select array_agg(f.place)
    from (
        select o.place
        from (select s.turn from step s where s.turn is not null limit 1000) k
        cross join lateral (
            select t.ctid as place, t.priority, t.number from notifyq.ready t
            where t.queue = (first_of_keys.queue).number and t.turn = k.turn and t.priority between first_of_keys.low and first_of_keys.high
            order by t.priority desc, t.number
            limit 1
        ) o
        where k.turn <> all (first_of_keys.had_turn)
        order by o.priority desc, o.number
        limit first_of_keys.how_many
    ) f
$$;

-- Whether each of these tickets of a fair queue was sent by itself after others of its key that wait.
create or replace function notifyq.stand_behind(queue notifyq.queue, tickets notifyq.ready[]) returns boolean[]
language sql stable
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
    select array_agg((n.priority > t.priority or n.priority = t.priority and n.number < t.number) is true order by t.place)
    from unnest(stand_behind.tickets) with ordinality t (number, job, queue, attempt, priority, turn, place)
    left join (
        select k.turn, b.priority, b.number
        from (select distinct o.turn from unnest(stand_behind.tickets) o) k
        cross join lateral (
            select b.priority, b.number
            from (
                (
                    select b.priority, b.number from notifyq.blocked b
                    where b.queue = (stand_behind.queue).number and b.key = k.turn and b.parents = 0
                    and b.generation = (select notifyq.generation((stand_behind.queue).number))
                    order by b.priority desc, b.number
                    limit 1
                )
                union all
                (
                    select b.priority, b.number from notifyq.blocked b
                    where b.queue = (stand_behind.queue).number and b.key = k.turn and b.parents = 0
                    and b.generation is null
                    order by b.priority desc, b.number
                    limit 1
                )
            ) b
            order by b.priority desc, b.number
            limit 1
        ) b
    ) n on n.turn = t.turn
$$;

-- One look at the tickets in front: takes up to room that may start, moves to blocked those whose
-- key is held, at its rate, or (in a fair queue) among those that had their turn, and leaves the rest. started_keys has one element a start.
-- queued_keys: those of what was put behind others of its key, whose next one stands further back.
-- It looks at tickets with priorities from lows[i] to highs[i] and numbers from floors[i] on, in this order; key_by_key: instead
-- of what is in front of them, at the first ticket of each key that has not had its turn.
create or replace function notifyq.sift(
    queue notifyq.queue,
    how_many int,
    room int,
    lows int[],
    highs int[],
    floors bigint[],
    key_limit int,
    at_work jsonb,
    had_turn text[],
    moment timestamptz,
    key_by_key boolean,
    out looked_at int,
    out jobs bigint[],
    out numbers bigint[],
    out attempts int[],
    out started_keys text[],
    out rated_keys text[],
    out queued_keys text[]
)
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    q constant notifyq.queue := sift.queue;
    -- As generation() says, which costs more.
    generation_now constant int := (select g.generation from notifyq.gate g where g.queue = q.number order by g.generation desc limit 1);
    by_key constant boolean := q.fair or num_nonnulls(q.slots, q.key_rate_limit) > 0;
    full_keys constant text[] := array(select w.key from jsonb_each(sift.at_work) w where w.value::int >= sift.key_limit);
    front notifyq.ready[];
    places tid[];
    behind boolean[];
    passed_over text[] := '{}';
    verdict record;
begin
    if sift.key_by_key then
        select array_agg(t.ticket order by (t.ticket).priority desc, (t.ticket).number), array_agg(t.place order by (t.ticket).priority desc, (t.ticket).number)
        into front, places
        from (
            select t as ticket, t.ctid as place from notifyq.ready t
            where t.ctid = any (notifyq.first_of_keys(q, sift.how_many, sift.lows[cardinality(sift.lows)], sift.highs[1], sift.had_turn || full_keys))
            for update skip locked
        ) t;
    else
        select array_agg(t.ticket order by (t.ticket).priority desc, (t.ticket).number), array_agg(t.place order by (t.ticket).priority desc, (t.ticket).number)
        into front, places
        from (
            select t.*
            from unnest(sift.lows, sift.highs, sift.floors) f (low, high, floor)
            cross join lateral (
                select t as ticket, t.ctid as place from notifyq.ready t
                where t.queue = q.number
                and t.priority between f.low and f.high
                and t.number >= f.floor
                and (full_keys = '{}' or not exists (select from notifyq.job j where j.id = t.job and coalesce(j.key, '') = any (full_keys)))
                order by t.priority desc, t.number
                limit sift.how_many
                for update skip locked
            ) t
            limit sift.how_many
        ) t;
    end if;
    looked_at := coalesce(cardinality(front), 0);
    if looked_at = 0 then
        return;
    end if;
    if q.fair then
        -- What was sent by itself after others of its key that wait comes after them: they have a place in line already.
        behind := notifyq.stand_behind(q, front);
    end if;
    if q.policy = 'ordered' then
        -- A ticket that somebody else holds (an edit, say) was stepped over: what is behind it waits for it.
        select coalesce(array_agg(j.key), '{}') into passed_over
        from notifyq.ready t
        join notifyq.job j on j.id = any (array[t.job])
        where t.queue = q.number
        and t.priority <= sift.highs[1]
        and (t.priority > (front[looked_at]).priority or t.priority = (front[looked_at]).priority and t.number < (front[looked_at]).number)
        and t.job <> all (array(select f.job from unnest(front) f));
    end if;
    with ticket as (
        select f.*, coalesce(j.key, '') as key, f.attempt = 0 and (j.expires_at <= sift.moment) is true as late, k.head is not distinct from f.job as is_head,
            case
                when f.is_behind then 0
                when coalesce(j.key, '') = any (passed_over) then 0
                when k.head is not null then 0
                when q.policy = 'ordered' and k.turn is distinct from f.job and exists (select from notifyq.scheduled s where s.job = k.turn) then 0
                when q.fair and coalesce(j.key, '') = any (sift.had_turn) then 0
                else least(case when q.fair then 1 end, q.slots - coalesce(k.held, 0))
            end as slots,
            case when q.key_rate_limit is not null
                then notifyq.rate_room(k.starts, k.counts, q.key_rate_limit, q.key_rate_period, sift.moment)
            end as rate,
            sift.key_limit - coalesce((sift.at_work -> coalesce(j.key, ''))::int, 0) as own
        from rows from (unnest(front), unnest(behind)) with ordinality f (number, job, queue, attempt, priority, turn, is_behind, place)
        join notifyq.job j on j.id = any (array[f.job])
        left join lateral (
            select o.* from notifyq.key o
            where o.queue = q.number
            and o.generation = generation_now
            and o.key = coalesce(j.key, '')
            offset 0
        ) k on by_key
    ), ranked as (
        select t.*, row_number() over (partition by t.key, t.late, t.is_head, t.is_behind order by t.place) as rank
        from ticket t
    ), judged as materialized (
        select r.*,
            case
                when r.late then 'late'
                when r.rank > r.own and r.rank <= coalesce(least(r.slots, r.rate), r.rank) then 'leave'
                when r.is_head or coalesce(r.rank <= least(r.slots, r.rate), true) then 'start'
                when r.rank <= coalesce(r.slots, r.rank) then 'rate'
                else 'wait'
            end as verdict
        from ranked r
    ), decided as materialized (
        select j.*, j.verdict = 'leave' or j.verdict = 'start' and count(*) filter (where j.verdict = 'start') over (order by j.place) > sift.room as stays
        from judged j
    ), gone as (
        delete from notifyq.ready r
        where r.ctid = any (array(select places[d.place] from decided d where not d.stays))
    ), waiting as (
        insert into notifyq.blocked (job, number, queue, attempt, generation, priority, key)
        select d.job, d.number, q.number, d.attempt, generation_now, d.priority, d.key
        from decided d
        where d.verdict in ('wait', 'rate')
    ), held as (
        insert into notifyq.key (queue, generation, key, held, head)
        select q.number, generation_now, d.key, count(*) filter (where not d.is_head),
            case when q.policy in ('stately', 'ordered') then max(d.job) end
        from decided d
        where q.slots is not null
        and d.verdict = 'start'
        and not d.stays
        group by d.key
        order by d.key
        on conflict on constraint key_pkey do update set held = key.held + excluded.held, head = excluded.head
    )
    select array_agg(d.job order by d.place) filter (where d.verdict in ('start', 'late')) as jobs,
        array_agg(d.number order by d.place) filter (where d.verdict in ('start', 'late')) as numbers,
        array_agg(d.attempt order by d.place) filter (where d.verdict in ('start', 'late')) as attempts,
        array_agg(d.key) filter (where d.verdict = 'start') as started_keys,
        array_agg(distinct d.key) filter (where d.verdict = 'rate') as rated_keys,
        array_agg(distinct d.key) filter (where d.is_behind) as queued_keys
    into verdict
    from decided d
    where not d.stays;
    jobs := verdict.jobs;
    numbers := verdict.numbers;
    attempts := verdict.attempts;
    started_keys := coalesce(verdict.started_keys, '{}');
    rated_keys := coalesce(verdict.rated_keys, '{}');
    queued_keys := coalesce(verdict.queued_keys, '{}');
    perform notifyq.count_starts(q, started_keys, sift.moment);
end
$$;

-- Counts starts of keys that have a rate; started_keys has one element a start. What counted at the moment, by which
-- they were let through, is kept: by it more are let through.
create or replace function notifyq.count_starts(queue notifyq.queue, started_keys text[], moment timestamptz) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    q constant notifyq.queue := count_starts.queue;
    read bigint;
    changed int;
begin
    if q.key_rate_limit is null or cardinality(count_starts.started_keys) = 0 then
        return;
    end if;
    read := pg_stat_get_xact_tuples_returned('notifyq.key_pkey'::regclass);
    insert into notifyq.key (queue, generation, key, starts, counts)
    select q.number, (select notifyq.generation(q.number)), s.key, r.starts, r.counts
    from (select u.key, count(*)::int as number from unnest(count_starts.started_keys) u (key) group by u.key) s
    cross join lateral notifyq.rate_add(null, null, s.number, q.key_rate_period, clock_timestamp(), count_starts.moment) r
    on conflict on constraint key_pkey do update
    set (starts, counts) = (
        select r.starts, r.counts
        from notifyq.rate_add(key.starts, key.counts, excluded.counts[1], q.key_rate_period, clock_timestamp(), count_starts.moment) r
    );
    get diagnostics changed = row_count;
    read := pg_stat_get_xact_tuples_returned('notifyq.key_pkey'::regclass) - read;
    if read > 16 * changed then
        perform notifyq.renew_worn_keys(q, read, changed);
    end if;
end
$$;

-- For queues whose keys take turns (fair ones, and with a rate by key): of a key, one ticket is in
-- ready and the others are blocked behind it. What started, or has been put behind others, may go on while there is
-- room, evenly by key; then each key that started gets its next turn, at the end of the line or when its rate allows.
create or replace function notifyq.take_turns(
    queue notifyq.queue,
    keys text[],
    rated_keys text[],
    queued_keys text[],
    room int,
    low int,
    high int,
    key_limit int,
    at_work jsonb,
    moment timestamptz,
    out jobs bigint[],
    out numbers bigint[],
    out attempts int[],
    out started_keys text[]
)
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    q constant notifyq.queue := take_turns.queue;
    turns text[] := array(select distinct k.key from unnest(take_turns.keys || take_turns.queued_keys) k (key));
    room int := take_turns.room;
    working jsonb := take_turns.at_work;
    open_keys text[];
    numbers_open int[];
    next_jobs bigint[];
    helping record;
    next_start_at timestamptz;
begin
    started_keys := '{}';
    while room > 0 and cardinality(turns) > 0 loop
        select array_agg(t.key),
            array_agg(greatest(least(
                greatest(room / cardinality(turns), 1),
                q.slots - coalesce(k.held, 0),
                case when q.key_rate_limit is not null
                    then notifyq.rate_room(k.starts, k.counts, q.key_rate_limit, q.key_rate_period, take_turns.moment) end,
                take_turns.key_limit - coalesce((working -> t.key)::int, 0)
            ), 0))
        into open_keys, numbers_open
        from unnest(turns) t (key)
        left join lateral (
            select o.* from notifyq.key o
            where o.queue = q.number
            and o.generation = (select notifyq.generation(q.number))
            and o.key = t.key
            offset 0
        ) k on true
        where k.head is null;
        next_jobs := (notifyq.next_blocked(q, open_keys, numbers_open, take_turns.low, take_turns.high))[1:room];
        with gone as (
            delete from notifyq.blocked b
            where b.job = any (next_jobs)
            returning b.*
        ), judged as materialized (
            select g.*, g.attempt = 0 and (j.expires_at <= take_turns.moment) is true as late
            from gone g
            join notifyq.job j on j.id = any (array[g.job])
        ), held as (
            insert into notifyq.key (queue, generation, key, held)
            select q.number, (select notifyq.generation(q.number)), g.key, count(*)
            from judged g
            where q.slots is not null
            and not g.late
            group by g.key
            order by g.key
            on conflict on constraint key_pkey do update set held = key.held + excluded.held
        )
        select coalesce(array_agg(g.job order by g.number), '{}') as jobs, array_agg(g.number order by g.number) as numbers,
            array_agg(g.attempt order by g.number) as attempts, coalesce(array_agg(g.key) filter (where not g.late), '{}') as keys
        into helping
        from judged g;
        exit when cardinality(helping.jobs) = 0;
        perform notifyq.count_starts(q, helping.keys, take_turns.moment);
        jobs := jobs || helping.jobs;
        numbers := numbers || helping.numbers;
        attempts := attempts || helping.attempts;
        started_keys := started_keys || helping.keys;
        room := room - cardinality(helping.keys);
        if take_turns.key_limit is not null then
            working := notifyq.add_keys(working, helping.keys);
        end if;
        turns := array(select distinct k.key from unnest(helping.keys) k (key));
    end loop;

    -- Not of a key that is full: its next one would only be blocked again, with a later place than those behind it.
    turns := array(
        select t.key
        from (select distinct u.key from unnest(take_turns.keys || take_turns.rated_keys) u (key)) t
        left join lateral (
            select o.* from notifyq.key o
            where o.queue = q.number
            and o.generation = (select notifyq.generation(q.number))
            and o.key = t.key
            offset 0
        ) k on true
        where q.slots is null
        or coalesce(k.held, 0) < q.slots
    );
    if q.key_rate_limit is null then
        perform notifyq.advance(q, turns);
        return;
    end if;
    perform notifyq.advance(q, array(
        select t.key
        from unnest(turns) t (key)
        left join lateral (
            select o.* from notifyq.key o
            where o.queue = q.number
            and o.generation = (select notifyq.generation(q.number))
            and o.key = t.key
            offset 0
        ) k on true
        where notifyq.rate_room(k.starts, k.counts, q.key_rate_limit, q.key_rate_period, take_turns.moment) > 0
    ));
    turns := array(
        select k.key
        from unnest(turns) t (key)
        cross join lateral (
            select o.* from notifyq.key o
            where o.queue = q.number
            and o.generation = (select notifyq.generation(q.number))
            and o.key = t.key
            offset 0
        ) k
        where not exists (
            -- What waits longer than that, for another attempt, say, is not what the others wait for.
            select from notifyq.scheduled s
            where s.job = k.turn
            and s.due_at <= notifyq.rate_next(k.starts, q.key_rate_period, take_turns.moment)
        )
        and notifyq.rate_room(k.starts, k.counts, q.key_rate_limit, q.key_rate_period, take_turns.moment) <= 0
    );
    next_jobs := notifyq.next_blocked(q, turns, array_fill(1, array[cardinality(turns)]));
    with gone as (
        delete from notifyq.blocked b
        where b.job = any (next_jobs)
        returning b.job, b.attempt, b.key
    ), rested as materialized (
        select g.*, notifyq.rate_next(k.starts, q.key_rate_period, take_turns.moment) as due_at
        from gone g
        cross join lateral (
            select o.starts from notifyq.key o
            where o.queue = q.number
            and o.generation = (select notifyq.generation(q.number))
            and o.key = g.key
            offset 0
        ) k
    ), turn as (
        insert into notifyq.key (queue, generation, key, turn)
        select q.number, (select notifyq.generation(q.number)), r.key, r.job
        from rested r
        on conflict on constraint key_pkey do update set turn = excluded.turn
    ), later as (
        insert into notifyq.scheduled (job, queue, attempt, due_at)
        select r.job, q.number, r.attempt, r.due_at
        from rested r
        returning due_at
    )
    select min(l.due_at) into next_start_at from later l;
    if next_start_at is not null then
        -- The trigger does not ring for who claims on the very session that stands free: it finds nobody else.
        perform pg_notify(notifyq.channel(q.number), 'd:' || extract(epoch from next_start_at));
    end if;
end
$$;

-- Locks the next blocked tickets of keys, up to numbers[i] of keys[i], and says which they are: key by key, in order.
-- Call with the gate locked, and under settings like advance()'s, which it does not make anew.
create or replace function notifyq.next_blocked(
    queue notifyq.queue,
    keys text[],
    numbers int[],
    low int default -32768,
    high int default 32767
) returns bigint[]
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    q constant notifyq.queue := next_blocked.queue;
    -- As generation() says, which costs more.
    generation_now constant int := (select g.generation from notifyq.gate g where g.queue = q.number order by g.generation desc limit 1);
    read bigint := pg_stat_get_xact_tuples_returned('notifyq.blocked_key'::regclass);
    jobs bigint[];
begin
    select array_agg(b.job order by k.place, b.priority desc, b.number) into jobs
    from unnest(next_blocked.keys, next_blocked.numbers) with ordinality k (key, number, place)
    cross join lateral (
        select o.*
        from (
            select * from (
                select b.job, b.priority, b.number
                from notifyq.blocked b
                where b.queue = q.number
                and b.generation = generation_now
                and b.key = k.key
                and b.parents = 0
                and b.priority between next_blocked.low and next_blocked.high
                order by b.priority desc, b.number
                limit k.number
                for update skip locked
            ) g
            union all
            -- Put there by sends, some of which may be under way.
            select * from (
                select b.job, b.priority, b.number
                from notifyq.blocked b
                where b.queue = q.number
                and b.generation is null
                and b.key = k.key
                and b.parents = 0
                and b.priority between next_blocked.low and next_blocked.high
                order by b.priority desc, b.number
                limit k.number
                for update skip locked
            ) s
        ) o
        order by o.priority desc, o.number
        limit k.number
    ) b;
    read := pg_stat_get_xact_tuples_returned('notifyq.blocked_key'::regclass) - read - coalesce(cardinality(jobs), 0);
    if read > 16 * cardinality(next_blocked.keys) then
        perform notifyq.renew_worn_keys(q, read, cardinality(next_blocked.keys));
    end if;
    return coalesce(jobs, '{}');
end
$$;

-- Moves the next blocked tickets of keys to ready, one for each time that the key is named; to the
-- end of the line where keys take turns, else to their places, which may be below somebody's floor.
create or replace function notifyq.advance(queue notifyq.queue, keys text[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    q constant notifyq.queue := advance.queue;
    next_jobs bigint[];
    moved notifyq.ready[];
begin
    if cardinality(advance.keys) = 0 then
        return;
    end if;
    select notifyq.next_blocked(q, array_agg(k.key order by k.key), array_agg(k.number order by k.key)) into next_jobs
    from (select u.key, count(*)::int as number from unnest(advance.keys) u (key) group by u.key) k;
    if next_jobs = '{}' then
        return;
    end if;
    with gone as (
        delete from notifyq.blocked b
        where b.job = any (next_jobs)
        returning b.job, b.number, b.attempt, b.priority
    ), back as (
        insert into notifyq.ready as t (queue, priority, number, job, attempt)
        select q.number, notifyq.line_priority(n.priority, q.ageing),
            case when q.fair then nextval('notifyq.job_id_seq') else n.number end, n.job, n.attempt
        from gone n
        order by n.number
        returning t as ticket
    )
    select array_agg(b.ticket) into moved from back b;
    if not q.fair then
        perform notifyq.ring_back(moved);
    end if;
end
$$;

-- Says to every runtime that a queue is worth a look from the beginning ('look'), or has room again ('room').
create or replace function notifyq.ring_look(queue notifyq.queue, what text default 'look') returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    select pg_notify(notifyq.channel((ring_look.queue).number), ring_look.what)
    where notifyq.somebody_may_come(ring_look.queue)
$$;

-- Frees what tickets that have just left active held, and lets the next ones of their keys go on.
-- how: 'ended' (completed, cancelled, deleted), 'failed', or 'again' (it waits for another attempt). An
-- ordered or stately key stays with the job that will run again, an ordered one also with one that failed.
create or replace function notifyq.free(tickets notifyq.active[], how text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    q notifyq.queue;
    ended notifyq.active[];
    keys text[];
    held int;
begin
    for q in
        select o.*
        from notifyq.queue o
        where o.number in (select t.queue from unnest(free.tickets) t where t.key is not null)
        and o.gated -- one that no longer is has nothing to free, and lock_gates() has passed it by
        order by o.number
    loop
        ended := array(select t from unnest(free.tickets) t where t.queue = q.number and t.key is not null);
        if q.policy = 'exclusive' and free.how <> 'again' then
            perform notifyq.unreserve(q.number, t.key, t.job) from (select * from unnest(ended) order by key) t;
        end if;
        held := (notifyq.lock_gate(q.number)).held;
        if q.active_limit is not null then
            update notifyq.gate o
            set held = greatest(o.held - cardinality(ended), 0)
            where o.queue = q.number
            and o.generation = (select notifyq.generation(q.number));
            if held >= q.active_limit then
                perform notifyq.ring_look(q, 'room');
            end if;
        end if;
        continue when q.slots is null
            or free.how = 'again' and q.policy in ('stately', 'ordered')
            or free.how = 'failed' and q.policy = 'ordered';
        keys := array(select t.key from unnest(ended) t order by t.key);
        perform notifyq.free_keys(q, keys);
    end loop;
end
$$;

-- Frees one slot of a key for each time that it is named, and lets the next ones go on. Call with the
-- gate locked.
create or replace function notifyq.free_keys(queue notifyq.queue, keys text[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    q constant notifyq.queue := free_keys.queue;
    -- As generation() says, which costs more.
    generation_now constant int := (select g.generation from notifyq.gate g where g.queue = q.number order by g.generation desc limit 1);
    read bigint := pg_stat_get_xact_tuples_returned('notifyq.key_pkey'::regclass);
    changed int;
begin
    insert into notifyq.key (queue, generation, key, held)
    select q.number, generation_now, u.key, -count(*)
    from unnest(free_keys.keys) u (key)
    group by u.key
    on conflict on constraint key_pkey do update set held = greatest(key.held + excluded.held, 0), head = null;
    get diagnostics changed = row_count;
    read := pg_stat_get_xact_tuples_returned('notifyq.key_pkey'::regclass) - read;
    delete from notifyq.key k
    where k.queue = q.number
    and k.generation = generation_now
    and k.key = any (free_keys.keys)
    and k.held <= 0
    and k.starts is null;
    perform notifyq.advance(q, free_keys.keys);
    if read > 16 * changed then
        perform notifyq.renew_worn_keys(q, read, changed);
    end if;
end
$$;

-- Renews the keys of a queue where that pays: looking up so many keys, each of which has one row, or what is blocked behind
-- each, has read so many entries of their index, but for those that were found. Call it if they are more than 16 a key: so many
-- there are only where dead rows may not go, since a snapshot is held open. Counted by the server itself; it never counts where
-- track_counts is off.
--
-- What was read for nothing since the last time grows with the square of this; it pays when that is more than the work of
-- moving all of them, however few are looked up at a time.
create or replace function notifyq.renew_worn_keys(queue notifyq.queue, read bigint, keys int) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    q constant notifyq.queue := renew_worn_keys.queue;
    effort constant float8 := renew_worn_keys.read::float8 ^ 2 / 100 / greatest(renew_worn_keys.keys, 1);
begin
    if effort > (select g.moved from notifyq.gate g where g.queue = q.number order by g.generation desc limit 1)
        -- In an old snapshot keys that are new could not be seen, and would stay behind.
        and current_setting('transaction_isolation') = 'read committed'
    then
        perform notifyq.renew_keys(q);
    end if;
end
$$;

-- Moves all keys of a queue, and what the gate has blocked behind them, to the next generation, where no look meets what is
-- dead of the one before. Call with the gate locked. Not where there are so many that everybody would wait for it; then it is
-- thought of again when it would pay for four times as many.
create or replace function notifyq.renew_keys(queue notifyq.queue) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    most constant int := 10000;
    q constant notifyq.queue := renew_keys.queue;
    generation_now constant int := notifyq.generation(q.number);
    number int := (
        select count(*)
        from (select from notifyq.key k where k.queue = q.number and k.generation = generation_now limit most + 1) k
    );
    number_blocked int := (
        select count(*)
        from (
            select from notifyq.blocked b
            where b.queue = q.number and b.generation = generation_now and b.parents = 0
            limit most + 1
        ) b
    );
    jobs bigint[];
begin
    if number + number_blocked > most then
        update notifyq.gate g
        set moved = least(greatest(g.moved, most) * 4, 1000000)
        where g.queue = q.number
        and g.generation = generation_now;
        return;
    end if;
    jobs := array(
        select b.job from notifyq.blocked b
        where b.queue = q.number and b.generation = generation_now and b.parents = 0
        for update skip locked
    );
    if cardinality(jobs) < number_blocked then
        -- Who has locked one of them, which may be done without the gate, may wait for the gate next.
        return;
    end if;
    update notifyq.blocked b
    set generation = b.generation + 1
    where b.job = any (jobs);
    update notifyq.key k
    set generation = k.generation + 1
    where k.queue = q.number
    and k.generation = generation_now;
    update notifyq.gate g
    set generation = g.generation + 1, moved = number + number_blocked
    where g.queue = q.number
    and g.generation = generation_now;
end
$$;

-- What a ticket leaves behind that goes from the line without having started: the next of its key
-- gets its place, and if it was the head of an ordered or stately key, the key is free. One that was
-- blocked had no place, and needs no gate: a flow's jobs may be cancelled from any other queue.
create or replace function notifyq.leave_line(jobs bigint[], were_blocked boolean default false) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    q notifyq.queue;
    left_keys text[];
    freed text[];
begin
    for q in
        select distinct o.*
        from notifyq.job j
        join notifyq.queue o on o.number = any (array[j.queue])
        where j.id = any (leave_line.jobs)
        and o.gated
        order by o.number
    loop
        perform notifyq.unreserve(q.number, coalesce(j.key, ''), j.id)
        from (select * from notifyq.job o where o.id = any (leave_line.jobs) and o.queue = q.number order by o.key) j;
        continue when leave_line.were_blocked;
        perform notifyq.lock_gate(q.number);
        select array_agg(coalesce(j.key, '')) filter (where k.head is distinct from j.id), array_agg(coalesce(j.key, '')) filter (where k.head = j.id)
        into left_keys, freed
        from notifyq.job j
        left join lateral (
            select o.* from notifyq.key o
            where o.queue = q.number
            and o.generation = (select notifyq.generation(q.number))
            and o.key = coalesce(j.key, '')
            offset 0
        ) k on true
        where j.id = any (leave_line.jobs)
        and j.queue = q.number;
        perform notifyq.free_keys(q, coalesce(freed, '{}'));
        perform notifyq.advance(q, coalesce(left_keys, '{}'));
    end loop;
end
$$;

-- Frees the keys of ordered queues whose failed head goes from the archive, to where it may.
create or replace function notifyq.release_heads(jobs bigint[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    held record;
begin
    for held in
        select q as queue, array_agg(k.key order by k.key) as keys
        from notifyq.key k
        join notifyq.queue q on q.number = any (array[k.queue])
        where k.head = any (release_heads.jobs)
        group by q.number, q.*
        order by q.number
    loop
        perform notifyq.lock_gate((held.queue).number);
        perform notifyq.free_keys(held.queue, held.keys);
    end loop;
end
$$;

-- Gives back a key that a policy reserved for a job.
create or replace function notifyq.unreserve(queue int, key text, job bigint) returns void
language sql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
    delete from notifyq.reserved r
    where r.queue = unreserve.queue
    and r.kind = 'p'
    and r.key = unreserve.key
    and r.slot = 0
    and r.job = unreserve.job
$$;

-- A short or stately key may have the next job wait once this one has started.
create or replace function notifyq.free_waiting_keys(queue int, jobs bigint[]) returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    select notifyq.unreserve(w.queue, w.key, w.job)
    from (
        select q.number as queue, coalesce(j.key, '') as key, j.id as job
        from notifyq.queue q
        join notifyq.job j on j.id = any (free_waiting_keys.jobs)
        where q.number = free_waiting_keys.queue
        and q.policy in ('short', 'stately')
        order by j.key
    ) w
$$;
