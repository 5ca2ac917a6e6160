-- The bell: the insert triggers on ready and scheduled, which NOTIFY the queue's channel.
--
-- Payload 'r:<priority>:<number>' says where to look in ready, 'd:<epoch seconds>' when a
-- ticket in scheduled is due; claim() sends 'look' when only expired jobs made it end short, free() 'room'
-- when one more may be active, and a runtime 't:<numbers>' for the tickets it took, so that not all of many look. All are
-- hints: losing one costs latency, never a job.
--
-- One ring per queue and transaction: what already rang is remembered in a
-- transaction-local setting, which ROLLBACK TO takes back together with the NOTIFY. Only a
-- higher priority or an earlier due time rings again, and where somebody stands far another priority, once.

-- The quiet bell. Commits with a NOTIFY wait for each other, so it is left out while nobody would come sooner for it: each
-- runtime that has run dry holds 'free' shared, until it has more to do than it can. Who has written a ticket takes
-- 'pending' shared, to the end of its transaction, and tests 'free' after that. A runtime that runs dry takes 'free',
-- tests 'pending' after that, and then looks once more: whoever was before it in that has committed, and that look sees
-- the ticket; whoever comes after it sees 'free', and rings. Locks are tried and never waited for; any doubt rings, or looks
-- again. A ticket that is visible but held by somebody else is a doubt, too: see claim()'s last row.
-- tests/unit/test_bell_model.py goes through all interleavings of this.

-- The advisory-lock class of one purpose; the key within it is the queue's bucket.
create or replace function notifyq.lock_class(purpose text) returns int
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select ('x' || left(md5('notifyq' || lock_class.purpose), 8))::bit(32)::int
$$;

-- Whether to ring, once the tickets are written. Taking 'pending' fails if a runtime is testing it at this moment,
-- testing 'free' also if another sender is. No pinned search_path, so that it is inlined.
create or replace function notifyq.somebody_may_come(queue notifyq.queue) returns boolean
language sql volatile
as $$
    select case
        when (somebody_may_come.queue).bell = 'never' then false
        when (somebody_may_come.queue).bell = 'always' then true
        when not pg_try_advisory_xact_lock_shared(notifyq.lock_class('pending'), (somebody_may_come.queue).number % 64) then true
        when pg_try_advisory_lock(notifyq.lock_class('free'), (somebody_may_come.queue).number % 64)
            then not pg_advisory_unlock(notifyq.lock_class('free'), (somebody_may_come.queue).number % 64)
        else true
    end
$$;

-- A runtime has run dry: holds 'free' for these queues on its session, where it does not hold it yet, and says for each
-- whether it stands free and nobody was pending after that. Then, in a new snapshot, whether anything is ready, and when
-- the next ticket is due, and what the time is, both in seconds of the epoch. due_floors: where looks are dear, tickets
-- that were due before that are left out, and ready is true without a look.
create or replace function notifyq.stand_free(queues int[], held boolean[], due_floors timestamptz[] default null)
returns table (queue int, stands boolean, passed boolean, ready boolean, due float8, clock float8)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    free constant int := notifyq.lock_class('free');
    pending constant int := notifyq.lock_class('pending');
    due_floor timestamptz;
begin
    for queue, stands, due_floor in select * from unnest(stand_free.queues, stand_free.held, stand_free.due_floors) loop
        stands := stands or pg_try_advisory_lock_shared(free, queue % 64);
        passed := stands and pg_try_advisory_lock(pending, queue % 64) and pg_advisory_unlock(pending, queue % 64);
        ready := due_floor is not null or exists (select from notifyq.ready t where t.queue = stand_free.queue);
        due := extract(epoch from notifyq.next_due(queue, coalesce(due_floor, '-infinity')));
        clock := extract(epoch from clock_timestamp());
        return next;
    end loop;
end
$$;

-- A runtime has more to do than it can, or stops: lets go of 'free' for these queues, once each.
create or replace function notifyq.stand_busy(queues int[]) returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    select pg_advisory_unlock_shared(notifyq.lock_class('free'), u.queue % 64) from unnest(stand_busy.queues) u (queue)
$$;

