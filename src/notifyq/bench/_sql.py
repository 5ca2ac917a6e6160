"""The benchmark's own SQL: the bare limit by hand, and what it asks the server about."""

from __future__ import annotations

from typing import LiteralString

BARE_SETUP: LiteralString = """
create table bare (id bigint generated always as identity primary key, sent bigint not null);
create function bare_ring() returns trigger language plpgsql as $$
begin
    perform pg_notify('bare', '');
    return null;
end
$$;
create trigger bell after insert on bare for each statement execute function bare_ring();
create table bare_plain (id bigint generated always as identity primary key, data jsonb);
create table bare_done (id bigint primary key, data jsonb, output jsonb);
"""
CREATE_DATABASE: LiteralString = "create database {}"
DROP_DATABASE: LiteralString = "drop database {} with (force)"
BARE_LISTEN: LiteralString = "listen bare"
BARE_SEND: LiteralString = "insert into bare (sent) values (%s)"
BARE_CLAIM: LiteralString = (
    "delete from bare where id = (select id from bare order by id limit 1 for update skip locked) returning sent"
)
BARE_SEND_ONE: LiteralString = "insert into bare_plain (data) values ('1')"
BARE_FILL: LiteralString = "insert into bare_plain (data) select o -> 'data' from jsonb_array_elements(%s::jsonb) o"
BARE_FILL_RING: LiteralString = """
with sent as (
    insert into bare_plain (data) select o -> 'data' from jsonb_array_elements(%s::jsonb) o
    returning id
)
select pg_notify('bare', '') from (select count(*) from sent) s
"""
BARE_TAKE: LiteralString = """
with gone as (
    delete from bare_plain
    where id = any (array(select id from bare_plain order by id limit %(rows)s for update skip locked))
    returning id, data
), kept as (
    insert into bare_done
    select id, data, data from gone where %(kept)s
)
select id, data from gone
"""
SEND_ONE: LiteralString = "select notifyq.send('queue', '1')"
SEND_ALL: LiteralString = "select count(*) from notifyq.send_many('bench.drain', %s::jsonb)"
SEND_NUMBERS: LiteralString = (
    "select count(*) from notifyq.send_many(%s,"
    " (select jsonb_agg(jsonb_build_object('data', number)) from generate_series(1, %s) number))"
)
SCALING_SPAN: LiteralString = (
    "select count(*), extract(epoch from max(finished_at) - min(claimed_at))::float8 from notifyq.archive"
    " where queue = (select number from notifyq.queue where name = %s) and state = 'completed'"
)
UNFINISHED: LiteralString = (
    "select exists (select from notifyq.ready) or exists (select from notifyq.active)"
    " or exists (select from notifyq.scheduled)"
)
PICKUPS: LiteralString = "select output from notifyq.jobs where queue = %s and state = 'completed' order by id"
SAMPLED_PICKUPS: LiteralString = (
    "select (output #>> '{}')::float8 / 1e6 from notifyq.archive"
    " where state = 'completed' and mod(id, 10) = 0 and (data #>> '{}')::bigint > %s order by id"
)
TAKE_SNAPSHOT: LiteralString = "select count(*) from notifyq.queue"
CLEAR: LiteralString = (
    "truncate notifyq.job, notifyq.ready, notifyq.scheduled, notifyq.blocked, notifyq.active, notifyq.archive,"
    " notifyq.attempt, notifyq.key, notifyq.gate, notifyq.reserved, notifyq.id_key, notifyq.dependency,"
    " notifyq.flow_job, bare, bare_plain, bare_done"
)
SEND_TO: LiteralString = "select count(*) from notifyq.send_many(%s, %s::jsonb)"
CLAIM_HELD: LiteralString = "select id from notifyq.claim(%s, 1000, lease => '1 day')"
STAND_READY: LiteralString = (
    "select from notifyq.ready r join notifyq.queue q on q.number = r.queue where q.name = %s limit 1"
)
SEND_MOMENT: LiteralString = "select notifyq.send(%s, to_jsonb(%s::bigint))"
UNFINISHED_BUT_HELD: LiteralString = (
    "select exists (select from notifyq.ready) or exists (select from notifyq.active where runtime is not null)"
    " or exists (select from notifyq.scheduled) or exists (select from notifyq.blocked where key not like 'held%%')"
)
OTHERS: LiteralString = (
    "select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()"
)
MAX_CONNECTIONS: LiteralString = "select current_setting('max_connections')::int"
SETTINGS: LiteralString = (
    "select name, setting from pg_settings where name in"
    " ('server_version', 'fsync', 'synchronous_commit', 'shared_buffers', 'max_wal_size', 'wal_compression')"
)

