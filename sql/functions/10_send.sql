-- send: insert the job and its ticket; inserting the ticket rings the bell.
--
-- SECURITY DEFINER: a producer needs EXECUTE and nothing else. Locks: the id_key's row, if used.

-- Raises NQ004 when data is larger than its queue takes.
create or replace function notifyq.check_data(data jsonb, queue notifyq.queue) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    size int := octet_length(check_data.data::text);
begin
    if size > (check_data.queue).max_data_bytes then
        raise exception 'data of % bytes is over the limit of % bytes of queue %', size, (check_data.queue).max_data_bytes, (check_data.queue).name
        using errcode = 'NQ004', hint = 'Store large data elsewhere and send a reference, or raise the queue''s max_data_bytes.';
    end if;
end
$$;

-- Sends one job and says whether it was made: a repeated id_key makes none and returns the
-- standing job's id. Options left null are inherited from the queue.
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
    out id bigint,
    out created boolean
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    q notifyq.queue;
    due timestamptz := coalesce(try_send.due_at, clock_timestamp() + try_send.delay);
begin
    select * into q from notifyq.queue s where s.name = try_send.queue;
    if not found then
        q := notifyq.queue_named(try_send.queue);
    end if;
    if try_send.delay is not null and try_send.due_at is not null then
        raise exception 'delay and due_at exclude each other' using errcode = 'NQ003', hint = 'Give one of them.';
    end if;
    if try_send.priority not between -32768 and 32767 then
        raise exception 'priority % is not between -32768 and 32767', try_send.priority using errcode = 'NQ003';
    end if;
    if try_send.retry_limit not between 0 and 1000 then
        raise exception 'retry_limit % is not between 0 and 1000', try_send.retry_limit using errcode = 'NQ003';
    end if;
    if least(try_send.retry_delay, try_send.retry_delay_max) < '0' or least(try_send.timeout, try_send.expire_in) <= '0' then
        raise exception 'retry_delay and retry_delay_max must not be negative, timeout and expire_in must be above zero' using errcode = 'NQ003';
    end if;
    if octet_length(try_send.data::text) > q.max_data_bytes then
        perform notifyq.check_data(try_send.data, q);
    end if;

    try_send.id := nextval('notifyq.job_id_seq');
    try_send.created := true;
    if try_send.id_key is not null then
        loop
            insert into notifyq.id_key (queue, key, job)
            values (q.number, try_send.id_key, try_send.id)
            on conflict do nothing;
            exit when found;
            select k.job, false into try_send.id, try_send.created
            from notifyq.id_key k
            where k.queue = q.number
            and k.key = try_send.id_key;
            if found then
                return;
            end if;
            try_send.id := nextval('notifyq.job_id_seq');
        end loop;
    end if;

    insert into notifyq.job (id, queue, data, headers, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at, id_key)
    values (
        try_send.id, q.number, try_send.data, try_send.headers,
        coalesce(try_send.priority::smallint, q.priority),
        coalesce(try_send.retry_limit, q.retry_limit),
        coalesce(try_send.retry_delay, q.retry_delay),
        coalesce(try_send.retry_delay_max, q.retry_delay_max),
        coalesce(try_send.retry_backoff, q.retry_backoff),
        coalesce(try_send.timeout, q.timeout),
        coalesce(due, now()) + coalesce(try_send.expire_in, q.expire_in),
        try_send.id_key
    );
    if due > clock_timestamp() then
        insert into notifyq.scheduled (job, queue, due_at)
        values (try_send.id, q.number, due);
    else
        insert into notifyq.ready (queue, priority, number, job)
        values (q.number, coalesce(try_send.priority::smallint, q.priority), try_send.id, try_send.id);
    end if;
end
$$;

-- Sends one job and returns its id; with a repeated id_key, the standing job's id.
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
    id_key text default null
) returns bigint
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    select s.id
    from notifyq.try_send(send.queue, send.data, send.priority, send.delay, send.due_at, send.retry_limit, send.retry_delay,
        send.retry_delay_max, send.retry_backoff, send.timeout, send.expire_in, send.headers, send.id_key) s
$$;

-- Sends many jobs with one statement: jobs is a JSON array of objects whose keys are send's
-- arguments but the queue. Returns (id, created) in the array's order; a repeated id_key is
-- folded. All or nothing.
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
        'retry_delay_max', 'retry_backoff', 'timeout', 'expire_in', 'headers', 'id_key'];
    entry jsonb;
    sent record;
begin
    if jsonb_typeof(send_many.jobs) is distinct from 'array' then
        raise exception 'jobs must be a JSON array of objects, not %', coalesce(jsonb_typeof(send_many.jobs), 'null') using errcode = 'NQ003';
    end if;
    select e.value into entry
    from jsonb_array_elements(send_many.jobs) e
    where jsonb_typeof(e.value) <> 'object'
    or e.value - allowed <> '{}'
    limit 1;
    if found then
        perform notifyq.check_options(entry, allowed);
    end if;

    -- Data and nothing else: one insert each for jobs and tickets.
    if not exists (select from jsonb_array_elements(send_many.jobs) e where e.value - 'data' <> '{}') then
        return query
        with job as (
            insert into notifyq.job (queue, data, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at)
            select q.number, nullif(e.value -> 'data', 'null'), q.priority, q.retry_limit, q.retry_delay, q.retry_delay_max, q.retry_backoff, q.timeout, now() + q.expire_in
            from jsonb_array_elements(send_many.jobs) with ordinality e
            where notifyq.data_fits(e.value -> 'data', q)
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

    for entry in select e.value from jsonb_array_elements(send_many.jobs) with ordinality e order by e.ordinality loop
        select * into sent
        from notifyq.try_send(
            send_many.queue, nullif(entry -> 'data', 'null'), (entry ->> 'priority')::int, notifyq.duration(entry -> 'delay'),
            (entry ->> 'due_at')::timestamptz, (entry ->> 'retry_limit')::int, notifyq.duration(entry -> 'retry_delay'),
            notifyq.duration(entry -> 'retry_delay_max'), (entry ->> 'retry_backoff')::boolean, notifyq.duration(entry -> 'timeout'),
            notifyq.duration(entry -> 'expire_in'), nullif(entry -> 'headers', 'null'), entry ->> 'id_key'
        );
        id := sent.id;
        created := sent.created;
        return next;
    end loop;
exception when invalid_text_representation or invalid_datetime_format or datetime_field_overflow or numeric_value_out_of_range then
    raise exception 'an option of a job for queue % does not fit: %', send_many.queue, sqlerrm using errcode = 'NQ003';
end
$$;

-- True, or NQ004: check_data where an expression is needed.
create or replace function notifyq.data_fits(data jsonb, queue notifyq.queue) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if octet_length(data_fits.data::text) > (data_fits.queue).max_data_bytes then
        perform notifyq.check_data(data_fits.data, data_fits.queue);
    end if;
    return true;
end
$$;