-- A runtime to which looks from the beginning of these queues are dear takes 'far' shared, on its session, or lets go of it,
-- and learns whether it has it. It claims from where it last found something, and others then ring for what may appear below
-- that: for what goes back to its place (ring_back()), and for all that is written in a transaction which began before the
-- statement, and may be committed late. (By a millisecond: the messages that make up a statement come one after the other.)
create or replace function notifyq.stand_far(queues int[], far boolean[]) returns table (queue int, stands boolean)
language sql
set search_path = pg_catalog, pg_temp
as $$
    select u.queue, case when u.far
        then pg_try_advisory_lock_shared(notifyq.lock_class('far'), u.queue % 64)
        else pg_advisory_unlock_shared(notifyq.lock_class('far'), u.queue % 64)
    end and u.far
    from unnest(stand_far.queues, stand_far.far) u (queue, far)
$$;

-- Whether to ring for what may appear there. Testing it fails if another one tests it at this moment: that rings, too.
create or replace function notifyq.somebody_stands_far(queue notifyq.queue) returns boolean
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    select case
        when (somebody_stands_far.queue).bell = 'never' then false
        when pg_try_advisory_lock(notifyq.lock_class('far'), (somebody_stands_far.queue).number % 64)
        then not pg_advisory_unlock(notifyq.lock_class('far'), (somebody_stands_far.queue).number % 64)
        else true
    end
$$;

