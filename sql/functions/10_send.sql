-- send: insert the job and its ticket; inserting the ticket rings the bell.
--
-- SECURITY DEFINER: a producer needs EXECUTE and nothing else. Locks: the id_keys' rows, by key;
-- what is reserved for a policy, a throttle or a debounce.

-- True, or NQ004: data is larger than its queue takes.
create or replace function notifyq.data_fits(data jsonb, queue notifyq.queue) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    size int := octet_length(data_fits.data::text);
begin
    if size > (data_fits.queue).max_data_bytes then
        raise exception 'data of % bytes is over the limit of % bytes of queue %', size, (data_fits.queue).max_data_bytes, (data_fits.queue).name
        using errcode = 'NQ004', hint = 'Store large data elsewhere and send a reference, or raise the queue''s max_data_bytes.';
    end if;
    return true;
end
$$;

-- The number, or NQ003: nothing can be done a negative number of times. Null: no limit.
create or replace function notifyq.how_many_fits(how_many int) returns int
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if how_many_fits.how_many < 0 then
        raise exception 'how_many must not be negative, and is %', how_many_fits.how_many using errcode = 'NQ003';
    end if;
    return how_many_fits.how_many;
end
$$;

-- Refuses (NQ003) a time from now that is negative, null or over 100 years: it could not be added to a moment, or would never come.
create or replace function notifyq.refuse_time(option text, value interval) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception '% must be from 0 to 100 years, not %', refuse_time.option, coalesce(refuse_time.value::text, 'null')
    using errcode = 'NQ003';
end
$$;

-- True, or NQ003: an option of one job is out of its range. Times are bounded (100 years), since
-- one that overflowed later would hold up every claim of its queue.
create or replace function notifyq.options_fit(
    priority int,
    delay interval,
    due_at timestamptz,
    retry_limit int,
    retry_delay interval,
    retry_delay_max interval,
    timeout interval,
    expire_in interval
) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    longest constant interval := '100 years';
begin
    if options_fit.delay is not null and options_fit.due_at is not null then
        raise exception 'delay and due_at exclude each other' using errcode = 'NQ003', hint = 'Give one of them.';
    end if;
    if options_fit.priority not between -32768 and 32767 then
        raise exception 'priority % is not between -32768 and 32767', options_fit.priority using errcode = 'NQ003';
    end if;
    if options_fit.retry_limit not between 0 and 1000 then
        raise exception 'retry_limit % is not between 0 and 1000', options_fit.retry_limit using errcode = 'NQ003';
    end if;
    if least(options_fit.retry_delay, options_fit.retry_delay_max) < '0' or least(options_fit.timeout, options_fit.expire_in) <= '0' then
        raise exception 'retry_delay and retry_delay_max must not be negative, timeout and expire_in must be above zero' using errcode = 'NQ003';
    end if;
    if greatest(options_fit.delay, options_fit.retry_delay, options_fit.retry_delay_max, options_fit.timeout, options_fit.expire_in) > longest
        or options_fit.due_at > now() + longest
        or options_fit.delay < - longest
    then
        raise exception 'delay, due_at, retry_delay, retry_delay_max, timeout and expire_in must not be over 100 years, nor delay below -100 years'
        using errcode = 'NQ003';
    end if;
    return true;
end
$$;

-- True, or NQ003: a key is longer than an index may safely hold.
create or replace function notifyq.key_fits(key text, option text) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if octet_length(key_fits.key) > 1000 then
        raise exception '% of % bytes is over the limit of 1000', key_fits.option, octet_length(key_fits.key)
        using errcode = 'NQ003', hint = 'Use a hash of it.';
    end if;
    return true;
end
$$;

