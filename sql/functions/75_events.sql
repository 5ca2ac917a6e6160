-- Events: one publish makes a job in every queue that subscribed to it.

-- Refuses what is no name of an event. Raises NQ003.
create or replace function notifyq.check_event(event text) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if (check_event.event ~ '^[A-Za-z0-9_./-]{1,100}$') is not true then
        raise exception 'not a name of an event: %', coalesce(quote_literal(check_event.event), 'null')
        using errcode = 'NQ003', hint = 'A name is 1 to 100 letters, digits and _ . - / characters.';
    end if;
end
$$;

-- Lets a queue get a job for each publish of an event from now on; true if it did not already.
-- Raises NQ001 and NQ003.
create or replace function notifyq.subscribe(event text, queue text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    q notifyq.queue;
begin
    perform notifyq.check_event(subscribe.event);
    perform from notifyq.queue o where o.name = subscribe.queue for share; -- against a change of its policy
    q := notifyq.queue_named(subscribe.queue);
    if q.policy = 'ordered' then
        raise exception 'queue % is ordered by key, and the jobs of an event have none', q.name
        using errcode = 'NQ003', hint = 'Subscribe another queue, whose worker sends to this one with a key.';
    end if;
    insert into notifyq.subscription (event, queue)
    values (subscribe.event, q.number)
    on conflict do nothing;
    return found;
end
$$;

-- Ends that; true if there was such a subscription. Raises NQ001 and NQ003.
create or replace function notifyq.unsubscribe(event text, queue text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform notifyq.check_event(unsubscribe.event);
    delete from notifyq.subscription s
    where s.event = unsubscribe.event
    and s.queue = (notifyq.queue_named(unsubscribe.queue)).number;
    return found;
end
$$;

-- Sends a job to every queue that subscribed to an event, each with its queue's defaults and the event's
-- name in its headers; returns them in the order of the queues' names. All or nothing. A repeated id_key makes no
-- second job in a queue that has the first. Raises NQ003, also when nobody subscribed.
--
-- SECURITY DEFINER, as send(). Locks: as try_send(), queue by queue, in the order of their names.
create or replace function notifyq.publish(
    event text,
    data jsonb default null,
    headers jsonb default null,
    id_key text default null
) returns table (queue text, id bigint, created boolean)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    labelled jsonb := coalesce(publish.headers, '{}') || jsonb_build_object('event', publish.event);
begin
    perform notifyq.check_event(publish.event);
    perform notifyq.headers_fit(publish.headers);
    return query
    select s.queue, t.id, t.created
    from (
        select q.name as queue
        from notifyq.subscription p
        join notifyq.queue q on q.number = p.queue
        where p.event = publish.event
        order by q.name
        offset 0 -- the order in which they are sent
    ) s
    cross join lateral notifyq.try_send(s.queue, publish.data, headers => labelled, id_key => publish.id_key) t;
    if not found then
        raise exception 'nobody has subscribed to event %', quote_literal(publish.event)
        using errcode = 'NQ003', hint = 'Subscribe a queue first: subscribe(event, queue).';
    end if;
end
$$;