-- Rings for tickets that went back to their places in line.
create or replace function notifyq.ring_back(back notifyq.ready[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if ring_back.back is null then
        return;
    end if;
    perform pg_notify(notifyq.channel(f.queue), 'r:' || f.priority || ':' || f.number)
    from (
        select b.queue, b.priority, min(b.number) as number
        from unnest(ring_back.back) b
        group by b.queue, b.priority
    ) f
    where exists (select from notifyq.queue q where q.number = f.queue and notifyq.somebody_stands_far(q));
end
$$;

-- Not SECURITY DEFINER: it runs as whoever may insert a ticket, which for a producer is send().
create or replace function notifyq.ring_ready() returns trigger
language plpgsql
as $$
declare
    rang text := coalesce(current_setting('notifyq.rang_ready', true), '');
    late constant boolean := statement_timestamp() - now() > interval '1 ms';
    ticket record;
    rung int;
begin
    -- Each query in here costs a single send as much as an index: the usual case, all tickets of
    -- one queue and priority, has two, and assignments are evaluated without one.
    select min(t.queue) as queue, max(t.queue) as last_queue, min(t.priority) as priority, max(t.priority) as highest, min(t.number) as number
    into ticket
    from inserted t;
    if rang = '' and ticket.queue = ticket.last_queue and ticket.priority = ticket.highest then
        if exists (
            select from notifyq.queue q
            where q.number = ticket.queue
            and (notifyq.somebody_may_come(q) or late and notifyq.somebody_stands_far(q))
        ) then
            rang := set_config('notifyq.rang_ready', '{"' || ticket.queue || '":' || ticket.priority || '}', true)
                || pg_notify(notifyq.channel(ticket.queue), 'r:' || ticket.priority || ':' || ticket.number);
        end if;
        return null;
    end if;
    for ticket in
        select t.queue, t.priority, min(t.number) as number
        from inserted t
        group by t.queue, t.priority
        order by t.queue, t.priority desc
    loop
        rang := coalesce(nullif(rang, ''), '{}');
        rung := rang::jsonb ->> ticket.queue::text;
        -- Who stands far has to be told of each priority.
        if rung > ticket.priority and late and not rang::jsonb ? (ticket.queue || ':' || ticket.priority) and exists (
            select from notifyq.queue q where q.number = ticket.queue and notifyq.somebody_stands_far(q)
        ) then
            rang := rang::jsonb || jsonb_build_object(ticket.queue || ':' || ticket.priority, ticket.priority);
        elsif coalesce(rung < ticket.priority, true) and exists (
            select from notifyq.queue q
            where q.number = ticket.queue
            and (notifyq.somebody_may_come(q) or late and notifyq.somebody_stands_far(q))
        ) then
            rang := rang::jsonb || jsonb_build_object(ticket.queue, ticket.priority);
        else
            continue;
        end if;
        perform set_config('notifyq.rang_ready', rang, true);
        perform pg_notify(notifyq.channel(ticket.queue), 'r:' || ticket.priority || ':' || ticket.number);
    end loop;
    return null;
end
$$;

create or replace function notifyq.ring_scheduled() returns trigger
language plpgsql
as $$
declare
    rang jsonb := coalesce(nullif(current_setting('notifyq.rang_scheduled', true), ''), '{}')::jsonb;
    late constant boolean := statement_timestamp() - now() > interval '1 ms';
    ticket record;
begin
    for ticket in
        select t.queue, extract(epoch from min(t.due_at)) as due
        from inserted t
        group by t.queue
        order by t.queue
    loop
        if coalesce((rang ->> ticket.queue::text)::numeric > ticket.due, true) and exists (
            select from notifyq.queue q
            where q.number = ticket.queue
            and (notifyq.somebody_may_come(q) or late and notifyq.somebody_stands_far(q))
        ) then
            rang := rang || jsonb_build_object(ticket.queue, ticket.due);
            perform set_config('notifyq.rang_scheduled', rang::text, true);
            perform pg_notify(notifyq.channel(ticket.queue), 'd:' || ticket.due);
        end if;
    end loop;
    return null;
end
$$;

-- Made only once: creating a trigger locks its table against every send and claim.
do $$
begin
    if not exists (select from pg_trigger t where t.tgrelid = 'notifyq.ready'::regclass and t.tgname = 'bell') then
        create trigger bell after insert on notifyq.ready
        referencing new table as inserted
        for each statement execute function notifyq.ring_ready();
    end if;
    if not exists (select from pg_trigger t where t.tgrelid = 'notifyq.scheduled'::regclass and t.tgname = 'bell') then
        create trigger bell after insert on notifyq.scheduled
        referencing new table as inserted
        for each statement execute function notifyq.ring_scheduled();
    end if;
end
$$;

-- Announces finished jobs on channel -1 to those who hold interest in their queue's results;
-- ids in chunks that fit a payload (under 8,000 bytes).
--
-- The settling transaction takes 'settling' shared before it tests 'interest'; a waiter takes
-- 'interest' shared before it tests 'settling': one of the two sees the other. No form blocks.
create or replace function notifyq.announce(queue int, jobs bigint[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    bucket int := announce.queue % 64;
    interest int := notifyq.lock_class('interest');
begin
    if pg_try_advisory_xact_lock_shared(notifyq.lock_class('settling'), bucket)
        and pg_try_advisory_lock(interest, bucket)
        and pg_advisory_unlock(interest, bucket)
    then
        return;
    end if;
    perform pg_notify(notifyq.channel(-1), string_agg(j.id::text, ',' order by j.ordinality))
    from unnest(announce.jobs) with ordinality j (id, ordinality)
    group by j.ordinality / 390;
end
$$;

-- Call while holding 'interest': true once no settle that may have missed it is under way.
create or replace function notifyq.no_settle_under_way(queue int) returns boolean
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    select case
        when pg_try_advisory_lock(notifyq.lock_class('settling'), no_settle_under_way.queue % 64)
        then pg_advisory_unlock(notifyq.lock_class('settling'), no_settle_under_way.queue % 64)
        else false
    end
$$;

-- Holds interest in the results of a queue until the session ends or lets go.
create or replace function notifyq.hold_interest(queue int) returns boolean
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    select pg_try_advisory_lock_shared(notifyq.lock_class('interest'), hold_interest.queue % 64)
$$;

create or replace function notifyq.drop_interest(queue int) returns boolean
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    select pg_advisory_unlock_shared(notifyq.lock_class('interest'), drop_interest.queue % 64)
$$;
