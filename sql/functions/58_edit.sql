-- Edits of jobs that wait: update_job, upsert. A ticket is locked before the job's row is changed, and a
-- ready one is written anew: a claim that sees it sees the edited job, whatever moment it reads as of, and
-- the bell tells of it those whose claim found the old one gone.

-- Locks the ticket of a job that waits; returns where it stands, or null if it does not wait (any longer).
create or replace function notifyq.lock_waiting(job bigint) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
begin
    perform from notifyq.scheduled s where s.job = lock_waiting.job for update;
    if found then
        return 'scheduled';
    end if;
    perform from notifyq.blocked b where b.job = lock_waiting.job for update;
    if found then
        return 'blocked';
    end if;
    perform from notifyq.job j
    join notifyq.ready r on r.queue = j.queue and r.priority = j.priority and r.number = j.id and r.job = j.id
    where j.id = lock_waiting.job
    for update of r;
    if found then
        return 'ready';
    end if;
    perform from notifyq.ready r where r.job = lock_waiting.job and r.number <> r.job for update;
    if found then
        return 'ready';
    end if;
    return null;
end
$$;

-- Edits a job that waits, by id, or by queue and key (id_key, or else the key of the one that is next in
-- line); what is null stays (data => 'null' is none). delay or due_at: it starts then, now if that is past; one that waits for
-- parents still does. Returns its id, or null if none waits: an active job is never edited.
-- Raises NQ001, NQ003, NQ004. Locks: the ticket, then the job.
create or replace function notifyq.update_job(
    job bigint default null,
    queue text default null,
    key text default null,
    id_key text default null,
    data jsonb default null,
    priority int default null,
    delay interval default null,
    due_at timestamptz default null
) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    q notifyq.queue;
    found_job bigint := update_job.job;
    candidate bigint;
begin
    if num_nonnulls(update_job.job, update_job.key, update_job.id_key) <> 1 or (update_job.job is null) <> (update_job.queue is not null) then
        raise exception 'name the job by its id alone, or by queue and key, or by queue and id_key'
        using errcode = 'NQ003', hint = 'For example update_job(job => 7, ...) or update_job(queue => ''mail'', key => ''ann'', ...).';
    end if;
    perform notifyq.options_fit(update_job.priority, update_job.delay, update_job.due_at, null, null, null, null, null);
    if update_job.queue is not null then
        q := notifyq.queue_named(update_job.queue);
    end if;
    if update_job.id_key is not null then
        select k.job into found_job from notifyq.id_key k where k.queue = q.number and k.key = update_job.id_key;
    end if;
    if update_job.key is not null then
        for candidate in
            select j.id from notifyq.job j where j.queue = q.number and j.key = update_job.key order by j.priority desc, j.id
        loop
            if notifyq.edit(candidate, update_job.data, update_job.priority, update_job.delay, update_job.due_at) then
                return candidate;
            end if;
        end loop;
        return null;
    end if;
    return case when notifyq.edit(found_job, update_job.data, update_job.priority, update_job.delay, update_job.due_at) then found_job end;
end
$$;

-- Takes the ready ticket of a job.
create or replace function notifyq.take_ready(job notifyq.job) returns notifyq.ready
language sql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
    with own as (
        delete from notifyq.ready r
        where r.queue = (take_ready.job).queue
        and r.priority = (take_ready.job).priority
        and r.number = (take_ready.job).id
        and r.job = (take_ready.job).id
        returning r.*
    ), other as (
        delete from notifyq.ready r
        where r.job = (take_ready.job).id
        and r.number <> r.job
        returning r.*
    )
    select * from own
    union all
    select * from other
$$;

-- The edit of one job; false if it does not wait.
create or replace function notifyq.edit(job bigint, data jsonb, priority int, delay interval, due_at timestamptz) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    stands text;
    due constant timestamptz := coalesce(edit.due_at, clock_timestamp() + edit.delay);
    j notifyq.job;
    q notifyq.queue;
    ticket notifyq.ready;
    moved notifyq.ready;
    rank smallint;
