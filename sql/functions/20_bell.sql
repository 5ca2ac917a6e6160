-- The bell: the insert triggers on ready and scheduled, which NOTIFY the queue's channel.
--
-- Payload 'r:<priority>:<number>' says where to look in ready, 'd:<epoch seconds>' when a
-- ticket in scheduled is due; claim() sends 'look' when only expired jobs made it end short. All are
-- hints: losing one costs latency, never a job.
--
-- One ring per queue and transaction: what already rang is remembered in a
-- transaction-local setting, which ROLLBACK TO takes back together with the NOTIFY. Only a
-- higher priority or an earlier due time rings again.

-- Whether to ring. 'always' until the quiet bell takes its place here.
-- No pinned search_path, so that it is inlined.
create or replace function notifyq.somebody_may_come(queue notifyq.queue) returns boolean
language sql immutable
as $$
    select (somebody_may_come.queue).bell <> 'never'
$$;

-- Not SECURITY DEFINER: it runs as whoever may insert a ticket, which for a producer is send().
create or replace function notifyq.ring_ready() returns trigger
language plpgsql
as $$
declare
    rang text := coalesce(current_setting('notifyq.rang_ready', true), '');
    ticket record;
begin
    -- Each query in here costs a single send as much as an index: the usual case, all tickets of
    -- one queue and priority, has two, and assignments are evaluated without one.
    select min(t.queue) as queue, max(t.queue) as last_queue, min(t.priority) as priority, max(t.priority) as highest, min(t.number) as number
    into ticket
    from inserted t;
    if rang = '' and ticket.queue = ticket.last_queue and ticket.priority = ticket.highest then
        if exists (select from notifyq.queue q where q.number = ticket.queue and notifyq.somebody_may_come(q)) then
            rang := set_config('notifyq.rang_ready', '{"' || ticket.queue || '":' || ticket.priority || '}', true)
                || pg_notify(notifyq.channel(ticket.queue), 'r:' || ticket.priority || ':' || ticket.number);
        end if;
        return null;
    end if;
    for ticket in
        select q.number as queue, t.priority, min(t.number) as number
        from inserted t
        join notifyq.queue q on q.number = t.queue
        where notifyq.somebody_may_come(q)
        group by q.number, t.priority
        order by q.number, t.priority desc
    loop
        if coalesce((nullif(rang, '')::jsonb ->> ticket.queue::text)::int < ticket.priority, true) then
            rang := set_config('notifyq.rang_ready',
                (coalesce(nullif(rang, ''), '{}')::jsonb || jsonb_build_object(ticket.queue, ticket.priority))::text, true);
            perform pg_notify(notifyq.channel(ticket.queue), 'r:' || ticket.priority || ':' || ticket.number);
        end if;
    end loop;
    return null;
end
$$;

create or replace function notifyq.ring_scheduled() returns trigger
language plpgsql
as $$
declare
    rang jsonb := coalesce(nullif(current_setting('notifyq.rang_scheduled', true), ''), '{}')::jsonb;
    ticket record;
begin
    for ticket in
        select q.number as queue, extract(epoch from min(t.due_at)) as due
        from inserted t
        join notifyq.queue q on q.number = t.queue
        where notifyq.somebody_may_come(q)
        group by q.number
    loop
        if coalesce((rang ->> ticket.queue::text)::numeric > ticket.due, true) then
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

-- The advisory-lock class of one purpose; the key within it is the queue's bucket.
create or replace function notifyq.lock_class(purpose text) returns int
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select ('x' || left(md5('notifyq' || lock_class.purpose), 8))::bit(32)::int
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
