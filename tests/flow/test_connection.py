"""The trio driver and the pool: whatever is cancelled, nobody gets a connection mid-query."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING

import psycopg
import psycopg_pool
import pytest
import trio
import trio.testing
from psycopg.pq import TransactionStatus

from notifyq import _connection, testing
from notifyq._errors import ClientClosed, ConnectionLost
from notifyq._opening import open_connection, run_abandonable
from notifyq._pool import Pool

if TYPE_CHECKING:
    from notifyq._connection import TrioConnection


async def value(connection: TrioConnection, statement: str) -> object:
    row = await (await connection.execute(statement.encode())).fetchone()
    assert row is not None
    return row[0]


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope at the n-th step of one task."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self._task = trio.lowlevel.current_task()
        self._scope = scope
        self._left = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


async def cancelled_at(step: int, use: object) -> bool:
    """Run ``use`` and cancel it at its n-th step; False if it had ended before."""
    with trio.CancelScope() as scope:
        instrument = CancelAtStep(scope, step)
        trio.lowlevel.add_instrument(instrument)
        try:
            await use()  # type: ignore[operator]
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return scope.cancelled_caught


async def test_cancelling_at_every_checkpoint_leaves_a_connection_clean_or_replaced(dsn):
    async with Pool(dsn, size=1, connect_timeout=10) as pool:

        async def use() -> None:
            async with pool.connection() as connection, connection.transaction():
                await connection.execute("select pg_sleep(0.005)")
                async with connection.transaction():
                    await connection.execute("select 1")
                async with connection.pipeline():
                    await connection.execute("select 2")
                    await connection.execute("select 3")

        step = 0
        cancelled = True
        while cancelled:
            step += 1
            cancelled = await cancelled_at(step, use)
            # the next borrower gets the answer to its own question, outside any transaction
            with trio.fail_after(10):
                async with pool.connection() as connection:
                    assert connection.pgconn.transaction_status == TransactionStatus.IDLE
                    assert await value(connection, f"select {step}") == step
        assert step > 10


async def test_a_cancelled_query_ends_on_the_server_and_the_connection_goes_on(connection, other):
    backend = connection.info.backend_pid
    with trio.move_on_after(0.1):
        await connection.execute("select pg_sleep(600)")
    assert not connection.closed
    assert await value(other, f"select state from pg_stat_activity where pid = {backend}") == "idle"
    assert await value(connection, "select 42") == 42


async def test_a_statement_of_a_task_that_is_cancelled_already_leaves_the_connection_as_it_was(connection):
    for _ in range(3):  # as it is, prepared, and from then on
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.fetch("select 1")
        assert scope.cancelled_caught
        assert connection.clean
        await connection.fetch("select 1")


async def test_cancelling_inside_a_transaction_rolls_it_back(connection):
    await connection.execute("create temporary table t (n int)")
    with trio.move_on_after(0.1):
        async with connection.transaction():
            await connection.execute("insert into t values (1)")
            await connection.execute("select pg_sleep(600)")
    assert connection.pgconn.transaction_status == TransactionStatus.IDLE
    assert await value(connection, "select count(*) from t") == 0


async def test_a_savepoint_rolls_back_alone(connection):
    await connection.execute("create temporary table t (n int)")
    async with connection.transaction():
        await connection.execute("insert into t values (1)")
        async with connection.transaction():
            await connection.execute("insert into t values (2)")
            raise psycopg.Rollback
    assert await value(connection, "select sum(n) from t") == 1


async def test_megabytes_both_ways_do_not_deadlock(connection):
    text = "x" * 20_000_000
    row = await (await connection.execute("select %s || 'y'", (text,))).fetchone()
    assert len(row[0]) == len(text) + 1


async def test_tasks_queue_for_one_connection(connection):
    results = []

    async def ask(number: int) -> None:
        results.append(await value(connection, f"select {number}"))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(ask, number)
    assert sorted(results) == list(range(20))


async def test_a_notification_in_a_replys_tail_is_heard(connection):
    heard = []
    connection.add_notify_handler(heard.append)
    await connection.execute("listen bell")
    for number in range(200):
        await connection.execute(f"notify bell, '{number}'".encode())
    with trio.fail_after(5):
        while len(heard) < 200:
            await connection.wait_input()
    assert [notification.payload for notification in heard] == [str(number) for number in range(200)]


async def test_a_broken_connection_is_replaced(dsn, connection):
    async with Pool(dsn, size=1, connect_timeout=10) as pool:
        async with pool.connection() as lent:
            await connection.execute("select pg_terminate_backend(%s)", (lent.info.backend_pid,))
            with pytest.raises(psycopg.OperationalError):
                await lent.execute("select 1")
        with trio.fail_after(10):
            async with pool.connection() as lent:
                assert await value(lent, "select 1") == 1


async def test_what_a_borrower_leaves_open_is_rolled_back(dsn):
    async with Pool(dsn, size=1, connect_timeout=10) as pool:
        async with pool.connection() as lent:
            await lent.execute("create table t (n int)")
            await lent.execute("begin")
            await lent.execute("insert into t values (1)")
        async with pool.connection() as lent:
            assert await value(lent, "select count(*) from t") == 0


async def test_a_pool_lends_no_more_than_its_size_and_counts(dsn):
    async with Pool(dsn, size=2, connect_timeout=10) as pool:
        async with pool.connection(), pool.connection():
            with trio.move_on_after(0.05) as patience:
                async with pool.connection():
                    pass
            assert patience.cancelled_caught
            assert pool.statistics().on_loan == 2
        assert pool.statistics().on_loan == 0
    with pytest.raises(ClientClosed):
        async with pool.connection():
            pass


async def test_no_server_is_connection_lost_in_the_stated_time(tmp_path):
    async with Pool(f"host={tmp_path} dbname=none", size=1, connect_timeout=0.2) as pool:
        with pytest.raises(ConnectionLost, match=r"0\.2 s"):
            async with pool.connection():
                pass


async def test_connections_are_in_read_committed_whatever_the_database_says(dsn, connection):
    await connection.execute(
        f"alter database {connection.info.dbname} set default_transaction_isolation = 'serializable'".encode()
    )
    async with Pool(dsn, size=1, connect_timeout=10) as pool, pool.connection() as lent:
        assert await value(lent, "show transaction_isolation") == "read committed"
    async with await open_connection(dsn) as opened:
        assert await value(opened, "show transaction_isolation") == "read committed"


async def received(connection: TrioConnection) -> object:
    while (rows := connection.received()) is None:
        await connection.wait_input()
    return rows


async def test_a_prepared_statement_is_sent_without_waiting_when_the_connection_is_free(connection):
    statement = "select $1::int / $2::int"
    assert connection.received() is None
    assert not connection.send(statement, [b"6", b"2"])  # not prepared
    await connection.fetch(statement, [b"6", b"2"])
    assert not connection.send(statement, [b"6", b"2"])  # nor after one execution
    await connection.prepare(statement)
    with trio.fail_after(10):
        async with connection.lock:
            assert not connection.send(statement, [b"6", b"2"])
        for _ in range(3):
            assert connection.send(statement, [b"6", b"2"])
            assert not connection.send(statement, [b"8", b"2"])  # one at a time
            assert await received(connection) == [(3,)]
            assert connection.send(statement, [b"6", b"0"])
            with pytest.raises(psycopg.errors.DivisionByZero):
                await received(connection)
            assert await connection.fetch(statement, [b"6", b"2"]) == [(3,)]


async def test_nobody_gets_a_connection_between_a_statement_that_was_sent_and_its_answer(connection):
    statement = "select $1::int"
    await connection.prepare(statement)
    async with trio.open_nursery() as nursery:
        assert connection.send(statement, [b"1"])
        answers: list[object] = []

        async def fetch() -> None:
            answers.append(await connection.fetch(statement, [b"2"]))

        nursery.start_soon(fetch)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert answers == []
        with trio.fail_after(10):
            assert await received(connection) == [(1,)]
    assert answers == [[(2,)]]


async def test_a_statement_sent_on_a_connection_that_broke_fails(connection, other):
    statement = "select $1::int"
    await connection.prepare(statement)
    await other.execute("select pg_terminate_backend(%s)", (connection.info.backend_pid,))

    async def ask_until_told() -> None:
        while True:  # the first one may go out before the end of the connection is known here
            await received(connection) if connection.send(statement, [b"1"]) else await connection.wait_input()

    with trio.fail_after(10), pytest.raises(psycopg.OperationalError):
        await ask_until_told()


async def test_what_an_abandoned_thread_returns_is_undone():
    import threading

    gate = threading.Event()
    undone = threading.Event()
    with trio.move_on_after(0.05):
        await run_abandonable(lambda: gate.wait(20), lambda _: undone.set())
    gate.set()
    assert await trio.to_thread.run_sync(undone.wait, 5)


async def test_opening_fails_with_the_servers_words(server):
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        await open_connection(testing.with_database(server, "nowhere"))


def test_psycopgs_private_surface_is_what_the_driver_was_written_for():
    """What ``_connection`` and ``_pool`` rely on, pinned: a psycopg that moves it fails here, by name."""
    connection = psycopg.AsyncConnection
    assert [*inspect.signature(connection.wait).parameters, "timeout"][:4] == ["self", "gen", "interval", "timeout"]
    assert list(inspect.signature(connection.__init__).parameters) == ["self", "pgconn", "row_factory"]
    assert list(inspect.signature(psycopg.AsyncTransaction.__init__).parameters) == [
        "self",
        "connection",
        "savepoint_name",
        "force_rollback",
    ]
    commits = inspect.getsource(psycopg.AsyncTransaction._commit_gen)
    assert commits.rstrip().endswith(
        "in self._get_commit_commands():\n            yield from self._conn._exec_command(command)"
    )
    source = inspect.getsource(psycopg._connection_base.BaseConnection)
    for name in ("_autocommit", "notify_handler", "_pipeline"):
        assert name in source
    assert list(inspect.signature(connection._deallocate).parameters) == ["self", "name"]
    assert "conn._deallocate(name)" in inspect.getsource(psycopg._preparing)
    assert "self.lock" in inspect.getsource(psycopg.connection_async)
    assert list(inspect.signature(psycopg_pool.ConnectionPool.getconn).parameters) == ["self", "timeout"]
    assert list(inspect.signature(psycopg_pool.ConnectionPool.putconn).parameters) == ["self", "conn"]
    assert issubclass(_connection.TrioConnection, connection)


async def test_what_psycopg_deallocates_after_a_rollback_is_prepared_anew(connection):
    async def fetch() -> list:
        return await connection.fetch("select $1::int + 1", [b"1"])

    for _ in range(3):
        assert await fetch() == [(2,)]
    with contextlib.suppress(ZeroDivisionError):
        async with connection.transaction():
            for _ in range(4):
                await connection.execute("select %s::int + 2", [1], prepare=True)
            raise ZeroDivisionError
    async with connection.transaction():  # here psycopg sends DEALLOCATE ALL
        await connection.execute("select %s::int + 2", [1])
        assert await fetch() == [(2,)]
    assert await fetch() == [(2,)]


async def test_what_a_user_deallocates_is_prepared_anew(connection):
    for _ in range(3):
        assert await connection.fetch("select $1::int + 1", [b"1"]) == [(2,)]
    await connection.execute("deallocate all")
    assert await connection.fetch("select $1::int + 1", [b"1"]) == [(2,)]
    assert await connection.fetch("select $1::int + 1", [b"1"]) == [(2,)]


async def test_what_a_user_deallocates_in_a_transaction_costs_that_one(connection):
    for _ in range(3):
        assert await connection.fetch("select $1::int + 1", [b"1"]) == [(2,)]
    async with connection.transaction():
        await connection.execute("deallocate all")
        with pytest.raises(psycopg.errors.InvalidSqlStatementName):
            await connection.fetch("select $1::int + 1", [b"1"])
        await connection.execute("rollback")
    assert await connection.fetch("select $1::int + 1", [b"1"]) == [(2,)]


DEFERRED = """
create table checked (does text);
create function check_it() returns trigger language plpgsql as $$
begin
    if new.does = 'die' then
        perform pg_terminate_backend(pg_backend_pid());
    end if;
    raise exception 'not at all' using errcode = '23514';
end $$;
create constraint trigger checks after insert on checked deferrable initially deferred
for each row execute function check_it();
"""


@pytest.mark.parametrize("executions", [1, 4])
async def test_what_fails_when_it_commits_has_failed(connection, executions):
    """The rows have been returned by then: a full NOTIFY queue, a full disk, a serialization failure."""
    await connection.execute(DEFERRED)
    statement = "insert into checked values ($1) returning does"
    for _ in range(executions):
        with pytest.raises(psycopg.errors.CheckViolation, match="not at all"):
            await connection.fetch(statement, [b"fail"])
        assert connection.clean
    assert await value(connection, "select count(*) from checked") == 0
    with pytest.raises(psycopg.OperationalError, match="terminating connection due to administrator command"):
        await connection.fetch(statement, [b"die"])
    assert connection.closed
