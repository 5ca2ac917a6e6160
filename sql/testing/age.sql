-- Not part of an installation: notifyq.testing runs this in a test's own database.

-- How many slots of this length begin while so much time passes.
create or replace function notifyq.slots_in(by interval, length numeric) returns bigint
language sql stable
as $$
    select (floor((extract(epoch from now())::numeric + extract(epoch from slots_in.by)::numeric) / slots_in.length)
        - floor(extract(epoch from now())::numeric / slots_in.length))::bigint
$$;

-- Lets time pass for every job, claim, lease, start that a rate counts and slot of a throttle or debounce,
-- by moving their times into the past.
create or replace function notifyq.age(by interval) returns void
language sql
as $$
    update notifyq.job set sent_at = sent_at - age.by, expires_at = expires_at - age.by;
    update notifyq.scheduled set due_at = due_at - age.by;
    update notifyq.active set claimed_at = claimed_at - age.by, deadline = deadline - age.by;
    update notifyq.runtime set beat_at = beat_at - age.by, lease_until = lease_until - age.by;
    update notifyq.attempt set failed_at = failed_at - age.by, claimed_at = claimed_at - age.by;
    update notifyq.schedule set next_at = next_at - age.by, changed_at = changed_at - age.by;
    update notifyq.archive
    set sent_at = sent_at - age.by, finished_at = finished_at - age.by, claimed_at = claimed_at - age.by,
        leaves_on = case when leaves_on < 'infinity' then (leaves_on - age.by)::date else leaves_on end;
    update notifyq.gate g
    set next_start_at = g.next_start_at - age.by,
        starts = array(select s - notifyq.slots_in(age.by, extract(epoch from q.rate_period)::numeric / 100) from unnest(g.starts) s order by s)
    from notifyq.queue q
    where q.number = g.queue
    and g.starts is not null;
    update notifyq.key k
    set starts = array(select s - notifyq.slots_in(age.by, extract(epoch from q.key_rate_period)::numeric / 100) from unnest(k.starts) s order by s)
    from notifyq.queue q
    where q.number = k.queue
    and k.starts is not null;
    -- Where ageing makes numbers of moments, see line_number().
    update notifyq.ready t
    set number = t.number - (extract(epoch from age.by) * 1000)::bigint * 1048576
    from notifyq.queue q
    where q.number = t.queue
    and q.ageing is not null;
    update notifyq.blocked t
    set number = t.number - (extract(epoch from age.by) * 1000)::bigint * 1048576
    from notifyq.queue q
    where q.number = t.queue
    and q.ageing is not null
    and t.parents = 0;
    update notifyq.active t
    set number = t.number - (extract(epoch from age.by) * 1000)::bigint * 1048576
    from notifyq.queue q
    where q.number = t.queue
    and q.ageing is not null;
    -- By way of numbers that are free, since no slot is so far away: one may not be two jobs' at any moment.
    update notifyq.reserved set slot = slot + 1000000000000000 where until is not null;
    update notifyq.reserved
    set slot = slot - 1000000000000000 - notifyq.slots_in(age.by, split_part(key, ':', 1)::numeric), until = until - age.by
    where until is not null;
$$;
