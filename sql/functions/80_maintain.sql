-- Maintenance: archive leaves made ahead and dropped, old rows purged, waiting jobs expired.
-- Any runtime may call these; each does nothing while another session is at it.

-- Fails waiting jobs whose time is over, as 'expired'; returns how many. Locks: tickets, jobs.
create or replace function notifyq.expire(how_many int default 1000) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    ended notifyq.active[];
begin
    if not pg_try_advisory_xact_lock(notifyq.lock_class('expire'), 0) then
        return 0;
    end if;
    select array_agg(w) into ended
    from notifyq.leave_waiting(array(
        select j.id
        from notifyq.job j
        where j.expires_at <= clock_timestamp()
        and not exists (select from notifyq.active a where a.job = j.id)
        limit expire.how_many
    )) w;
    if ended is null then
        return 0;
    end if;
    insert into notifyq.attempt (job, attempt, type, message)
    select e.job, e.attempt, 'expired', 'not started in its time, which ended at ' || j.expires_at
    from unnest(ended) e
    join notifyq.job j on j.id = e.job;
    perform notifyq.finish(ended, 'failed');
    return cardinality(ended);
end
$$;

-- Deletes finished rows that no leaf takes with it, in one small batch; returns how many.
create or replace function notifyq.purge(how_many int default 1000) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    gone bigint[];
begin
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
        where a.id = old.id
        returning a.id
    )
    select array_agg(d.id) into gone from deleted d;
    perform notifyq.forget(gone);
    return coalesce(cardinality(gone), 0);
end
$$;

-- Makes the archive's leaves for today and the days ahead, and drops those whose day has come;
-- returns how many of either. SECURITY DEFINER: runtimes have no right to create tables.
--
-- A leaf is made apart and attached, since CREATE … PARTITION OF waits for every reader while
-- every completion waits for it. An old one is emptied, then dropped under a short
-- lock_timeout; what could not be done now is done the next time.
create or replace function notifyq.turn_leaves(days_ahead int default 3) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
    leaf record;
    turned int := 0;
begin
    if not pg_try_advisory_xact_lock(notifyq.lock_class('leaves'), 0) then
        return 0;
    end if;
    for leaf in
        select d.day, 'archive_' || to_char(d.day, 'YYYYMMDD') as name, min(ahead) = 0 as in_use
        from notifyq.queue q
        cross join generate_series(0, turn_leaves.days_ahead) ahead
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
            turned := turned + 1;
        exception when lock_not_available or deadlock_detected then
            null;
        end;
    end loop;
    for leaf in
        select c.relname as name
        from pg_inherits i
        join pg_class c on c.oid = i.inhrelid
        where i.inhparent = 'notifyq.archive'::regclass
        and c.relname ~ '^archive_[0-9]{8}$'
        and c.relname <= 'archive_' || to_char(now() at time zone 'utc', 'YYYYMMDD')
    loop
        begin
            execute format('delete from notifyq.attempt a using notifyq.%I l where a.job = l.id', leaf.name);
            execute format('delete from notifyq.id_key k using notifyq.%I l where k.job = l.id', leaf.name);
            execute format('truncate notifyq.%I', leaf.name);
            execute format('drop table notifyq.%I', leaf.name);
            turned := turned + 1;
        exception when lock_not_available or deadlock_detected then
            null;
        end;
    end loop;
    return turned;
end
$$;

-- All of it, and what runtimes do for themselves: an installation without one calls this from
-- cron. True: a batch was full, so there is more to do at once.
create or replace function notifyq.maintain() returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    more boolean;
begin
    perform notifyq.rescue();
    more := notifyq.promote() = 1000;
    more := notifyq.expire() = 1000 or more;
    more := notifyq.purge() = 1000 or more;
    perform notifyq.turn_leaves();
    return more;
end
$$;