-- True, or NQ003: throttle, debounce and key do not go together, or with this queue.
create or replace function notifyq.key_options_fit(queue notifyq.queue, key text, throttle interval, debounce interval, is_delayed boolean) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    perform notifyq.key_fits(key_options_fit.key, 'key');
    if (key_options_fit.queue).policy = 'ordered' and key_options_fit.key is null then
        raise exception 'queue % is ordered by key, and this job has none', (key_options_fit.queue).name
        using errcode = 'NQ003', hint = 'Send it with key => ''...'': jobs with the same key run one after the other.';
    end if;
    if num_nonnulls(key_options_fit.throttle, key_options_fit.debounce) = 2 then
        raise exception 'throttle and debounce exclude each other' using errcode = 'NQ003', hint = 'Give one of them.';
    end if;
    if key_options_fit.debounce is not null and key_options_fit.is_delayed then
        raise exception 'debounce and a delay exclude each other' using errcode = 'NQ003', hint = 'A debounced job starts at once or with the next slot.';
    end if;
    if least(key_options_fit.throttle, key_options_fit.debounce) < '1 millisecond'
        or greatest(key_options_fit.throttle, key_options_fit.debounce) > '1 year'
    then
        raise exception 'throttle and debounce must be from 1 millisecond to a year, not %', coalesce(key_options_fit.throttle, key_options_fit.debounce)
        using errcode = 'NQ003';
    end if;
    return true;
end
$$;

-- True, or NQ003: headers are read as an object.
create or replace function notifyq.headers_fit(headers jsonb) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if jsonb_typeof(headers_fit.headers) <> 'object' then
        raise exception 'headers must be a JSON object, not %', jsonb_typeof(headers_fit.headers) using errcode = 'NQ003';
    end if;
    return true;
end
$$;

-- Reserves something for a job, once; returns the job that has it, which is this one if it was free.
create or replace function notifyq.reserve(
    queue int, kind "char", key text, slot bigint, job bigint, until timestamptz default null, debounce float8 default null
) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    standing bigint;
begin
    loop
        insert into notifyq.reserved (queue, kind, key, slot, job, until, debounce)
        values (reserve.queue, reserve.kind, reserve.key, reserve.slot, reserve.job, reserve.until, reserve.debounce)
        on conflict do nothing;
        if found then
            return reserve.job;
        end if;
        select r.job into standing
        from notifyq.reserved r
        where r.queue = reserve.queue
        and r.kind = reserve.kind
        and r.key = reserve.key
        and r.slot = reserve.slot;
        if found then
            return standing;
        end if;
    end loop;
end
$$;

-- What a debounced send does that a policy refuses: the job that has its key, debounced as long, gets its data while
-- it waits, and keeps its time. Returns the job that has the key then: this one if that one has just started, or gone.
create or replace function notifyq.debounce_standing(
    queue notifyq.queue, job bigint, standing bigint, key text, data jsonb, debounce interval
) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    q constant notifyq.queue := debounce_standing.queue;
    period constant float8 := extract(epoch from debounce_standing.debounce);
    refused_by bigint := debounce_standing.standing;
    has_key bigint;
begin
    loop
        perform from notifyq.reserved r
        where r.queue = q.number
        and r.kind = 'p'
        and r.key = coalesce(debounce_standing.key, '')
        and r.slot = 0
        and r.job = refused_by
        and r.debounce = period;
        if found and notifyq.edit(refused_by, coalesce(debounce_standing.data, 'null'), null, null, null) then
            return refused_by;
        end if;
        has_key := notifyq.reserve(q.number, 'p', coalesce(debounce_standing.key, ''), 0, debounce_standing.job, debounce => period);
        if has_key in (debounce_standing.job, refused_by) then
            return has_key;
        end if;
        refused_by := has_key;
    end loop;
end
$$;

-- Where a ticket stands in line. With ageing the line has one priority, and a number made of the
-- moment, earlier by one step of ageing for each step of priority: waiting so long then makes up
-- for one. The low bits keep numbers of one millisecond apart.
-- No pinned search_path, so that they are inlined.
create or replace function notifyq.line_priority(priority smallint, ageing interval) returns smallint
language sql immutable
as $$
    select case when line_priority.ageing is null then line_priority.priority else 0::smallint end
$$;

create or replace function notifyq.line_number(number bigint, priority smallint, ageing interval) returns bigint
language sql volatile
as $$
    select case
        when line_number.ageing is null then line_number.number
        else ((extract(epoch from clock_timestamp()) - line_number.priority * extract(epoch from line_number.ageing)) * 1000)::bigint * 1048576
            + line_number.number % 1048576
    end
