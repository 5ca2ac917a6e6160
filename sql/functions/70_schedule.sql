-- Schedules: a cron rule or an interval that sends a job to a queue.
--
-- Any runtime fires them; which one does is settled by comparing next_at with what it knew of the
-- row and setting it, in the transaction that sends the job: one job a firing. No leader.
--
-- SQL checks a cron rule but does not work out when it fires: a runtime does, woken by 'schedule'
-- on the control channel. An interval's firings are the multiples of it since 1970-01-01 00:00 UTC,
-- whoever works them out.

-- The numbers that one field of a cron rule stands for, or null if it is not one. names: the words
-- for 'lowest' and what follows it. Beside plain numbers: 101 the last day of the month, 102 its
-- last weekday; for a weekday w, 10 * n + w the n-th w of the month and 100 + w the last.
create or replace function notifyq.cron_field(field text, lowest int, highest int, names text[] default '{}') returns int[]
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    weekdays constant boolean := cron_field.highest = 7;
    plain text;
    part text[];
    first int;
    last int;
    step int;
    numbers int[] := '{}';
begin
    foreach plain in array string_to_array(cron_field.field, ',') loop
        if cron_field.highest = 31 and plain ~ '^LW?(/[0-9]{0,8}[1-9][0-9]{0,8})?$' then
            numbers := numbers || case when plain ~ '^LW' then 102 else 101 end;
            continue;
        end if;
        if weekdays and plain ~ '^0*[0-7]L$' then
            numbers := numbers || 100 + rtrim(plain, 'L')::int;
            continue;
        end if;
        part := regexp_match(plain, '^(?:(\*)|([0-9]{1,9}|[A-Z]{3})(?:-([0-9]{1,9}|[A-Z]{3}))?)(?:/([0-9]{1,9})|#0*([1-5]))?$');
        if part is null or (part[5] is not null and (not weekdays or part[2] is null or part[3] is not null)) then
            return null;
        end if;
        step := part[4]::int;
        first := case
            when part[1] = '*' then cron_field.lowest
            when part[2] ~ '^[0-9]' then part[2]::int
            else cron_field.lowest - 1 + array_position(cron_field.names, part[2])
        end;
        last := case
            when part[1] = '*' then cron_field.highest
            when part[3] ~ '^[0-9]' then part[3]::int
            when part[3] is not null then cron_field.lowest - 1 + array_position(cron_field.names, part[3])
            when step is not null then cron_field.highest
            else first
        end;
        if (first >= cron_field.lowest and last >= first and last <= cron_field.highest and step is distinct from 0) is not true then
            return null;
        end if;
        if part[5] is not null then
            numbers := numbers || 10 * part[5]::int + first;
        else
            numbers := numbers || array(select generate_series(first, last, coalesce(step, 1)));
        end if;
    end loop;
    return nullif(numbers, '{}');
end
$$;

-- Whether there is a day in the next 50 years on which a rule with these fields fires. As in Debian's cron a
-- day must fit both fields if one of them begins with a star, and one of them otherwise.
create or replace function notifyq.cron_fires(days int[], months int[], weekdays int[], in_both boolean) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select exists (
        select
        from (
            select c.day, extract(day from c.day)::int as number, extract(isodow from c.day)::int as weekday,
                (date_trunc('month', c.day) + interval '1 month - 1 day')::date as last
            from (select (now() at time zone 'utc')::date + generate_series(0, 18262) as day) c
        ) d
        cross join lateral (
            select d.number = any (cron_fires.days)
                or (101 = any (cron_fires.days) and d.day = d.last)
                or (102 = any (cron_fires.days) and d.day = d.last - greatest(extract(isodow from d.last)::int - 5, 0)) as by_number,
                array[d.weekday, d.weekday % 7, 10 * ((d.number + 6) / 7) + d.weekday, 10 * ((d.number + 6) / 7) + d.weekday % 7]
                    || case when d.day + 7 > d.last then array[100 + d.weekday, 100 + d.weekday % 7] end
                    && cron_fires.weekdays as by_weekday
        ) fits
        where extract(month from d.day)::int = any (cron_fires.months)
        and case when cron_fires.in_both then fits.by_number and fits.by_weekday else fits.by_number or fits.by_weekday end
    )
$$;

