-- pause, resume_queue: whether jobs of a queue may start. Also which queues a runtime serves, since both
-- are told to runtimes in the same way: on the control channel at once, by the beat if that was lost.

-- Tells every runtime, once this transaction commits, to look which queues it serves and which are paused.
create or replace function notifyq.tell_queues() returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    select pg_notify(notifyq.channel(0), 'queues')
$$;

-- Pauses a queue: claim() gives none of its jobs until resume_queue(). What runs goes on, sends go on,
-- and what a runtime has claimed and not started it hands back. False: it was paused already.
-- Locks: the queue's row, which neither sends nor claims wait for.
create or replace function notifyq.pause(queue text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    q constant notifyq.queue := notifyq.queue_named(pause.queue);
begin
    update notifyq.queue p set paused = true where p.number = q.number and not p.paused;
    if not found then
        return false;
    end if;
    perform notifyq.tell_queues();
    return true;
end
$$;

-- Lets the jobs of a paused queue start again, at once. False: it was not paused. Locks: the queue's row.
create or replace function notifyq.resume_queue(queue text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    q constant notifyq.queue := notifyq.queue_named(resume_queue.queue);
begin
    update notifyq.queue p set paused = false where p.number = q.number and p.paused;
    if not found then
        return false;
    end if;
    perform notifyq.tell_queues();
    -- For a runtime that never heard of the pause: it looked in vain for what was sent meanwhile.
    perform pg_notify(notifyq.channel(q.number), 'look');
    return true;
end
$$;

-- The queues of these names, and those that match a pattern: a name in which * stands for any run of
-- characters, or none. A pattern leaves out the dead-letter queues of others, whose jobs would run again
-- as soon as they have failed for good: those are served by their names.
create or replace function notifyq.served(names text[]) returns setof notifyq.queue
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    return query
    select q.*
    from notifyq.queue q
    where q.name = any (served.names)
    union all
    select q.*
    from notifyq.queue q
    where q.name like any (
        select replace(replace(n.name, '_', '\_'), '*', '%')
        from unnest(served.names) n (name)
        where strpos(n.name, '*') > 0
    )
    and q.name <> all (served.names)
    and q.number not in (select d.dead_letter from notifyq.queue d where d.dead_letter is not null);
end
$$;
