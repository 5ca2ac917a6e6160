-- Who may call what. A role with USAGE on the schema may send and publish, and nothing else. For what more there
-- is, three kinds of role can be granted what they need, and nothing else: a producer (what everybody with USAGE may), a
-- worker (what a runtime calls) and an operator (what the command line calls). views/99_rights.sql applies it.
--
-- No role gets a right on a table, but for the list of files (installed). What a function does to tables it does
-- as its owner: those that are granted and touch one are SECURITY DEFINER, all others run as who calls them, and
-- are out of reach.

-- What a kind of role may do: 'execute' on functions (all forms of one name), 'select' on views.
create or replace function notifyq.rights(kind text) returns table (privilege text, object text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    with granted (kinds, names) as (
        values
        ('{producer,worker,operator}'::text[], '{send,try_send,send_many,send_flow,publish}'::text[]),
        -- which queues there are, and where they ring; waiting for a result
        ('{worker,operator}', '{queue_named,channel,lock_class,next_due,hold_interest,drop_interest,no_settle_under_way,parents}'),
        ('{worker}', '{claim,say_taken,complete,complete_or_raise,fail,snooze,release,discard,touch,progress}'),
        ('{worker}', '{register,beat,stop,held,deregister,rescue,served,stand_free,stand_busy,stand_far}'),
        ('{worker}', '{schedules_ahead,fire,keep_schedule_error}'),
        ('{worker}', '{expire,purge,make_leaves,drop_leaf,maintain}'),
        ('{operator}', '{create_queue,update_queue,delete_queue,pause,resume_queue}'),
        ('{operator}', '{cancel,retry,resume,delete,delete_all,redrive,update_job,upsert,flow}'),
        ('{operator}', '{schedule,unschedule,declare_schedules,subscribe,unsubscribe,missing_rights}'),
        ('{operator}', '{jobs,queue_stats,runtimes,blocked_keys,schedules,subscriptions}')
    )
    select case when o.is_view then 'select' else 'execute' end, o.name
    from granted g
    cross join lateral unnest(g.names) n (name)
    join (
        select p.proname::text as short, p.oid::regprocedure::text as name, false as is_view
        from pg_proc p
        where p.pronamespace = 'notifyq'::regnamespace
        union all
        select c.relname::text, c.oid::regclass::text, true
        from pg_class c
        where c.relnamespace = 'notifyq'::regnamespace
        and c.relkind = 'v'
    ) o on o.short = n.name
    where rights.kind = any (g.kinds)
    order by 1, 2
$$;

-- Gives a role what its kind may do, now. Only the owner of the functions and of the schema can.
create or replace function notifyq.give_rights(kind text, role text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    functions text := (select string_agg(r.object, ', ') from notifyq.rights(give_rights.kind) r where r.privilege = 'execute');
    views text := (select string_agg(r.object, ', ') from notifyq.rights(give_rights.kind) r where r.privilege = 'select');
begin
    if not has_schema_privilege(give_rights.role, 'notifyq', 'usage') then
        begin
            execute format('grant usage on schema notifyq to %I', give_rights.role);
        exception when insufficient_privilege then
            null; -- said below: of a schema that one only has some right on, it is a warning
        end;
        if not has_schema_privilege(give_rights.role, 'notifyq', 'usage') then
            raise exception 'role % has no USAGE on the schema, and % is not its owner', quote_ident(give_rights.role), quote_ident(current_user)
            using errcode = 'insufficient_privilege', hint = format('As its owner: grant usage on schema notifyq to %I;', give_rights.role);
        end if;
    end if;
    execute format('grant execute on function %s to %I', functions, give_rights.role);
    if views is not null then
        execute format('grant select on %s to %I', views, give_rights.role);
    end if;
end
$$;

-- Applies what is granted to whom, anew: a function that was made anew, or is new, has lost it or never had it.
-- Extra rights that somebody has granted stay.
create or replace function notifyq.apply_rights() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    lock table notifyq.granted in share row exclusive mode;
    execute format('grant execute on function %s to public', (select string_agg(r.object, ', ') from notifyq.rights('producer') r));
    perform notifyq.give_rights(g.kind, g.role)
    from notifyq.granted g
    join pg_roles r on r.rolname = g.role; -- one that was dropped since is missing_rights()'s to tell
end
$$;

-- Makes a role a producer, a worker or an operator, from now on: it has what its kind may do, also after upgrades. One that
-- does not exist is created, without LOGIN: let the roles that log in be members of it. Raises NQ003, and 42501 if the
-- caller may not do it.
create or replace function notifyq.grant_role(kind text, role text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if (grant_role.kind in ('producer', 'worker', 'operator')) is not true then
        raise exception 'not a kind of role: %', coalesce(quote_literal(grant_role.kind), 'null')
        using errcode = 'NQ003', hint = 'Kinds are producer, worker and operator.';
    end if;
    if (octet_length(grant_role.role) between 1 and 63) is not true or grant_role.role ~ '^(pg_.*|public|none)$' then
        raise exception 'not a name of a role: %', coalesce(quote_literal(grant_role.role), 'null')
        using errcode = 'NQ003', hint = 'A name is 1 to 63 bytes long, does not begin with pg_, and is not public or none.';
    end if;
    if not exists (select from pg_roles r where r.rolname = grant_role.role) then
        begin
            execute format('create role %I nologin', grant_role.role);
        exception when insufficient_privilege then
            raise exception 'there is no role %, and % may not create roles', quote_ident(grant_role.role), quote_ident(current_user)
            using errcode = 'insufficient_privilege', hint = format('As a role with CREATEROLE: create role %I nologin; and then again.', grant_role.role);
        end;
    end if;
    lock table notifyq.granted in share row exclusive mode;
    insert into notifyq.granted (kind, role)
    values (grant_role.kind, grant_role.role)
    on conflict do nothing;
    perform notifyq.give_rights(grant_role.kind, grant_role.role);
end
$$;

-- Ends that; true if the role was of this kind. What it may as one of another kind stays, and so does the role itself.
create or replace function notifyq.revoke_role(kind text, role text) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    object record;
begin
    lock table notifyq.granted in share row exclusive mode;
    delete from notifyq.granted g where g.kind = revoke_role.kind and g.role = revoke_role.role;
    if not found then
        return false;
    end if;
    if not exists (select from pg_roles r where r.rolname = revoke_role.role) then
        return true;
    end if;
    for object in
        select r.privilege, case r.privilege when 'execute' then 'function ' else '' end || r.object as name
        from notifyq.rights(revoke_role.kind) r
        except
        select r.privilege, case r.privilege when 'execute' then 'function ' else '' end || r.object
        from notifyq.granted g
        cross join lateral notifyq.rights(g.kind) r
        where g.role = revoke_role.role
    loop
        execute format('revoke %s on %s from %I', object.privilege, object.name, revoke_role.role);
    end loop;
    if not exists (select from notifyq.granted g where g.role = revoke_role.role) then
        execute format('revoke usage on schema notifyq from %I', revoke_role.role);
    end if;
    return true;
end
$$;

-- What is not as it was granted: rights that a role lacks, and such that everybody has and should not. Empty: all is well.
-- SECURITY DEFINER: an operator asks, who may not read what is granted to whom.
create or replace function notifyq.missing_rights() returns table (role text, problem text)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select g.role, 'does not exist'
    from notifyq.granted g
    where not exists (select from pg_roles r where r.rolname = g.role)
    union
    select g.role, 'lacks usage on schema notifyq'
    from notifyq.granted g
    join pg_roles r on r.rolname = g.role
    where not has_schema_privilege(r.oid, 'notifyq', 'usage')
    union
    -- who may make functions in it could make one that ours take for their own
    select g.role, 'has create on schema notifyq'
    from notifyq.granted g
    join pg_roles r on r.rolname = g.role
    where has_schema_privilege(r.oid, 'notifyq', 'create')
    union
    select 'public', 'has create on schema notifyq'
    where has_schema_privilege('public', 'notifyq', 'create')
    union
    select g.role, format('lacks %s on %s', o.privilege, o.object)
    from notifyq.granted g
    join pg_roles r on r.rolname = g.role
    cross join lateral notifyq.rights(g.kind) o
    where case o.privilege
        when 'execute' then not has_function_privilege(r.oid, o.object, 'execute')
        else not has_table_privilege(r.oid, o.object, 'select')
    end
    union
    select 'public', format('lacks execute on %s', o.object)
    from notifyq.rights('producer') o
    where not has_function_privilege('public', o.object, 'execute')
    union
    select 'public', format('has execute on %s', p.oid::regprocedure)
    from pg_proc p
    where p.pronamespace = 'notifyq'::regnamespace
    and has_function_privilege('public', p.oid, 'execute')
    and p.oid::regprocedure::text not in (select o.object from notifyq.rights('producer') o)
    union
    select 'public', format('has select on %s', c.oid::regclass)
    from pg_class c
    where c.relnamespace = 'notifyq'::regnamespace
    and c.relkind in ('r', 'p', 'v', 'm')
    and c.relname <> 'installed'
    and has_table_privilege('public', c.oid, 'select')
    order by 1, 2
$$;