-- Refuses what is not a cron rule, and one that never fires. Raises NQ003.
create or replace function notifyq.check_cron(rule text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    names constant text[] := array['second', 'minute', 'hour', 'day', 'month', 'weekday'];
    lowest constant int[] := array[0, 0, 0, 1, 1, 0];
    highest constant int[] := array[59, 59, 23, 31, 12, 7];
    words text[];
    fields text[] := regexp_split_to_array(upper(btrim(check_cron.rule, e' \t\n')), '\s+');
    found_numbers int[];
    days int[];
    months int[];
    hint constant text := 'A rule has five fields, minute hour day month weekday, such as 30 3 * * MON-FRI; or six, with the second before them.';
begin
    if cardinality(fields) = 5 then
        fields := array['0'] || fields;
    end if;
    if cardinality(fields) <> 6 or length(check_cron.rule) > 200 then
        raise exception 'not a cron rule: %', quote_literal(left(check_cron.rule, 200)) using errcode = 'NQ003', hint = hint;
    end if;
    for field in 1..6 loop
        words := case field
            when 5 then array['JAN', 'FEB', 'MAR', 'APR', 'MAY', 'JUN', 'JUL', 'AUG', 'SEP', 'OCT', 'NOV', 'DEC']
            when 6 then array['SUN', 'MON', 'TUE', 'WED', 'THU', 'FRI', 'SAT']
            else '{}'
        end;
        found_numbers := notifyq.cron_field(fields[field], lowest[field], highest[field], words);
        if found_numbers is null then
            raise exception 'not a cron rule: %: its % is not one: %', quote_literal(check_cron.rule), names[field], fields[field]
            using errcode = 'NQ003', hint = hint;
        end if;
        case field
            when 4 then days := found_numbers;
            when 5 then months := found_numbers;
            else null;
        end case;
    end loop;
    if not notifyq.cron_fires(days, months, found_numbers, fields[4] like '*%' or fields[6] like '*%') then
        raise exception 'cron rule % never fires', quote_literal(check_cron.rule)
        using errcode = 'NQ003', hint = 'No day of the next 50 years has such a date: look at its day, month and weekday.';
    end if;
end
$$;

-- Refuses a schedule that could not fire. Raises NQ003. A zone that another schedule has is not
-- looked up again: that reads hundreds of files.
create or replace function notifyq.check_schedule(name text, cron text, every interval, timezone text, missed text, headers jsonb) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if (check_schedule.name ~ '^[A-Za-z0-9_./-]{1,100}$') is not true then
        raise exception 'not a name of a schedule: %', coalesce(quote_literal(check_schedule.name), 'null')
        using errcode = 'NQ003', hint = 'A name is 1 to 100 letters, digits and _ . - / characters.';
    end if;
    if num_nonnulls(check_schedule.cron, check_schedule.every) <> 1 then
        raise exception 'schedule % must have either cron or every', check_schedule.name
        using errcode = 'NQ003', hint = 'Give one of them: cron => ''0 3 * * *'', or every => ''1 hour''.';
    end if;
    if (check_schedule.missed in ('skip', 'once')) is not true then
        raise exception 'missed must be ''skip'' or ''once'', not %', coalesce(quote_literal(check_schedule.missed), 'null') using errcode = 'NQ003';
    end if;
    perform notifyq.headers_fit(check_schedule.headers);
    if check_schedule.every is not null then
        if check_schedule.every not between interval '100 milliseconds' and interval '366 days' then
            raise exception 'every must be from 0.1 seconds to 366 days, not %', check_schedule.every using errcode = 'NQ003';
        end if;
        if extract(year from check_schedule.every) <> 0 or extract(month from check_schedule.every) <> 0 then
            raise exception 'every must be a fixed time, and months differ: %', check_schedule.every
            using errcode = 'NQ003', hint = 'Use cron => ''0 0 1 * *'' for the first of each month.';
        end if;
        if check_schedule.timezone is distinct from 'UTC' then
            raise exception 'a schedule with every has no time zone' using errcode = 'NQ003', hint = 'Leave timezone out, or use cron.';
        end if;
        return;
    end if;
    if check_schedule.timezone is distinct from 'UTC'
        and not exists (select from notifyq.schedule s where s.timezone = check_schedule.timezone)
        and not exists (select from pg_timezone_names z where z.name = check_schedule.timezone)
    then
        raise exception 'there is no time zone named %', coalesce(quote_literal(check_schedule.timezone), 'null')
        using errcode = 'NQ003', hint = 'Use a name such as Europe/Berlin: select name from pg_timezone_names.';
    end if;
    perform notifyq.check_cron(check_schedule.cron);
end
$$;

-- The first multiple of an interval since 1970-01-01 00:00 UTC that comes after a moment. In whole
-- microseconds, as a runtime counts them.
create or replace function notifyq.next_multiple(every interval, after timestamptz) returns timestamptz
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select timestamptz 'epoch' + ((a.after / a.every + 1) * a.every / 1000000) * interval '1 second'
        + ((a.after / a.every + 1) * a.every % 1000000) * interval '1 microsecond'
    from (
        select round(extract(epoch from next_multiple.every) * 1000000)::bigint as every,
            round(extract(epoch from next_multiple.after) * 1000000)::bigint as after
    ) a
$$;

-- Sets one schedule of a queue, already checked: 'created', 'changed' or 'unchanged'. With the same rule
-- it keeps its next firing. Call with the queue's row read. Locks: the schedule's row.
create or replace function notifyq.put_schedule(
    queue notifyq.queue,
    name text,
    cron text,
    every interval,
    timezone text,
    missed text,
    headers jsonb,
    data jsonb,
    declared boolean
) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    standing notifyq.schedule;
    same_rule boolean;
    first_at timestamptz := notifyq.next_multiple(put_schedule.every, clock_timestamp());
begin
    if (put_schedule.queue).policy = 'ordered' then
        raise exception 'queue % is ordered by key, and the jobs of a schedule have none', (put_schedule.queue).name
        using errcode = 'NQ003', hint = 'Give the schedule to another queue, whose worker sends to this one with a key.';
    end if;
    perform notifyq.data_fits(put_schedule.data, put_schedule.queue);
    loop
        insert into notifyq.schedule (queue, name, cron, every, timezone, missed, headers, data, declared, next_at)
        values ((put_schedule.queue).number, put_schedule.name, put_schedule.cron, put_schedule.every, put_schedule.timezone, put_schedule.missed,
            put_schedule.headers, put_schedule.data, put_schedule.declared, first_at)
        on conflict (queue, name) do nothing;
        if found then
            perform pg_notify(notifyq.channel(0), 'schedule');
            return 'created';
        end if;
        select s.* into standing
        from notifyq.schedule s
        where s.queue = (put_schedule.queue).number
        and s.name = put_schedule.name
        for update;
        exit when found;
    end loop;
    same_rule := (standing.cron, standing.every, standing.timezone) is not distinct from (put_schedule.cron, put_schedule.every, put_schedule.timezone);
    if same_rule and standing.declared = put_schedule.declared
        and (standing.missed, standing.headers, standing.data) is not distinct from (put_schedule.missed, put_schedule.headers, put_schedule.data)
    then
        return 'unchanged';
    end if;
    update notifyq.schedule s
    set number = default, cron = put_schedule.cron, every = put_schedule.every, timezone = put_schedule.timezone, missed = put_schedule.missed,
        headers = put_schedule.headers, data = put_schedule.data, declared = put_schedule.declared, error = null,
        changed_at = case when same_rule then s.changed_at else now() end,
        next_at = case when same_rule then s.next_at else first_at end
    where s.number = standing.number;
    perform pg_notify(notifyq.channel(0), 'schedule');
    return 'changed';
end
$$;

-- Makes or changes a schedule of a queue, by its name; returns 'created', 'changed' or 'unchanged'.
-- Give cron (in the time zone) or every. missed: what becomes of firings that no runtime was there for, 'once' = one
-- job for all of them, 'skip' = none. Raises NQ001, NQ003 and NQ004.
create or replace function notifyq.schedule(
    queue text,
    cron text default null,
    every interval default null,
    name text default 'default',
    timezone text default 'UTC',
    data jsonb default null,
    headers jsonb default null,
    missed text default 'once'
) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    q notifyq.queue;
begin
    perform from notifyq.queue o where o.name = schedule.queue for share; -- against a change of its policy
    q := notifyq.queue_named(schedule.queue);
    perform notifyq.check_schedule(schedule.name, schedule.cron, schedule.every, schedule.timezone, schedule.missed, schedule.headers);
    return notifyq.put_schedule(q, schedule.name, schedule.cron, schedule.every, schedule.timezone, schedule.missed, schedule.headers, schedule.data, false);
end
$$;

-- Removes a schedule; true if there was one. What it has sent stays. Raises NQ001.
create or replace function notifyq.unschedule(queue text, name text default 'default') returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    q notifyq.queue := notifyq.queue_named(unschedule.queue);
begin
    delete from notifyq.schedule s
    where s.queue = q.number
    and s.name = unschedule.name;
    if found then
        perform pg_notify(notifyq.channel(0), 'schedule');
    end if;
    return found;
end
$$;

-- Makes a queue's declared schedules those of this JSON array of schedule()'s arguments (every as seconds or
-- text): makes, changes, and removes those declared before and not any more. One made by schedule() stays,
-- unless one of its name is declared. Returns the names of those declared otherwise before that it has changed or
-- removed while a live runtime serves the queue: that one may have declared them, and will do so again when it starts (one
-- that serves it by a pattern has not: patterns have no schedules).
-- One session at a time per queue. Locks: the queue's row, then its schedules'.
create or replace function notifyq.declare_schedules(queue text, schedules jsonb) returns text[]
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    q notifyq.queue;
    entry record;
    was_declared boolean;
    overruled text[];
begin
    if jsonb_typeof(declare_schedules.schedules) is distinct from 'array'
        or jsonb_path_exists(declare_schedules.schedules, 'strict $[*] ? (@.type() <> "object")', silent => true)
    then
        raise exception 'schedules must be a JSON array of objects' using errcode = 'NQ003';
    end if;
    perform notifyq.check_options(e.value, '{name,cron,every,timezone,missed,headers,data}') from jsonb_array_elements(declare_schedules.schedules) e;
    if jsonb_array_length(declare_schedules.schedules) = 0
        and not exists (
            select from notifyq.schedule s
            where s.queue = (notifyq.queue_named(declare_schedules.queue)).number
            and s.declared
        )
    then
        return '{}';
    end if;
    perform from notifyq.queue l where l.name = declare_schedules.queue for no key update;
    q := notifyq.queue_named(declare_schedules.queue);
    with gone as (
        delete from notifyq.schedule s
        where s.queue = q.number
        and s.declared
        and not declare_schedules.schedules @> jsonb_build_array(jsonb_build_object('name', s.name))
        returning s.name
    )
    select coalesce(array_agg(g.name order by g.name), '{}') into overruled from gone g;
    if overruled <> '{}' then
        perform pg_notify(notifyq.channel(0), 'schedule');
    end if;
    for entry in
        select e.name, e.cron, notifyq.duration(e.every) as every, coalesce(e.timezone, 'UTC') as timezone, coalesce(e.missed, 'once') as missed,
            nullif(e.headers, 'null') as headers, nullif(e.data, 'null') as data
        from jsonb_to_recordset(declare_schedules.schedules) as e (
            name text, cron text, every jsonb, timezone text, missed text, headers jsonb, data jsonb
        )
        order by e.name
    loop
        -- what stands was checked when it came
        if not exists (
            select from notifyq.schedule s
            where s.queue = q.number
            and (s.name, s.cron, s.every, s.timezone, s.missed, s.headers)
                is not distinct from (entry.name, entry.cron, entry.every, entry.timezone, entry.missed, entry.headers)
        ) then
            perform notifyq.check_schedule(entry.name, entry.cron, entry.every, entry.timezone, entry.missed, entry.headers);
        end if;
        was_declared := exists (select from notifyq.schedule s where s.queue = q.number and s.name = entry.name and s.declared);
        if notifyq.put_schedule(q, entry.name, entry.cron, entry.every, entry.timezone, entry.missed, entry.headers, entry.data, true) = 'changed'
            and was_declared
        then
            overruled := overruled || entry.name;
        end if;
    end loop;
    return case
        when exists (select from notifyq.runtime r where q.name = any (r.queues) and r.lease_until > clock_timestamp() and not r.stopping)
        then overruled
        else '{}'
    end;
end
$$;

-- The schedules that come next, those not worked out yet first: what a runtime must know to fire them. besides:
-- the numbers of those that it cannot read. Times in microseconds of the epoch; clock is the server's, in seconds.
create or replace function notifyq.schedules_ahead(besides bigint[] default '{}', how_many int default 100)
returns table (
    number bigint,
    queue text,
    name text,
    cron text,
    every float8,
    timezone text,
    missed text,
    changed_at bigint,
    next_at bigint,
    clock float8
)
language sql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
    select s.number, q.name, s.name, s.cron, extract(epoch from s.every)::float8, s.timezone, s.missed,
        round(extract(epoch from s.changed_at) * 1000000)::bigint, round(extract(epoch from s.next_at) * 1000000)::bigint,
        extract(epoch from clock_timestamp())::float8
    from notifyq.schedule s
    join notifyq.queue q on q.number = s.queue
    where s.number <> all (schedules_ahead.besides)
    order by s.next_at nulls first
    limit notifyq.how_many_fits(schedules_ahead.how_many)
$$;

-- Fires a schedule: sends its job and sets its next firing, if its next one is still the expected one; null: it was
-- not worked out yet. fired_for: the time that the job is for, which it finds in its headers; null: no job, only the next firing.
--
-- done says what was done: 'fired'; 'planned' (no job was asked for); 'skipped' (the queue's policy lets no other job
-- wait beside one that does: none was made); 'refused' (its queue does not take the job:
-- the error is kept, and the next firing set); or nothing: 'beaten' (another was first: next_at is what stands),
-- 'early' (it was not time yet when the transaction began), 'busy' (somebody has the row locked: try again), 'changed' (there is
-- no such schedule any more). Locks: the schedule's row, stepping over it, then as try_send().
create or replace function notifyq.fire(
    schedule bigint,
    expected timestamptz,
    fired_for timestamptz,
    then_at timestamptz,
    out done text,
    out job bigint,
    out error text,
    out next_at bigint,
    out clock float8
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    queue_name text;
    s notifyq.schedule;
    sent record;
begin
    clock := extract(epoch from clock_timestamp());
    -- The queue first: delete_queue() locks that table and then the schedules.
    select q.name into queue_name
    from notifyq.queue q
    where q.number = (select t.queue from notifyq.schedule t where t.number = fire.schedule);
    select t.* into s
    from notifyq.schedule t
    where t.number = fire.schedule
    for update skip locked;
    if not found then
        done := case when exists (select from notifyq.schedule t where t.number = fire.schedule) then 'busy' else 'changed' end;
        return;
    end if;
    next_at := round(extract(epoch from s.next_at) * 1000000);
    if s.next_at is distinct from fire.expected then
        done := 'beaten';
        return;
    end if;
    if fire.fired_for > now() then -- the clock of sent_at: no job is older than the time it was fired for
        done := 'early';
        return;
    end if;
    if (fire.then_at > coalesce(greatest(fire.expected, fire.fired_for), '-infinity')) is not true then
        raise exception 'the next firing must come after this one, not %', coalesce(fire.then_at::text, 'null') using errcode = 'NQ003';
    end if;
    done := 'planned';
    if fire.fired_for is not null then
        begin
            select t.id, t.created into sent
            from notifyq.try_send(queue_name, s.data, headers => coalesce(s.headers, '{}') || jsonb_build_object(
                'schedule', s.name,
                'fired_for', (to_jsonb(fire.fired_for at time zone 'utc') #>> '{}') || 'Z'
            )) t;
            if sent.created then
                done := 'fired';
                job := sent.id;
            else
                done := 'skipped';
            end if;
        exception when sqlstate 'NQ003' or sqlstate 'NQ004' or data_exception or integrity_constraint_violation then
            done := 'refused';
            error := sqlerrm;
        end;
    end if;
    update notifyq.schedule t
    set next_at = fire.then_at, error = fire.error, fired_for = coalesce(fire.fired_for, t.fired_for), job = coalesce(fire.job, t.job)
    where t.number = s.number;
    next_at := round(extract(epoch from fire.then_at) * 1000000);
end
$$;

-- Keeps why a runtime cannot fire a schedule, for people to read; true if that is new. Another runtime that can
-- (it knows the time zone, say) fires it nevertheless, which takes the error away.
create or replace function notifyq.keep_schedule_error(schedule bigint, error text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform from notifyq.schedule s
    where s.number = keep_schedule_error.schedule
    and s.error is distinct from keep_schedule_error.error
    for update skip locked;
    if found then
        update notifyq.schedule s set error = keep_schedule_error.error where s.number = keep_schedule_error.schedule;
    end if;
    return found;
end
$$;