# Two databases: a runtime that only exists there claims.
MAKE_QUEUES: LiteralString = """
select notifyq.create_queue('bench.q' || n) from generate_series(1, %s) n
union all
select notifyq.create_queue('bench.keyed', '{"policy": "singleton"}')
"""
REGISTER: LiteralString = (
    "select notifyq.register('00000000-0000-0000-0000-000000000001', array['bench.q1', 'bench.keyed'], '1 day')"
)
CLAIM: LiteralString = (
    "select array_agg(id order by id) from notifyq.claim(%s, %s, '00000000-0000-0000-0000-000000000001')"
)
COMPLETE: LiteralString = "select notifyq.complete(%s::bigint[], null, null, '00000000-0000-0000-0000-000000000001')"
FILL: LiteralString = """
select count(*)
from notifyq.send_many('bench.q1', (select jsonb_agg('{"data": 1}'::jsonb) from generate_series(1, %(rows)s)))
"""
FILL_HELD: LiteralString = """
select count(*)
from notifyq.send_many('bench.keyed', (
    select jsonb_agg(jsonb_build_object('key', 'held' || mod(n, 100))) from generate_series(1, %(rows)s) n
))
"""
SEND_25_KEYS: LiteralString = """
select count(*)
from notifyq.send_many('bench.keyed', (
    select jsonb_agg(jsonb_build_object('key', 'k' || mod(n, 25))) from generate_series(1, 50) n
))
"""
FILL_QUEUES: LiteralString = """
select count(*)
from generate_series(1, %(queues)s) q,
    lateral notifyq.send_many('bench.q' || q, (
        select jsonb_agg('{"data": 1}'::jsonb) from generate_series(1, %(each)s) n where q > 0
    )) s
"""
BARE_FILL_MANY: LiteralString = "insert into bare_plain (data) select '1' from generate_series(1, %(rows)s)"
BARE_QUEUED_SETUP: LiteralString = """
create table bare_queued (
    queue int not null,
    id bigint generated always as identity,
    data jsonb,
    primary key (queue, id)
)
"""
BARE_QUEUED_FILL: LiteralString = """
insert into bare_queued (queue, data)
select q, '1' from generate_series(1, %(queues)s) q, generate_series(1, %(each)s)
"""
BARE_QUEUED_TAKE: LiteralString = """
with gone as (
    delete from bare_queued
    where (queue, id) in (
        select queue, id from bare_queued where queue = %s order by id limit %s for update skip locked
    )
    returning id, data
), kept as (
    insert into bare_done
    select id, data, data from gone
)
select id, data from gone
"""
OUTPUTS: LiteralString = (
    "select (output #>> '{}')::float8 / 1e6 from notifyq.archive where state = 'completed' order by id"
)

# What an idle runtime does.
EXTENSION: LiteralString = "create extension if not exists pg_stat_statements"
STATEMENTS: LiteralString = """
select coalesce(sum(s.calls), 0)
from pg_stat_statements s
join pg_database d on d.oid = s.dbid
where d.datname = %s
"""
TRANSACTIONS: LiteralString = "select xact_commit + xact_rollback from pg_stat_database where datname = %s"
CONNECTIONS: LiteralString = "select count(*) from pg_stat_activity where datname = %s"
AUTOVACUUM_OFF: LiteralString = "alter system set autovacuum = off"
AUTOVACUUM_BACK: LiteralString = "alter system reset autovacuum"
RELOAD: LiteralString = "select pg_reload_conf()"
