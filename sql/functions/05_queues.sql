-- Queues: names, options, channels.

-- A duration in an options document: a number of seconds, or an interval's text. No pinned search_path, and
-- STABLE, as the cast is, so that it is inlined: of a keyed job in a bulk send it took 20 of 33 us.
create or replace function notifyq.duration(value jsonb) returns interval
language sql stable
as $$
    select case jsonb_typeof(duration.value)
        -- over any bound that its users have, yet within what every server version can hold
        when 'number' then make_interval(secs => greatest(-1e10, least(1e10, (duration.value #>> '{}')::float8)))
        else (duration.value #>> '{}')::interval
    end
$$;

-- The queue's row. Raises NQ001 when there is none.
create or replace function notifyq.queue_named(name text) returns notifyq.queue
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    found_queue notifyq.queue;
begin
    select q.* into found_queue
    from notifyq.queue q
    where q.name = queue_named.name;
    if not found then
        raise exception 'there is no queue named %', coalesce(quote_literal(queue_named.name), 'null')
        using errcode = 'NQ001', hint = 'Create it with create_queue(), or start a worker that declares it.';
    end if;
    return found_queue;
end
$$;

-- The notification channel of a queue; number 0 is the control channel and -1 announces
-- finished jobs. Channels hold at most 63 bytes and queue names may be longer.
-- No pinned search_path, so that it is inlined.
create or replace function notifyq.channel(number int) returns text
language sql immutable
as $$
    select 'nq_' || pg_catalog.left(pg_catalog.md5('notifyq'), 10) || '_' || channel.number::text
$$;

-- Refuses option names that a queue does not have. Raises NQ003.
create or replace function notifyq.check_options(options jsonb, allowed text[]) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    unknown text;
begin
    if jsonb_typeof(check_options.options) is distinct from 'object' then
        raise exception 'options must be a JSON object, not %', coalesce(jsonb_typeof(check_options.options), 'null')
        using errcode = 'NQ003';
    end if;
    select string_agg(k, ', ' order by k) into unknown
    from jsonb_object_keys(check_options.options) k
    where k <> all (check_options.allowed);
    if unknown is not null then
        raise exception 'unknown option: %', unknown
        using errcode = 'NQ003', hint = 'Options are: ' || array_to_string(check_options.allowed, ', ') || '.';
    end if;
end
$$;

create or replace function notifyq.queue_option_names() returns text[]
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select array['retry_limit', 'retry_delay', 'retry_delay_max', 'retry_backoff', 'timeout', 'priority',
        'retention', 'expire_in', 'dead_letter', 'max_data_bytes', 'bell', 'policy', 'key_limit', 'active_limit',
        'rate_limit', 'rate_period', 'key_rate_limit', 'key_rate_period', 'fair', 'ageing']
$$;

-- The row that a queue would be with these options set. Absent options keep their value.
-- Raises NQ001 (no such dead-letter queue) and NQ003 (a value that does not fit).
create or replace function notifyq.with_options(queue notifyq.queue, options jsonb) returns notifyq.queue
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    o jsonb := with_options.options;
    q notifyq.queue := with_options.queue;
    option text;
begin
    perform notifyq.check_options(o, notifyq.queue_option_names());
    for option in select jsonb_object_keys(o) loop
        begin
            case option
                when 'retry_limit' then q.retry_limit := (o ->> option)::int;
                when 'retry_delay' then q.retry_delay := notifyq.duration(o -> option);
                when 'retry_delay_max' then q.retry_delay_max := notifyq.duration(o -> option);
                when 'retry_backoff' then q.retry_backoff := (o ->> option)::boolean;
                when 'timeout' then q.timeout := notifyq.duration(o -> option);
                when 'priority' then q.priority := (o ->> option)::smallint;
                when 'retention' then q.retention := notifyq.duration(o -> option);
                when 'expire_in' then q.expire_in := notifyq.duration(o -> option);
                when 'max_data_bytes' then q.max_data_bytes := (o ->> option)::int;
                when 'bell' then q.bell := o ->> option;
                when 'policy' then q.policy := o ->> option;
                when 'key_limit' then q.key_limit := (o ->> option)::int;
                when 'active_limit' then q.active_limit := (o ->> option)::int;
                when 'rate_limit' then q.rate_limit := (o ->> option)::int;
                when 'rate_period' then q.rate_period := notifyq.duration(o -> option);
                when 'key_rate_limit' then q.key_rate_limit := (o ->> option)::int;
                when 'key_rate_period' then q.key_rate_period := notifyq.duration(o -> option);
                when 'fair' then q.fair := (o ->> option)::boolean;
                when 'ageing' then q.ageing := notifyq.duration(o -> option);
                else null;
            end case;
        exception when data_exception then
            raise exception 'option % of queue %: % is not a value for it', option, q.name, o -> option
            using errcode = 'NQ003', detail = sqlerrm;
        end;
    end loop;
    if o ? 'dead_letter' then
        q.dead_letter := case
            when o ->> 'dead_letter' is null then null
            else (notifyq.queue_named(o ->> 'dead_letter')).number
        end;
    end if;
    return q;
end
$$;

create or replace function notifyq.queue_name(number int) returns text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select q.name from notifyq.queue q where q.number = queue_name.number
$$;

-- Makes a queue. Returns 'created', 'exists' (with these options), or 'differs: ...', which
-- names the options that stand otherwise and changes nothing: update_queue() does.
create or replace function notifyq.create_queue(name text, options jsonb default '{}') returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    standing notifyq.queue;
    wanted notifyq.queue;
    differing text;
begin
    if create_queue.name is null or create_queue.name !~ '^[A-Za-z0-9_./-]{1,100}$' then
        raise exception 'not a queue name: %', coalesce(quote_literal(create_queue.name), 'null')
        using errcode = 'NQ002', hint = 'A queue name is 1 to 100 letters, digits and _ . - / characters.';
    end if;
    insert into notifyq.queue (name)
    select create_queue.name
    where not exists (select from notifyq.queue q where q.name = create_queue.name)
    on conflict do nothing
    returning * into standing;
    if found then
        perform notifyq.update_queue(create_queue.name, create_queue.options);
        perform notifyq.tell_queues();
        return 'created';
    end if;
    standing := notifyq.queue_named(create_queue.name);
    wanted := notifyq.with_options(standing, create_queue.options);
    select string_agg(format('%s is %s, not %s', s.key, coalesce(s.value, 'none'), coalesce(w.value, 'none')), '; ' order by s.key)
    into differing
    from jsonb_each_text(to_jsonb(standing) || jsonb_build_object('dead_letter', notifyq.queue_name(standing.dead_letter))) s
    join jsonb_each_text(to_jsonb(wanted) || jsonb_build_object('dead_letter', notifyq.queue_name(wanted.dead_letter))) w on w.key = s.key
    where s.value is distinct from w.value
    and not (
        s.key in ('retry_delay', 'retry_delay_max', 'timeout', 'retention', 'expire_in', 'rate_period', 'key_rate_period', 'ageing')
        and coalesce(s.value::interval = w.value::interval, false) -- 168 hours are 7 days
    );
    return coalesce('differs: ' || differing, 'exists');
end
$$;

-- Refuses (NQ003) rules that contradict each other, and a change of them that standing jobs forbid.
create or replace function notifyq.check_rules(standing notifyq.queue, wanted notifyq.queue) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    of constant text := 'queue ' || (check_rules.wanted).name || ': ';
    w constant notifyq.queue := check_rules.wanted;
    wrong record;
begin
    if w.policy not in ('standard', 'short', 'singleton', 'stately', 'exclusive', 'ordered') then
        raise exception '%', of || quote_literal(w.policy) || ' is not a policy' using errcode = 'NQ003',
            hint = 'Policies are standard, short, singleton, stately, exclusive and ordered.';
    end if;
    select l.name, l.value into wrong
    from (values ('key_limit', w.key_limit), ('active_limit', w.active_limit), ('rate_limit', w.rate_limit), ('key_rate_limit', w.key_rate_limit)) l (name, value)
    where l.value < 1
    limit 1;
    if found then
        raise exception '%', of || wrong.name || ' must be 1 or more, not ' || wrong.value
        using errcode = 'NQ003', hint = 'Leave it null for no limit, or pause the queue.';
    end if;
    if (w.rate_limit is null) <> (w.rate_period is null) or (w.key_rate_limit is null) <> (w.key_rate_period is null) then
        raise exception '%', of || 'a rate limit and its period go together' using errcode = 'NQ003',
            hint = 'rate_limit starts per rate_period, key_rate_limit starts of one key per key_rate_period.';
    end if;
    select p.name, p.value, p.shortest, p.longest into wrong
    from (
        values ('rate_period', w.rate_period, '10 milliseconds', '1 year'),
            ('key_rate_period', w.key_rate_period, '10 milliseconds', '1 year'),
            ('ageing', w.ageing, '1 millisecond', '1 day')
    ) p (name, value, shortest, longest)
    where p.value not between p.shortest::interval and p.longest::interval
    limit 1;
    if found then
        raise exception '%', of || format('%s must be from %s to %s, not %s', wrong.name, wrong.shortest, wrong.longest, wrong.value) using errcode = 'NQ003';
    end if;
    if w.key_limit is not null and w.policy in ('singleton', 'stately', 'ordered') then
        raise exception '%', of || 'policy ' || w.policy || ' is a key_limit of 1' using errcode = 'NQ003', hint = 'Give one of them.';
    end if;
    if w.fair and w.ageing is not null then
        raise exception '%', of || 'fair and ageing exclude each other' using errcode = 'NQ003';
    end if;
    if w.policy = 'ordered' and (w.fair or w.key_rate_limit is not null and w.ageing is not null) then
        raise exception '%', of || 'the policy ordered goes neither with fair nor with a key_rate_limit and ageing' using errcode = 'NQ003',
            hint = 'They give a job that waits another place in line, before or behind others of its key. Of an ordered key one job is active at a time as it is.';
    end if;
    if w.policy = 'ordered' and (check_rules.standing).policy <> 'ordered' and (
        exists (select from notifyq.schedule s where s.queue = w.number)
        or exists (select from notifyq.subscription s where s.queue = w.number)
    ) then
        raise exception '%', of || 'it has schedules or subscriptions, whose jobs have no key to be ordered by' using errcode = 'NQ003',
            hint = 'Remove them first: notifyq.unschedule(), notifyq.unsubscribe().';
    end if;
    select d.name into wrong
    from notifyq.queue d
    where d.policy = 'ordered'
    and d.number = w.dead_letter
    and w.dead_letter is distinct from (check_rules.standing).dead_letter;
    if found then
        raise exception '%', of || 'its dead_letter ' || wrong.name || ' is ordered by key, and dead letters have none' using errcode = 'NQ003',
            hint = 'Name another queue.';
    end if;
    select d.name into wrong from notifyq.queue d where d.dead_letter = w.number limit 1;
    if found and w.policy = 'ordered' and (check_rules.standing).policy <> 'ordered' then
        raise exception '%', of || 'it is the dead letter of ' || wrong.name || ', whose copies have no key to be ordered by' using errcode = 'NQ003',
            hint = 'Give that queue another dead_letter.';
    end if;
    if w.policy <> (check_rules.standing).policy and (
        exists (select from notifyq.ready t where t.queue = w.number)
        or exists (select from notifyq.scheduled t where t.queue = w.number)
        or exists (select from notifyq.blocked t where t.queue = w.number)
        or exists (select from notifyq.active t where t.queue = w.number)
    ) then
        raise exception '%', of || 'the policy is ' || (check_rules.standing).policy || ' while it has waiting or active jobs' using errcode = 'NQ003',
            hint = 'Change it when they have ended, or delete them: notifyq.delete_all().';
    end if;
end
$$;

-- Changes the options named; sends from then on inherit them. Limits hold at once for what starts
-- from now on; the policy can be changed while no job waits or is active (NQ003). When a queue without any
-- gets its first limit, a claim that is under way at that moment is not counted in it: claims of such queues lock no gate.
create or replace function notifyq.update_queue(name text, options jsonb) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    standing notifyq.queue;
    wanted notifyq.queue;
begin
    perform from notifyq.queue q where q.name = update_queue.name for update;
    standing := notifyq.queue_named(update_queue.name);
    wanted := notifyq.with_options(standing, update_queue.options);
    perform notifyq.check_rules(standing, wanted);
    update notifyq.queue q
    set (retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, priority,
            retention, expire_in, dead_letter, max_data_bytes, bell, policy, key_limit, active_limit,
            rate_limit, rate_period, key_rate_limit, key_rate_period, fair, ageing)
        = (wanted.retry_limit, wanted.retry_delay, wanted.retry_delay_max, wanted.retry_backoff, wanted.timeout, wanted.priority,
            wanted.retention, wanted.expire_in, wanted.dead_letter, wanted.max_data_bytes, wanted.bell, wanted.policy, wanted.key_limit, wanted.active_limit,
            wanted.rate_limit, wanted.rate_period, wanted.key_rate_limit, wanted.key_rate_period, wanted.fair, wanted.ageing)
    where q.name = update_queue.name;
    perform notifyq.apply_rules(standing);
    if update_queue.options ? 'dead_letter' or wanted.fair <> standing.fair
        or (notifyq.queue_named(update_queue.name)).gated <> standing.gated
    then
        -- Patterns do not serve dead-letter queues; a runtime has keys take turns itself, too, and waits for gates by itself.
        perform notifyq.tell_queues();
    end if;
exception when check_violation or not_null_violation then
    raise exception 'an option of queue % is out of its range: %', update_queue.name, update_queue.options
    using errcode = 'NQ003', detail = sqlerrm;
end
$$;

-- Gives the tickets of a queue new numbers, in the order in which they stand: ageing makes numbers of another kind.
create or replace function notifyq.line_up(queue notifyq.queue) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    q constant notifyq.queue := line_up.queue;
begin
    perform notifyq.lock_gate(q.number);
    -- What is active first: handed back, it comes before what has not been claimed.
    update notifyq.active a
    set number = n.number
    from (
        select o.job, notifyq.line_number(nextval('notifyq.job_id_seq'), j.priority, q.ageing) as number
        from (select * from notifyq.active t where t.queue = q.number order by t.number) o
        join notifyq.job j on j.id = o.job
    ) n
    where a.job = n.job;
    with gone as (
        delete from notifyq.ready r where r.queue = q.number returning r.*
    )
    insert into notifyq.ready (queue, priority, number, job, attempt)
    select g.queue, notifyq.line_priority(j.priority, q.ageing), notifyq.line_number(nextval('notifyq.job_id_seq'), j.priority, q.ageing), g.job, g.attempt
    from (select * from gone order by priority desc, number) g
    join notifyq.job j on j.id = g.job;
    update notifyq.blocked b
    set number = n.number, priority = case when b.parents > 0 then b.priority else notifyq.line_priority(n.priority, q.ageing) end
    from (
        select o.job, j.priority, notifyq.line_number(nextval('notifyq.job_id_seq'), j.priority, q.ageing) as number
        from (select * from notifyq.blocked t where t.queue = q.number order by t.priority desc, t.number) o
        join notifyq.job j on j.id = o.job
    ) n
    where b.job = n.job;
    perform pg_notify(notifyq.channel(q.number), 'look'); -- wherever somebody looked from
end
$$;

-- Lets standing jobs feel rules that have just changed: what is active counts, and what the new
-- rules let start goes on. Locks: the queue's gate.
create or replace function notifyq.apply_rules(standing notifyq.queue) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    q constant notifyq.queue := notifyq.queue_named((apply_rules.standing).name);
    was constant notifyq.queue := apply_rules.standing;
begin
    if q.ageing is distinct from was.ageing then
        perform notifyq.line_up(q);
    end if;
    if (q.policy, q.slots, q.active_limit, q.rate_limit, q.rate_period, q.key_rate_limit, q.key_rate_period, q.fair)
        is not distinct from (was.policy, was.slots, was.active_limit, was.rate_limit, was.rate_period, was.key_rate_limit, was.key_rate_period, was.fair)
    then
        return;
    end if;
    perform notifyq.lock_gate(q.number);
    if q.policy <> was.policy then
        -- Nothing waits or is active: what is left are failed heads, which another policy does not know, and
        -- keys that a sender reserved while the policy was changed before.
        delete from notifyq.key k where k.queue = q.number;
        delete from notifyq.reserved r where r.queue = q.number and r.kind = 'p';
    end if;
    if q.gated then
        update notifyq.active a
        set key = coalesce(j.key, '')
        from notifyq.job j
        where a.queue = q.number
        and j.id = a.job
        and a.key is null;
    end if;
    if (q.key_rate_limit, q.key_rate_period) is distinct from (was.key_rate_limit, was.key_rate_period) then
        -- What rests until the rate of its key lets it start is looked at again; the gate has it rest anew if it has to.
        -- One that is put off or waits for another attempt is due at a moment of its own.
        with gone as (
            delete from notifyq.scheduled s
            using notifyq.key k
            where k.queue = q.number
            and k.generation = (select notifyq.generation(q.number))
            and s.job = k.turn
            and s.due_at = notifyq.rate_next(k.starts, was.key_rate_period, clock_timestamp())
            returning s.job, s.attempt
        )
        insert into notifyq.ready (queue, priority, number, job, attempt)
        select q.number, notifyq.line_priority(j.priority, q.ageing),
            case when g.attempt = 0 and q.ageing is null then g.job else notifyq.line_number(nextval('notifyq.job_id_seq'), j.priority, q.ageing) end,
            g.job, g.attempt
        from gone g
        join notifyq.job j on j.id = g.job
        order by g.job;
        update notifyq.key k
        set turn = null
        where k.queue = q.number
        and k.generation = (select notifyq.generation(q.number))
        and k.turn is not null;
    end if;
    -- Counted anew: what was active before there was a gate, or while another limit held, counts. Starts
    -- that a rate has counted stay counted while its period is the same.
    delete from notifyq.key k
    where k.queue = q.number
    and k.generation = (select notifyq.generation(q.number))
    and k.head is null
    and (k.starts is null or q.key_rate_period is distinct from was.key_rate_period);
    update notifyq.key k
    set held = case when k.head is null then 0 else k.held end,
        starts = case when q.key_rate_period = was.key_rate_period then k.starts end,
        counts = case when q.key_rate_period = was.key_rate_period then k.counts end
    where k.queue = q.number
    and k.generation = (select notifyq.generation(q.number));
    insert into notifyq.key (queue, generation, key, held)
    select q.number, (select notifyq.generation(q.number)), a.key, count(*)
    from notifyq.active a
    where a.queue = q.number
    and a.key is not null
    and q.slots is not null
    group by a.key
    on conflict on constraint key_pkey do update set held = excluded.held;
    update notifyq.gate o
    set held = (select count(*) from notifyq.active a where a.queue = q.number), next_start_at = null,
        starts = case when q.rate_period = was.rate_period then o.starts end,
        counts = case when q.rate_period = was.rate_period then o.counts end
    where o.queue = q.number
    and o.generation = (select notifyq.generation(q.number));
    -- What is blocked by a key is looked at again, as much of it as could start: all where keys have no
    -- limit any more. The gate blocks anew what has to be.
    perform notifyq.advance(q, array(
        select k.key
        from (select b.key, count(*) as number from notifyq.blocked b where b.queue = q.number and b.parents = 0 group by b.key) k
        cross join lateral generate_series(1, least(k.number, q.slots, case when q.fair or q.key_rate_limit is not null then 1 end))
    ));
    perform pg_notify(notifyq.channel(q.number), 'look'); -- also what went back to its place
end
$$;

-- Deletes a queue and all its jobs; returns how many jobs went. Refused (NQ003) while
-- another queue names it as dead letter. Waits up to a second for transactions that have sent to
-- any queue and are still open (they have read the queue's row), then fails with 55P03.
create or replace function notifyq.delete_queue(name text) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '1s'
as $$
declare
    doomed notifyq.queue := notifyq.queue_named(delete_queue.name);
    users text;
    deleted bigint := 0;
begin
    select string_agg(q.name, ', ') into users
    from notifyq.queue q
    where q.dead_letter = doomed.number;
    if users is not null then
        raise exception 'queue % is the dead letter of: %', delete_queue.name, users
        using errcode = 'NQ003', hint = 'Give those queues another dead_letter first: notifyq.update_queue().';
    end if;
    -- The long part before the lock, but not with a gate: a claim that waits for it has read the queue's row.
    if not doomed.gated then
        deleted := notifyq.delete_all(delete_queue.name);
    end if;
    lock table notifyq.queue in access exclusive mode;
    deleted := deleted + notifyq.delete_all(delete_queue.name);
    delete from notifyq.reserved r where r.queue = doomed.number;
    delete from notifyq.key k where k.queue = doomed.number;
    delete from notifyq.gate g where g.queue = doomed.number;
    delete from notifyq.queue q where q.number = doomed.number;
    perform notifyq.tell_queues();
    return deleted;
end
$$;