$$;

-- Sends one job and says whether it was made: a repeated id_key, a key that the queue's policy has
-- taken, and a throttled or debounced one make none and return the standing job's id. Options left
-- null are inherited from the queue.
create or replace function notifyq.try_send(
    queue text,
    data jsonb default null,
    priority int default null,
    delay interval default null,
    due_at timestamptz default null,
    retry_limit int default null,
    retry_delay interval default null,
    retry_delay_max interval default null,
    retry_backoff boolean default null,
    timeout interval default null,
    expire_in interval default null,
    headers jsonb default null,
    id_key text default null,
    key text default null,
    throttle interval default null,
    debounce interval default null,
    out id bigint,
    out created boolean
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    -- Data and nothing else, the usual case, in one query: every query and every expression is paid for
    -- by each send. What this does not send is left to what follows, which says why.
    if num_nonnulls(try_send.priority, try_send.delay, try_send.due_at, try_send.retry_limit, try_send.retry_delay, try_send.retry_delay_max,
        try_send.retry_backoff, try_send.timeout, try_send.expire_in, try_send.headers, try_send.id_key, try_send.key, try_send.throttle, try_send.debounce) = 0
    then
        with job as (
            insert into notifyq.job (queue, data, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at)
            select s.number, try_send.data, s.priority, s.retry_limit, s.retry_delay, s.retry_delay_max, s.retry_backoff, s.timeout, now() + s.expire_in
            from notifyq.queue s
            where s.name = try_send.queue
            and s.plain
            and (octet_length(try_send.data::text) > s.max_data_bytes) is not true
            returning id, queue, priority
        )
        insert into notifyq.ready (queue, priority, number, job)
        select job.queue, job.priority, job.id, job.id
        from job
        returning job, true into try_send.id, try_send.created;
        if found then
            return;
        end if;
    end if;
    select s.id, s.created into try_send.id, try_send.created
    from notifyq.send_one(notifyq.queue_named(try_send.queue), try_send.data, try_send.priority, try_send.delay, try_send.due_at,
        try_send.retry_limit, try_send.retry_delay, try_send.retry_delay_max, try_send.retry_backoff, try_send.timeout, try_send.expire_in,
        try_send.headers, try_send.id_key, try_send.key, try_send.throttle, try_send.debounce) s;
end
$$;

-- Sends one job with options, see try_send(). parents: it is blocked until so many have ended.
create or replace function notifyq.send_one(
    queue notifyq.queue,
    data jsonb,
    priority int,
    delay interval,
    due_at timestamptz,
    retry_limit int,
    retry_delay interval,
    retry_delay_max interval,
    retry_backoff boolean,
    timeout interval,
    expire_in interval,
    headers jsonb,
    id_key text,
    key text,
    throttle interval,
    debounce interval,
    flow bigint default null,
    parents int default 0,
    on_failure text default 'cancel',
    number bigint default nextval('notifyq.job_id_seq'),
    out id bigint,
    out created boolean
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    q constant notifyq.queue := send_one.queue;
    due timestamptz;
    rank smallint;
    standing bigint;
    period float8;
    slot bigint;
    next_slot bigint;
    slot_key text;
begin
    if num_nonnulls(send_one.priority, send_one.delay, send_one.due_at, send_one.retry_limit, send_one.retry_delay, send_one.retry_delay_max,
        send_one.timeout, send_one.expire_in) > 0
    then
        perform notifyq.options_fit(send_one.priority, send_one.delay, send_one.due_at, send_one.retry_limit, send_one.retry_delay,
            send_one.retry_delay_max, send_one.timeout, send_one.expire_in);
        due := coalesce(send_one.due_at, clock_timestamp() + send_one.delay);
    end if;
    if send_one.headers is not null then
        perform notifyq.headers_fit(send_one.headers);
    end if;
    if octet_length(send_one.data::text) > q.max_data_bytes then
        perform notifyq.data_fits(send_one.data, q);
    end if;
    if q.policy = 'ordered' or num_nonnulls(send_one.key, send_one.throttle, send_one.debounce) > 0 then
        perform notifyq.key_options_fit(q, send_one.key, send_one.throttle, send_one.debounce, due is not null);
    end if;

    if q.gated and send_one.debounce is not null then
        perform notifyq.lock_gate(q.number); -- it may be an edit
    end if;
    send_one.id := send_one.number;
    send_one.created := true;
    if send_one.id_key is not null then
        perform notifyq.key_fits(send_one.id_key, 'id_key');
        loop
            insert into notifyq.id_key (queue, key, job)
            values (q.number, send_one.id_key, send_one.id)
            on conflict do nothing;
            exit when found;
            select k.job, false into send_one.id, send_one.created
            from notifyq.id_key k
            where k.queue = q.number
            and k.key = send_one.id_key;
            if found then
                return;
            end if;
            send_one.id := nextval('notifyq.job_id_seq');
        end loop;
    end if;
    if q.policy in ('short', 'stately', 'exclusive') then
        standing := notifyq.reserve(q.number, 'p', coalesce(send_one.key, ''), 0, send_one.id, debounce => extract(epoch from send_one.debounce)::float8);
        if send_one.debounce is not null and standing <> send_one.id then
            standing := notifyq.debounce_standing(q, send_one.id, standing, send_one.key, send_one.data, send_one.debounce);
        end if;
    end if;
    if coalesce(standing = send_one.id, true) and num_nonnulls(send_one.throttle, send_one.debounce) > 0 then
        period := extract(epoch from coalesce(send_one.throttle, send_one.debounce));
        slot_key := period || ':' || coalesce(send_one.key, '');
        loop
            slot := floor(extract(epoch from clock_timestamp()) / period);
            standing := notifyq.reserve(q.number, (case when send_one.throttle is null then 'd' else 't' end)::"char", slot_key, slot, send_one.id, to_timestamp((slot + 1) * period));
            exit when standing = send_one.id or send_one.debounce is null;
            next_slot := slot + 1;
            standing := notifyq.reserve(q.number, 'd', slot_key, next_slot, send_one.id, to_timestamp((next_slot + 1) * period));
            if standing <> send_one.id then
                exit when notifyq.edit(standing, coalesce(send_one.data, 'null'), null, null, null);
                -- It does not wait any more: it was cancelled, or pulled to now, and this job takes its slot; or the
                -- slot has begun meanwhile, and there is another next one.
                update notifyq.reserved r
                set job = send_one.id
                where r.queue = q.number
                and r.kind = 'd'
                and r.key = slot_key
                and r.slot = next_slot
                and r.job = standing
                and to_timestamp(next_slot * period) > clock_timestamp();
                continue when not found;
                standing := send_one.id;
            end if;
            due := to_timestamp(next_slot * period);
            exit;
        end loop;
    end if;
    if standing <> send_one.id then
        delete from notifyq.id_key k where k.queue = q.number and k.key = send_one.id_key and k.job = send_one.id;
        delete from notifyq.reserved r
        where r.queue = q.number and r.kind = 'p' and r.key = coalesce(send_one.key, '') and r.slot = 0 and r.job = send_one.id;
        send_one.id := standing;
        send_one.created := false;
        return;
    end if;

    rank := coalesce(send_one.priority::smallint, q.priority);
    insert into notifyq.job (id, queue, data, headers, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at, id_key, key, flow)
    values (
        send_one.id, q.number, send_one.data, send_one.headers, rank,
        coalesce(send_one.retry_limit, q.retry_limit),
        coalesce(send_one.retry_delay, q.retry_delay),
        coalesce(send_one.retry_delay_max, q.retry_delay_max),
        coalesce(send_one.retry_backoff, q.retry_backoff),
        coalesce(send_one.timeout, q.timeout),
        greatest(due, now()) + coalesce(send_one.expire_in, q.expire_in),
        send_one.id_key, send_one.key, send_one.flow
    );
    if send_one.parents > 0 then
        insert into notifyq.blocked (job, number, due_at, queue, parents, priority, key, on_failure)
        values (send_one.id, send_one.id, due, q.number, send_one.parents, rank, coalesce(send_one.key, ''), send_one.on_failure);
    elsif due > clock_timestamp() then
        insert into notifyq.scheduled (job, queue, due_at)
        values (send_one.id, q.number, due);
    else
        insert into notifyq.ready (queue, priority, number, job, turn)
        values (q.number, notifyq.line_priority(rank, q.ageing), notifyq.line_number(send_one.id, rank, q.ageing), send_one.id,
            case when q.fair then coalesce(send_one.key, '') end);
    end if;
end
$$;

-- Sends one job and returns its id, or where try_send() makes none, the standing job's.
create or replace function notifyq.send(
    queue text,
    data jsonb default null,
    priority int default null,
    delay interval default null,
    due_at timestamptz default null,
    retry_limit int default null,
    retry_delay interval default null,
    retry_delay_max interval default null,
    retry_backoff boolean default null,
    timeout interval default null,
    expire_in interval default null,
    headers jsonb default null,
    id_key text default null,
    key text default null,
    throttle interval default null,
    debounce interval default null
) returns bigint
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    select s.id
    from notifyq.try_send(send.queue, send.data, send.priority, send.delay, send.due_at, send.retry_limit, send.retry_delay,
        send.retry_delay_max, send.retry_backoff, send.timeout, send.expire_in, send.headers, send.id_key, send.key, send.throttle, send.debounce) s
$$;

-- Sends many jobs with one statement: jobs is a JSON array of objects whose keys are send's
-- arguments but the queue. Returns (id, created) in the array's order; what repeats an id_key or a key
-- that must not is folded. All or nothing.
create or replace function notifyq.send_many(queue text, jobs jsonb)
returns table (id bigint, created boolean)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    q notifyq.queue := notifyq.queue_named(send_many.queue);
    allowed constant text[] := array['data', 'priority', 'delay', 'due_at', 'retry_limit', 'retry_delay',
        'retry_delay_max', 'retry_backoff', 'timeout', 'expire_in', 'headers', 'id_key', 'key', 'throttle', 'debounce'];
    entry jsonb;
begin
    if jsonb_typeof(send_many.jobs) is distinct from 'array' then
        raise exception 'jobs must be a JSON array of objects, not %', coalesce(jsonb_typeof(send_many.jobs), 'null') using errcode = 'NQ003';
    end if;
    -- Data and nothing else, seen with one look at each entry: one insert each for jobs and tickets.
    if q.plain and not exists (
        select from jsonb_array_elements(send_many.jobs) e where jsonb_typeof(e.value) <> 'object' or e.value - 'data' <> '{}'
    ) then
        return query
        with job as (
            insert into notifyq.job (queue, data, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at)
            select q.number, nullif(e.value -> 'data', 'null'), q.priority, q.retry_limit, q.retry_delay, q.retry_delay_max, q.retry_backoff, q.timeout, now() + q.expire_in
            from jsonb_array_elements(send_many.jobs) with ordinality e
            where (octet_length((e.value -> 'data')::text) > q.max_data_bytes) is not true or notifyq.data_fits(e.value -> 'data', q)
            order by e.ordinality
            returning id
        ), ticket as (
            insert into notifyq.ready (queue, priority, number, job)
            select q.number, q.priority, job.id, job.id
            from job
            order by job.id
        )
        select job.id, true
        from job
        order by job.id;
        return;
    end if;
    select e.value into entry
    from jsonb_array_elements(send_many.jobs) e
    where jsonb_typeof(e.value) <> 'object'
    or e.value - allowed <> '{}'
    limit 1;
    if found then
        if jsonb_typeof(entry) <> 'object' then
            raise exception 'each of the jobs must be a JSON object, not %', jsonb_typeof(entry)
            using errcode = 'NQ003', hint = 'Its data goes under "data": [{"data": ...}].';
        end if;
        perform notifyq.check_options(entry, allowed);
    end if;
    -- What is reserved by key is sent one by one, and in the order of the keys and id_keys, as in send_each().
    if q.policy in ('short', 'stately', 'exclusive') or exists (select from jsonb_array_elements(send_many.jobs) e where e.value ?| '{throttle,debounce}') then
        if q.gated and exists (select from jsonb_array_elements(send_many.jobs) e where e.value ? 'debounce') then
            perform notifyq.lock_gate(q.number);
        end if;
        return query
        with entry as materialized (
        select e.*, nextval('notifyq.job_id_seq') as number
        from rows from (jsonb_to_recordset(send_many.jobs) as (
            data jsonb, priority int, delay jsonb, due_at timestamptz, retry_limit int, retry_delay jsonb, retry_delay_max jsonb,
            retry_backoff boolean, timeout jsonb, expire_in jsonb, headers jsonb, id_key text, key text, throttle jsonb, debounce jsonb
        )) with ordinality e (
            data, priority, delay, due_at, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expire_in, headers, id_key, key,
            throttle, debounce, place
        )
        order by e.place
        ), sent as materialized (
        select e.place, s.id, s.created
        from (select * from entry order by coalesce(key, ''), id_key, place) e
        cross join lateral notifyq.send_one(q, nullif(e.data, 'null'), e.priority, notifyq.duration(e.delay), e.due_at, e.retry_limit,
            notifyq.duration(e.retry_delay), notifyq.duration(e.retry_delay_max), e.retry_backoff, notifyq.duration(e.timeout),
            notifyq.duration(e.expire_in), nullif(e.headers, 'null'), e.id_key, e.key, notifyq.duration(e.throttle), notifyq.duration(e.debounce),
            number => e.number) s
        )
        select s.id, s.created
        from sent s
        order by s.place;
        return;
    end if;
    if q.fair or num_nonnulls(q.slots, q.key_rate_limit) > 0 then
        -- What this puts in blocked is let go by these rules: they stay until it is seen.
        select o.* into q from notifyq.queue o where o.number = q.number for share;
        if not found then
            q := notifyq.queue_named(send_many.queue);
        end if;
    end if;
    return query
    select * from notifyq.send_each(q, send_many.jobs);
exception when data_exception then
    raise exception 'an option of a job for queue % does not fit: %', send_many.queue, sqlerrm using errcode = 'NQ003';
end
$$;

-- The part of send_many() for jobs with options of their own.
--
-- The id_keys are reserved before anything else and in one order, by key and then themselves, whatever the
-- array's is: two calls with the same ones then wait for each other and do not deadlock.
create or replace function notifyq.send_each(queue notifyq.queue, jobs jsonb)
returns table (id bigint, created boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    ids bigint[];
    reserved jsonb;
begin
    perform notifyq.key_fits(e.value ->> 'id_key', 'id_key') from jsonb_array_elements(send_each.jobs) e;
    select array_agg(nextval('notifyq.job_id_seq') order by e.ordinality) into ids
    from jsonb_array_elements(send_each.jobs) with ordinality e;
    with inserted as (
        insert into notifyq.id_key (queue, key, job)
        select (send_each.queue).number, e.value ->> 'id_key', min(ids[e.ordinality])
        from jsonb_array_elements(send_each.jobs) with ordinality e
        where e.value ->> 'id_key' is not null
        group by e.value ->> 'id_key'
        order by min(coalesce(e.value ->> 'key', '')), e.value ->> 'id_key'
        on conflict do nothing
        returning job
    )
    select coalesce(jsonb_object_agg(i.job, true), '{}') into reserved from inserted i;

    with entry as materialized (
        select e.*, ids[e.place] as id, coalesce(e.due_at, clock_timestamp() + notifyq.duration(e.delay)) as due,
            coalesce(e.priority::smallint, (send_each.queue).priority) as rank,
            -- here, where they are still in the array's order: one moment may be a millisecond later than another
            notifyq.line_number(ids[e.place], coalesce(e.priority::smallint, (send_each.queue).priority), (send_each.queue).ageing) as number,
            e.id_key is null or reserved ? ids[e.place]::text as is_new
        from rows from (jsonb_to_recordset(send_each.jobs) as (
            data jsonb, priority int, delay jsonb, due_at timestamptz, retry_limit int, retry_delay jsonb, retry_delay_max jsonb,
            retry_backoff boolean, timeout jsonb, expire_in jsonb, headers jsonb, id_key text, key text
        )) with ordinality e (
            data, priority, delay, due_at, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expire_in, headers, id_key, key, place
        )
        where ((octet_length(e.data::text) > (send_each.queue).max_data_bytes) is not true or notifyq.data_fits(e.data, send_each.queue))
        and (num_nonnulls(e.priority, e.delay, e.due_at, e.retry_limit, e.retry_delay, e.retry_delay_max, e.timeout, e.expire_in) = 0
            or notifyq.options_fit(e.priority, notifyq.duration(e.delay), e.due_at, e.retry_limit, notifyq.duration(e.retry_delay),
            notifyq.duration(e.retry_delay_max), notifyq.duration(e.timeout), notifyq.duration(e.expire_in)))
        and (e.headers is null or notifyq.headers_fit(nullif(e.headers, 'null')))
        and notifyq.key_options_fit(send_each.queue, e.key, null, null, false)
    ), ticket as materialized (
        -- So many of each key may go ahead; those behind them need not be looked at before they have.
        select e.*, row_number() over (partition by coalesce(e.key, ''), (e.due > now()) is true order by e.rank desc, e.id)
            > case when (send_each.queue).fair or num_nonnulls((send_each.queue).slots, (send_each.queue).key_rate_limit) > 0
                then coalesce((send_each.queue).slots, 1) end as waits
        from entry e
        where e.is_new
    ), job as (
        insert into notifyq.job (id, queue, data, headers, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at, id_key, key)
        select e.id, (send_each.queue).number, nullif(e.data, 'null'), nullif(e.headers, 'null'), e.rank,
            coalesce(e.retry_limit, (send_each.queue).retry_limit),
            coalesce(notifyq.duration(e.retry_delay), (send_each.queue).retry_delay),
            coalesce(notifyq.duration(e.retry_delay_max), (send_each.queue).retry_delay_max),
            coalesce(e.retry_backoff, (send_each.queue).retry_backoff),
            coalesce(notifyq.duration(e.timeout), (send_each.queue).timeout),
            greatest(e.due, now()) + coalesce(notifyq.duration(e.expire_in), (send_each.queue).expire_in),
            e.id_key, e.key
        from ticket e
    ), later as (
        insert into notifyq.scheduled (job, queue, due_at)
        select e.id, (send_each.queue).number, e.due
        from ticket e
        where e.due > now()
    ), waiting as (
        insert into notifyq.blocked (job, number, queue, priority, key)
        select e.id, e.number, (send_each.queue).number, notifyq.line_priority(e.rank, (send_each.queue).ageing), coalesce(e.key, '')
        from ticket e
        where (e.due > now()) is not true
        and e.waits
    )
    insert into notifyq.ready (queue, priority, number, job)
    select (send_each.queue).number, notifyq.line_priority(e.rank, (send_each.queue).ageing), e.number, e.id
    from ticket e
    where (e.due > now()) is not true
    and e.waits is not true
    order by e.id;

    if exists (
        select from jsonb_array_elements(send_each.jobs) e
        where e.value ->> 'id_key' is not null
        and not exists (select from notifyq.id_key k where k.queue = (send_each.queue).number and k.key = e.value ->> 'id_key' offset 0)
    ) then
        raise exception 'a job with one of these id_keys was deleted at this moment' using errcode = 'serialization_failure', hint = 'Send again.';
    end if;
    return query
    select coalesce(k.job, ids[e.ordinality]), coalesce(k.job = ids[e.ordinality], true)
    from jsonb_array_elements(send_each.jobs) with ordinality e
    left join lateral (
        select o.job from notifyq.id_key o where o.queue = (send_each.queue).number and o.key = e.value ->> 'id_key' offset 0
    ) k on true
    order by e.ordinality;
end
$$;