begin
    perform notifyq.lock_gates(array[edit.job]);
    -- Its ticket may move while we wait for who moves it, and stands elsewhere then, or anew.
    for round in 1 .. 10 loop
        stands := notifyq.lock_waiting(edit.job);
        exit when stands is not null
            or exists (select from notifyq.active a where a.job = edit.job)
            or not exists (select from notifyq.job o where o.id = edit.job);
    end loop;
    if stands is null then
        return false;
    end if;
    select * into j from notifyq.job o where o.id = edit.job;
    select * into q from notifyq.queue o where o.number = j.queue;
    if due is not null and j.expires_at is not null then
        -- As long after its new moment as it was after the one before.
        update notifyq.job o
        set expires_at = greatest(due, now()) + (j.expires_at - greatest(j.sent_at, (select s.due_at from notifyq.scheduled s where s.job = j.id)))
        where o.id = edit.job;
    end if;
    if edit.data is not null then
        perform notifyq.data_fits(edit.data, q);
    end if;
    rank := coalesce(edit.priority::smallint, j.priority);
    if stands = 'blocked' then
        -- One that waits for its key alone takes its new place in line, where the gate looks at it again.
        with gone as (
            delete from notifyq.blocked b
            where b.job = edit.job
            and b.parents = 0
            and (due > clock_timestamp() or edit.priority is not null)
            returning b.*
        ), later as (
            insert into notifyq.scheduled (job, queue, attempt, due_at)
            select g.job, g.queue, g.attempt, due
            from gone g
            where due > clock_timestamp()
        )
        insert into notifyq.ready as t (queue, priority, number, job, attempt)
        select g.queue, notifyq.line_priority(rank, q.ageing), case when q.ageing is null then g.number
            else notifyq.line_number(g.job, rank, q.ageing) end, g.job, g.attempt
        from gone g
        where (due > clock_timestamp()) is not true
        returning t.* into moved;
        update notifyq.blocked b
        set priority = case when b.parents > 0 then rank else b.priority end, due_at = coalesce(due, b.due_at)
        where b.job = edit.job;
    end if;
    if stands = 'ready' then
        ticket := notifyq.take_ready(j);
        if due > clock_timestamp() then
            insert into notifyq.scheduled (job, queue, attempt, due_at)
            values (j.id, j.queue, ticket.attempt, due);
            if q.gated then
                perform notifyq.advance(q, array[coalesce(j.key, '')]);
            end if;
        else
            insert into notifyq.ready as t (queue, priority, number, job, attempt)
            values (j.queue, notifyq.line_priority(rank, q.ageing), case when q.ageing is null or edit.priority is null then ticket.number
                else notifyq.line_number(j.id, rank, q.ageing) end, j.id, ticket.attempt)
            returning t.* into moved;
        end if;
    end if;
    if stands = 'scheduled' and due is not null then
        delete from notifyq.scheduled s where s.job = j.id returning s.attempt into ticket.attempt;
        if due > clock_timestamp() then
            insert into notifyq.scheduled (job, queue, attempt, due_at)
            values (j.id, j.queue, ticket.attempt, due);
            -- The others of its key do not wait for it any longer.
            update notifyq.key k
            set turn = null
            where k.queue = j.queue
            and k.generation = (select notifyq.generation(j.queue))
            and k.key = coalesce(j.key, '')
            and k.turn = j.id;
            if found then
                perform notifyq.advance(q, array[coalesce(j.key, '')]);
            end if;
        else
            insert into notifyq.ready (queue, priority, number, job, attempt)
            values (j.queue, notifyq.line_priority(rank, q.ageing), notifyq.line_number(nextval('notifyq.job_id_seq'), rank, q.ageing), j.id, ticket.attempt);
        end if;
    end if;
    if moved.job is not null then
        perform notifyq.ring_back(array[moved]);
    end if;
    if num_nonnulls(edit.data, edit.priority) > 0 then
        update notifyq.job o
        set data = case when edit.data is null then o.data else nullif(edit.data, 'null') end, priority = rank
        where o.id = edit.job;
    end if;
    return true;
end
$$;

-- Edits the job of a key that waits, or sends one, atomically: of two calls with a key that no job
-- has, one sends and the other edits. Of a queue with the policy 'exclusive' whose job of this key is active
-- it does neither, as send(): not created, and id is the active job. Raises as update_job() and send(), and NQ006 (isolation level).
create or replace function notifyq.upsert(
    queue text,
    data jsonb default null,
    key text default null,
    priority int default null,
    delay interval default null,
    due_at timestamptz default null,
    out id bigint,
    out created boolean
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    refused_by bigint;
begin
    if current_setting('transaction_isolation') = 'repeatable read' then
        raise exception 'upsert does not work in REPEATABLE READ transactions: another''s job would not be seen'
        using errcode = 'NQ006', hint = 'Use READ COMMITTED, or SERIALIZABLE and try again when it fails.';
    end if;
    if upsert.key is null then
        raise exception 'upsert needs a key' using errcode = 'NQ003', hint = 'It edits the job of this key that waits, or sends one.';
    end if;
    perform pg_advisory_xact_lock(notifyq.lock_class('upsert'), hashtext((notifyq.queue_named(upsert.queue)).number || ':' || upsert.key));
    loop
        upsert.id := notifyq.update_job(queue => upsert.queue, key => upsert.key, data => upsert.data, priority => upsert.priority,
            delay => upsert.delay, due_at => upsert.due_at);
        upsert.created := upsert.id is null;
        exit when not upsert.created;
        select s.id, s.created into upsert.id, upsert.created
        from notifyq.try_send(upsert.queue, nullif(upsert.data, 'null'), key => upsert.key, priority => upsert.priority, delay => upsert.delay, due_at => upsert.due_at) s;
        -- Refused by the policy: what a send has made meanwhile can be edited; if it has gone, there is room for another.
        exit when upsert.created
            or notifyq.edit(upsert.id, upsert.data, upsert.priority, upsert.delay, upsert.due_at)
            or upsert.id = refused_by
            or exists (select from notifyq.active a where a.job = upsert.id);
        refused_by := upsert.id;
    end loop;
end
$$;
