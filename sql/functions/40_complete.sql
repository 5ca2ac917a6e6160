-- complete: active jobs move to the archive as completed.

-- Completes a batch. outputs is a JSON array, one element a job (null: no outputs); attempts
-- null: whatever attempt is active (by hand). as_of: see snooze(); a claim that a crash of the server
-- made it forget is made again with the same attempt. A job that is not active with this attempt and
-- this runtime is left alone. Returns the ids that were completed.
--
-- BETWEEN is the = of a join that can only look up row by row (README: Plans).
--
-- Locks: gates, active tickets in the order given (give them by id), then jobs.
create or replace function notifyq.complete(
    jobs bigint[],
    outputs jsonb default null,
    attempts int[] default null,
    runtime uuid default null,
    as_of timestamptz[] default null
) returns bigint[]
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set jit = off
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    completed bigint[];
    kept_jobs bigint[];
    remembered bigint[]; -- of which there may be more than their rows, see forget()
    queues int[];
    in_flow bigint[];
    held notifyq.active[];
begin
    if complete.outputs is not null and jsonb_typeof(complete.outputs) <> 'array' then
        raise exception 'outputs must be a JSON array with one element a job' using errcode = 'NQ003';
    end if;
    if exists (select from notifyq.gate) then
        perform notifyq.lock_gates(complete.jobs);
    end if;
    with gone as (
        delete from notifyq.active a
        using rows from (
            unnest(complete.jobs), unnest(complete.attempts), jsonb_array_elements(complete.outputs), unnest(complete.as_of)
        ) as o (job, attempt, output, as_of)
        where a.job between o.job and o.job
        and a.runtime is not distinct from complete.runtime
        and (complete.attempts is null or a.attempt = o.attempt)
        and a.claimed_at <= coalesce(o.as_of, complete.as_of[1], 'infinity')
        returning a.job, a.queue, a.attempt, a.claimed_at, a.key, o.output
    ), done as (
        delete from notifyq.job j
        using gone g
        where j.id between g.job and g.job
        returning j.*, g.attempt, g.claimed_at, g.key as held_key, g.output
    ), kept as (
        insert into notifyq.archive (
            id, sent_at, expires_at, retry_delay, retry_delay_max, timeout, queue, retry_limit, priority, retry_backoff, flow, key, id_key,
            headers, provenance, data, finished_at, claimed_at, runtime, attempt, leaves_on, state, output
        )
        select k.id, k.sent_at, k.expires_at, k.retry_delay, k.retry_delay_max, k.timeout, k.queue, k.retry_limit, k.priority, k.retry_backoff, k.flow, k.key, k.id_key,
            k.headers, k.provenance, k.data, now(), k.claimed_at, complete.runtime, k.attempt, notifyq.leaves_on(q.retention), 'completed', nullif(k.output, 'null')
        from done k
        cross join lateral (select o.retention from notifyq.queue o where o.number = k.queue and (o.retention > '0') is not false offset 0) q
        returning id
    )
    select array_agg(j.id), (select array_agg(k.id) from kept k), array_agg(j.id) filter (where j.attempt > 1 or num_nonnulls(j.id_key, j.flow) > 0),
        array_agg(distinct j.queue), array_agg(j.id) filter (where j.flow is not null),
        array_agg(row(j.id, null, null, null, null, null, j.queue, j.attempt, j.held_key, null)::notifyq.active) filter (where j.held_key is not null)
    into completed, kept_jobs, remembered, queues, in_flow, held
    from done j;
    if in_flow is not null then
        perform notifyq.parents_ended(in_flow, 'completed');
    end if;
    if held is not null then
        perform notifyq.free(held, 'ended');
    end if;
    if remembered is not null then
        perform notifyq.forget(array(select unnest(remembered) except select unnest(kept_jobs)));
    end if;
    if completed is not null then
        -- one queue a settle is the usual case; ids of another in its announcement do no harm
        perform notifyq.announce(n, completed) from unnest(queues) n;
    end if;
    return coalesce(completed, '{}');
end
$$;

-- Completes one job that was claimed by hand; true if it was active.
create or replace function notifyq.complete(job bigint, output jsonb default null, attempt int default null) returns boolean
language sql
set search_path = pg_catalog, pg_temp
as $$
    select cardinality(notifyq.complete(array[complete.job], jsonb_build_array(complete.output),
        case when complete.attempt is null then null else array[complete.attempt] end, null::uuid)) = 1
$$;

-- Completes one job, or raises: for a transaction that is to be committed only if the attempt is still this runtime's. Send it
-- with its COMMIT, in one message: in between, who stands still holds the gate.
create or replace function notifyq.complete_or_raise(job bigint, output jsonb, attempt int, runtime uuid, as_of timestamptz default null) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if notifyq.complete(array[complete_or_raise.job], jsonb_build_array(complete_or_raise.output), array[complete_or_raise.attempt],
        complete_or_raise.runtime, array[complete_or_raise.as_of]) = '{}'
    then
        raise exception 'attempt % of job % is no longer held by this runtime', complete_or_raise.attempt, complete_or_raise.job
            using errcode = 'NQ007';
    end if;
end
$$;
