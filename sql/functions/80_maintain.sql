-- Maintenance: waiting jobs expired, old rows purged, archive leaves made ahead and dropped.
-- Any runtime may call these; each does nothing while another session is at it.

-- Fails jobs whose time is over before their first attempt has started, as 'expired'; returns how
-- many. claim() does the same for those it meets. Locks: tickets, jobs.
create or replace function notifyq.expire(how_many int default 1000) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
as $$
declare
    moment constant timestamptz := clock_timestamp();
    late bigint[];
    ended notifyq.active[];
begin
    perform notifyq.how_many_fits(expire.how_many);
    if not pg_try_advisory_xact_lock(notifyq.lock_class('expire'), 0) then
        return 0;
    end if;
    late := array(
        select j.id
        from notifyq.job j
        where j.expires_at <= moment
        and (
            exists (select from notifyq.ready r where r.queue = j.queue and r.priority = j.priority and r.number = j.id and r.attempt = 0 offset 0)
            or exists (select from notifyq.ready r where r.job = j.id and r.number <> r.job and r.attempt = 0 offset 0)
            or exists (select from notifyq.scheduled s where s.job = j.id and s.attempt = 0 offset 0)
            or exists (select from notifyq.blocked b where b.job = j.id and b.attempt = 0 offset 0)
        )
        limit expire.how_many
    );
    if late = '{}' then
        return 0;
    end if;
    perform notifyq.lock_gates(late);
    -- While the gates were waited for, one may have ended and been taken back, with no time to start by.
    late := array(select j.id from notifyq.job j where j.id = any (late) and j.expires_at <= moment);
    select array_agg(w) into ended from notifyq.leave_waiting(late, unstarted => true) w;
    if ended is null then
        return 0;
    end if;
    perform notifyq.end_expired(ended);
    return cardinality(ended);
end
$$;

-- Deletes finished rows that no leaf takes with it, in one small batch; returns how many. Also what is
-- remembered of slots and rates that have passed.
create or replace function notifyq.purge(how_many int default 1000) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    gone bigint[];
    rested record;
    forgotten int;
begin
    perform notifyq.how_many_fits(purge.how_many);
    if not pg_try_advisory_xact_lock(notifyq.lock_class('purge'), 0) then
        return 0;
    end if;
    with old as (
        select a.id
        from notifyq.queue q
        cross join lateral (
            select k.id
            from notifyq.archive_kept k
            where k.queue = q.number
            and k.finished_at < now() - q.retention
            limit purge.how_many
        ) a
        union all
        select d.id
        from notifyq.archive_default d
        where d.leaves_on <= (now() at time zone 'utc')::date
        limit purge.how_many
    ), deleted as (
        delete from notifyq.archive a
        using old
        where a.id = any (array[old.id])
        returning a.id
    )
    select array_agg(d.id) into gone from deleted d;
    perform notifyq.release_heads(gone);
    perform notifyq.parents_ended(gone, 'deleted');
    perform notifyq.forget(gone);
    delete from notifyq.reserved r
    where r.ctid = any (array(
        select o.ctid
        from notifyq.reserved o
        where o.until < clock_timestamp() - interval '1 minute'
        limit purge.how_many
        for update skip locked
    ));
    get diagnostics forgotten = row_count;
    for rested in
        select q.number as queue, array(
            select k.key
            from notifyq.key k
            where k.queue = q.number
            and k.generation = (select notifyq.generation(q.number))
            and k.held = 0
            and k.head is null
            and to_timestamp((k.starts[cardinality(k.starts)] + 101) * extract(epoch from q.key_rate_period)::float8 / 100) < clock_timestamp()
            limit purge.how_many
        ) as keys
        from notifyq.queue q
        where q.key_rate_limit is not null
        order by q.number
    loop
        -- Not waited for: the gates of other queues may be locked by now.
        continue when cardinality(rested.keys) = 0;
        perform from notifyq.gate g where g.queue = rested.queue order by g.generation desc limit 1 for update skip locked;
        continue when not found;
        delete from notifyq.key k
        using notifyq.queue q
        where k.queue = rested.queue
        and q.number = rested.queue
        and k.generation = (select notifyq.generation(rested.queue))
        and k.key = any (rested.keys)
        and k.held = 0
        and k.head is null
        and to_timestamp((k.starts[cardinality(k.starts)] + 101) * extract(epoch from q.key_rate_period)::float8 / 100) < clock_timestamp();
        forgotten := greatest(forgotten, cardinality(rested.keys));
    end loop;
    return greatest(cardinality(gone), forgotten);
