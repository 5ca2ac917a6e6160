-- send: insert the job and its ticket; inserting the ticket rings the bell.
--
-- SECURITY DEFINER: a producer needs EXECUTE and nothing else. Locks: the id_keys' rows, by key.

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
    then
        raise exception 'delay, due_at, retry_delay, retry_delay_max, timeout and expire_in must not be over 100 years' using errcode = 'NQ003';
    end if;
    return true;
end
$$;

-- True, or NQ003: the key is longer than an index may safely hold.
create or replace function notifyq.key_fits(id_key text) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if octet_length(key_fits.id_key) > 1000 then
        raise exception 'id_key of % bytes is over the limit of 1000', octet_length(key_fits.id_key)
        using errcode = 'NQ003', hint = 'Use a hash of it.';
    end if;
    return true;
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
    due timestamptz;
begin
    -- Data and nothing else, the usual case, in one query: every query and every expression is paid for
    -- by each send. What this does not send is left to what follows, which says why.
    if num_nonnulls(try_send.priority, try_send.delay, try_send.due_at, try_send.retry_limit, try_send.retry_delay, try_send.retry_delay_max,
        try_send.retry_backoff, try_send.timeout, try_send.expire_in, try_send.headers, try_send.id_key) = 0
    then
        with job as (
            insert into notifyq.job (queue, data, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at)
            select s.number, try_send.data, s.priority, s.retry_limit, s.retry_delay, s.retry_delay_max, s.retry_backoff, s.timeout, now() + s.expire_in
            from notifyq.queue s
            where s.name = try_send.queue
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

    q := notifyq.queue_named(try_send.queue);
    if num_nonnulls(try_send.priority, try_send.delay, try_send.due_at, try_send.retry_limit, try_send.retry_delay, try_send.retry_delay_max,
        try_send.timeout, try_send.expire_in) > 0
    then
        perform notifyq.options_fit(try_send.priority, try_send.delay, try_send.due_at, try_send.retry_limit, try_send.retry_delay,
            try_send.retry_delay_max, try_send.timeout, try_send.expire_in);
        due := coalesce(try_send.due_at, clock_timestamp() + try_send.delay);
    end if;
    if octet_length(try_send.data::text) > q.max_data_bytes then
        perform notifyq.data_fits(try_send.data, q);
    end if;

    try_send.id := nextval('notifyq.job_id_seq');
    try_send.created := true;
    if try_send.id_key is not null then
        perform notifyq.key_fits(try_send.id_key);
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
        greatest(due, now()) + coalesce(try_send.expire_in, q.expire_in),
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
    return query
    select * from notifyq.send_each(q, send_many.jobs);
exception when data_exception then
    raise exception 'an option of a job for queue % does not fit: %', send_many.queue, sqlerrm using errcode = 'NQ003';
end
$$;

-- The part of send_many() for jobs with options of their own.
--
-- Keys are reserved before anything else and in their order, whatever the array's is: two calls
-- with the same keys then wait for each other and do not deadlock.
create or replace function notifyq.send_each(queue notifyq.queue, jobs jsonb)
returns table (id bigint, created boolean)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    ids bigint[];
    reserved jsonb;
begin
    perform notifyq.key_fits(e.value ->> 'id_key') from jsonb_array_elements(send_each.jobs) e;
    select array_agg(nextval('notifyq.job_id_seq') order by e.ordinality) into ids
    from jsonb_array_elements(send_each.jobs) with ordinality e;
    with inserted as (
        insert into notifyq.id_key (queue, key, job)
        select (send_each.queue).number, e.value ->> 'id_key', min(ids[e.ordinality])
        from jsonb_array_elements(send_each.jobs) with ordinality e
        where e.value ->> 'id_key' is not null
        group by e.value ->> 'id_key'
        order by e.value ->> 'id_key'
        on conflict do nothing
        returning job
    )
    select coalesce(jsonb_object_agg(i.job, true), '{}') into reserved from inserted i;

    with entry as materialized (
        select e.*, ids[e.place] as id, coalesce(e.due_at, clock_timestamp() + notifyq.duration(e.delay)) as due,
            coalesce(e.priority::smallint, (send_each.queue).priority) as rank,
            e.id_key is null or reserved ? ids[e.place]::text as is_new
        from rows from (jsonb_to_recordset(send_each.jobs) as (
            data jsonb, priority int, delay jsonb, due_at timestamptz, retry_limit int, retry_delay jsonb, retry_delay_max jsonb,
            retry_backoff boolean, timeout jsonb, expire_in jsonb, headers jsonb, id_key text
        )) with ordinality e (
            data, priority, delay, due_at, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expire_in, headers, id_key, place
        )
        where notifyq.data_fits(e.data, send_each.queue)
        and notifyq.options_fit(e.priority, notifyq.duration(e.delay), e.due_at, e.retry_limit, notifyq.duration(e.retry_delay),
            notifyq.duration(e.retry_delay_max), notifyq.duration(e.timeout), notifyq.duration(e.expire_in))
    ), job as (
        insert into notifyq.job (id, queue, data, headers, priority, retry_limit, retry_delay, retry_delay_max, retry_backoff, timeout, expires_at, id_key)
        select e.id, (send_each.queue).number, nullif(e.data, 'null'), nullif(e.headers, 'null'), e.rank,
            coalesce(e.retry_limit, (send_each.queue).retry_limit),
            coalesce(notifyq.duration(e.retry_delay), (send_each.queue).retry_delay),
            coalesce(notifyq.duration(e.retry_delay_max), (send_each.queue).retry_delay_max),
            coalesce(e.retry_backoff, (send_each.queue).retry_backoff),
            coalesce(notifyq.duration(e.timeout), (send_each.queue).timeout),
            greatest(e.due, now()) + coalesce(notifyq.duration(e.expire_in), (send_each.queue).expire_in),
            e.id_key
        from entry e
        where e.is_new
    ), later as (
        insert into notifyq.scheduled (job, queue, due_at)
        select e.id, (send_each.queue).number, e.due
        from entry e
        where e.is_new
        and e.due > now()
    )
    insert into notifyq.ready (queue, priority, number, job)
    select (send_each.queue).number, e.rank, e.id, e.id
    from entry e
    where e.is_new
    and (e.due > now()) is not true
    order by e.id;

    if exists (
        select from jsonb_array_elements(send_each.jobs) e
        where e.value ->> 'id_key' is not null
        and not exists (select from notifyq.id_key k where k.queue = (send_each.queue).number and k.key = e.value ->> 'id_key')
    ) then
        raise exception 'a job with one of these id_keys was deleted at this moment' using errcode = 'serialization_failure', hint = 'Send again.';
    end if;
    return query
    select coalesce(k.job, ids[e.ordinality]), coalesce(k.job = ids[e.ordinality], true)
    from jsonb_array_elements(send_each.jobs) with ordinality e
    left join notifyq.id_key k on k.queue = (send_each.queue).number and k.key = e.value ->> 'id_key'
    order by e.ordinality;
end
$$;