end
$$;

-- Makes the archive's leaves for today and the days ahead; returns how many. SECURITY DEFINER, as
-- drop_leaf(): runtimes have no right to create tables.
--
-- A leaf is made apart and attached, since CREATE ... PARTITION OF waits for every reader while
-- every completion waits for it. What could not be done now is done the next time.
create or replace function notifyq.make_leaves(days_ahead int default 3) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
    leaf record;
    made int := 0;
begin
    if not pg_try_advisory_xact_lock(notifyq.lock_class('leaves'), 0) then
        return 0;
    end if;
    for leaf in
        select d.day, 'archive_' || to_char(d.day, 'YYYYMMDD') as name, min(ahead) = 0 as in_use
        from notifyq.queue q
        cross join generate_series(0, least(make_leaves.days_ahead, 31)) ahead
        cross join lateral (select notifyq.leaves_on(q.retention) + ahead as day) d
        where q.retention > '0'
        and q.retention <= interval '31 days'
        and to_regclass('notifyq.archive_' || to_char(d.day, 'YYYYMMDD')) is null
        and not exists (select from notifyq.archive_default a where a.leaves_on = d.day)
        group by d.day
        order by d.day
    loop
        begin
            if leaf.in_use then
                -- Rows of this day may be on their way to the default leaf, which would refuse them.
                lock table notifyq.archive in share row exclusive mode;
            end if;
            execute format('create table notifyq.%I (like notifyq.archive including defaults including constraints including indexes)', leaf.name);
            execute format('alter table notifyq.archive attach partition notifyq.%I for values from (%L) to (%L)', leaf.name, leaf.day, leaf.day + 1);
            made := made + 1;
        exception when lock_not_available or deadlock_detected or check_violation then
            null; -- check_violation: a row of that day reached the default leaf before we had the lock
        end;
    end loop;
    return made;
exception when lock_not_available then
    return 0; -- an upgrade has the tables
end
$$;

-- Drops one of the archive's leaves whose day has come, with what is remembered of its jobs; true
-- if there was one. In a transaction of its own: others wait for it.
--
-- The leaf is emptied, then dropped under a short lock_timeout: a plain DROP would wait for every
-- reader of the archive while every completion waits for it.
create or replace function notifyq.drop_leaf() returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
    leaf text;
    jobs bigint[];
begin
    if not pg_try_advisory_xact_lock(notifyq.lock_class('leaves'), 0) then
        return false;
    end if;
    select c.relname into leaf
    from pg_inherits i
    join pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'notifyq.archive'::regclass
    and c.relname ~ '^archive_[0-9]{8}$'
    and c.relname <= 'archive_' || to_char(now() at time zone 'utc', 'YYYYMMDD')
    order by c.relname
    limit 1;
    if leaf is null then
        return false;
    end if;
    -- A job that is being retried or resumed keeps its key and its errors: no row leaves from here on.
    execute format('lock table notifyq.%I in share row exclusive mode', leaf);
    execute format('select array_agg(k.head) from notifyq.key k join notifyq.%I l on l.id = k.head', leaf) into jobs;
    perform notifyq.release_heads(jobs);
    execute format('select array_agg(d.parent) from notifyq.dependency d join notifyq.%I l on l.id = d.parent where d.state is null', leaf) into jobs;
    perform notifyq.parents_ended(jobs, 'deleted');
    execute format('delete from notifyq.dependency d using notifyq.%I l where d.child = l.id', leaf);
    execute format('delete from notifyq.flow_job f using notifyq.%I l where f.job = l.id', leaf);
    execute format('delete from notifyq.attempt a using notifyq.%I l where a.job = l.id', leaf);
    execute format('delete from notifyq.id_key k using notifyq.%I l where k.job = l.id', leaf);
    execute format('truncate notifyq.%I', leaf);
    execute format('drop table notifyq.%I', leaf);
    return true;
exception when lock_not_available or deadlock_detected then
    return false;
end
$$;

-- All of it, for an installation without runtimes: call it from cron. True: a batch was full, so
-- there is more to do at once. Runtimes call each part in a transaction of its own.
--
-- Leaves last: an end locks a gate and then writes to the archive.
create or replace function notifyq.maintain() returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    more boolean;
begin
    perform notifyq.rescue();
    more := notifyq.expire() = 1000;
    more := notifyq.purge() = 1000 or more;
    more := notifyq.drop_leaf() or more;
    perform notifyq.make_leaves();
    return more;
end
$$;
