"""Flows from SQL alone: what waits for what, and what each end does to those that wait."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest


@pytest.fixture
async def queue(ask):
    await ask("select notifyq.create_queue('q', '{\"retry_limit\": 0}')")


@pytest.fixture
def flow(ask, queue):
    async def flow(**jobs: Any) -> dict[str, int]:
        """Send a flow; a job is given as what it comes after, or as a whole entry."""
        entries = [
            {"name": name, "queue": "q", **(entry if isinstance(entry, dict) else {"after": list(entry)})}
            for name, entry in jobs.items()
        ]
        return dict(await ask("select name, id from notifyq.send_flow(%s)", json.dumps(entries)))

    return flow


@pytest.fixture
def states(ask):
    async def states(ids: dict[str, int]) -> dict[str, str]:
        found = dict(await ask("select id, state from notifyq.jobs"))
        return {name: found.get(id, "gone") for name, id in ids.items()}

    return states


@pytest.fixture
def end(ask):
    async def end(job: int, how: str = "complete({}, '1')") -> None:
        [(claimed,)] = await ask("select id from notifyq.claim('q')")
        assert claimed == job
        await ask(f"select notifyq.{how.format(job)}")

    return end


FAIL = "fail({}, 'x')"


async def test_a_child_starts_when_its_last_parent_has_completed_and_reads_their_outputs(ask, flow, states, end):
    ids = await flow(a="", b="", c="ab")
    assert await states(ids) == {"a": "ready", "b": "ready", "c": "blocked"}
    await end(ids["a"], "complete({}, '\"from a\"')")
    assert await states(ids) == {"a": "completed", "b": "ready", "c": "blocked"}
    assert await ask("select name, state, output from notifyq.parents(%s)", ids["c"]) == [
        ("a", "completed", "from a"),
        ("b", "waiting", None),
    ]
    await end(ids["b"], "complete({}, '2')")
    assert await states(ids) == {"a": "completed", "b": "completed", "c": "ready"}
    assert await ask("select output from notifyq.parents(%s)", ids["c"]) == [("from a",), (2,)]
    await end(ids["c"])
    assert await ask("select name, state, after from notifyq.flow(%s)", ids["b"]) == [
        ("a", "completed", []),
        ("b", "completed", []),
        ("c", "completed", [ids["a"], ids["b"]]),
    ]


async def test_two_parents_that_complete_in_one_call_free_their_child_once(ask, flow, states):
    ids = await flow(a="", b="", c="ab")
    await ask("select id from notifyq.claim('q', 2)")
    await ask("select notifyq.complete(%s::bigint[])", [ids["a"], ids["b"]])
    assert await states(ids) == {"a": "completed", "b": "completed", "c": "ready"}
    assert await ask("select count(*) from notifyq.ready") == [(1,)]


@pytest.mark.parametrize("how", [FAIL, "discard(array[{}])", "cancel({})", "delete({})"])
async def test_the_children_of_a_parent_that_did_not_complete_are_cancelled_down_the_line(flow, states, end, how):
    ids = await flow(a="", b="a", c="b", d="")
    await end(ids["a"], how)
    found = await states(ids)
    assert (found["b"], found["c"], found["d"]) == ("cancelled", "cancelled", "ready")


@pytest.mark.parametrize("how", [FAIL, "cancel({})", "delete({})"])
async def test_a_child_may_run_whatever_became_of_its_parents(flow, states, end, how):
    ids = await flow(a="", b="", last={"after": ["a", "b"], "on_failure": "run"})
    await end(ids["a"], how)
    assert (await states(ids))["last"] == "blocked"
    await end(ids["b"])
    assert (await states(ids))["last"] == "ready"


async def test_a_child_may_wait_until_its_failed_parent_is_retried(ask, flow, states, end):
    ids = await flow(a="", b={"after": ["a"], "on_failure": "wait"})
    await end(ids["a"], FAIL)
    assert (await states(ids))["b"] == "blocked"
    await ask("select notifyq.retry(%s)", ids["a"])
    await end(ids["a"])
    assert (await states(ids))["b"] == "ready"


@pytest.mark.parametrize("going", ["delete({})", "purge()"])
async def test_a_child_that_waits_is_cancelled_when_its_failed_parent_goes_for_good(ask, flow, states, end, going):
    await ask("select notifyq.update_queue('q', '{\"retention\": null}')")
    ids = await flow(a="", b={"after": ["a"], "on_failure": "wait"})
    await end(ids["a"], FAIL)
    await ask("select notifyq.update_queue('q', '{\"retention\": 1}')")
    await ask("update notifyq.archive set finished_at = now() - interval '2 s'")
    await ask(f"select notifyq.{going.format(ids['a'])}")
    assert await states(ids) == {"a": "gone", "b": "cancelled"}


async def test_a_parent_that_is_retried_after_its_child_ran_does_not_count_again(ask, flow, states, end):
    ids = await flow(a="", b="", c={"after": ["a", "b"], "on_failure": "run"})
    await end(ids["a"], FAIL)
    await ask("select notifyq.update_job(%s, delay => '1 hour')", ids["b"])
    await ask("select notifyq.retry(%s)", ids["a"])
    await end(ids["a"])
    assert (await states(ids))["c"] == "blocked"


async def test_what_is_not_kept_still_counts(ask, flow, states, end):
    await ask("select notifyq.update_queue('q', '{\"retention\": 0}')")
    ids = await flow(a="", b="a")
    await end(ids["a"])
    assert await states(ids) == {"a": "gone", "b": "ready"}
    assert await ask("select state, output from notifyq.parents(%s)", ids["b"]) == [("completed", None)]
    await end(ids["b"])
    for table in ("dependency", "flow_job", "blocked", "job"):
        assert await ask(f"select count(*) from notifyq.{table}") == [(0,)]


async def test_a_child_keeps_its_delay_and_its_options(ask, flow, states, end):
    ids = await flow(a="", b={"after": ["a"], "delay": 3600, "priority": 3, "data": {"n": 1}})
    await end(ids["a"])
    assert await ask("select state, priority, data, due_at > now() from notifyq.jobs where id = %s", ids["b"]) == [
        ("scheduled", 3, {"n": 1}, True)
    ]


async def test_a_blocked_child_can_be_cancelled_and_resumed_and_deleted(ask, flow, states, end):
    ids = await flow(a="", b="a", c="a")
    assert await ask("select notifyq.cancel(%s)", ids["b"]) == [(True,)]
    assert await ask("select notifyq.delete(%s)", ids["c"]) == [(True,)]
    await end(ids["a"])
    assert await states(ids) == {"a": "completed", "b": "cancelled", "c": "gone"}
    assert await ask("select notifyq.resume(%s)", ids["b"]) == [(True,)]
    await end(ids["b"])


async def test_jobs_sent_before_can_be_parents(ask, flow, states, end):
    [(done,)] = await ask("select notifyq.send('q')")
    await end(done)
    [(before,)] = await ask("select notifyq.send('q')")
    ids = await flow(a=[before, done])
    assert (await states(ids))["a"] == "blocked"
    await end(before)
    assert (await states(ids))["a"] == "ready"


async def test_a_child_of_a_limited_queue_waits_for_its_key_too(ask, flow, states, end):
    await ask("select notifyq.update_queue('q', '{\"policy\": \"singleton\"}')")
    ids = await flow(a={"key": "k"}, b={"key": "k", "after": ["a"]}, c={"key": "k"})
    await end(ids["a"])
    assert (await states(ids))["b"] == "ready"
    [(first,)] = await ask("select id from notifyq.claim('q', 5)")
    assert first == ids["c"]
    assert await states(ids) == {"a": "completed", "b": "blocked", "c": "active"}
    await ask("select notifyq.complete(%s)", first)
    await end(ids["b"])


async def test_expired_children_fail_and_cancel_theirs(ask, flow, states):
    ids = await flow(a={"expire_in": 3600}, b="a")
    await ask("update notifyq.job set expires_at = now() - interval '1 s' where id = %s", ids["a"])
    assert await ask("select notifyq.expire()") == [(1,)]
    assert await states(ids) == {"a": "failed", "b": "cancelled"}


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([], "one job or more"),
        ({}, "one job or more"),
        ([1], "must be a JSON object"),
        ([{"queue": "q"}], "a name of its own"),
        ([{"name": "", "queue": "q"}], "a name of its own"),
        ([{"name": "a", "queue": "q"}, {"name": "a", "queue": "q"}], "'a' is given to 2"),
        ([{"name": "a", "queue": "q", "after": ["b"]}], "comes after 'b', which is not in it"),
        ([{"name": "a", "queue": "q", "after": ["a"]}], "wait for each other"),
        (
            [{"name": "a", "queue": "q", "after": ["b"]}, {"name": "b", "queue": "q", "after": ["a"]}],
            "wait for each other",
        ),
        ([{"name": "a", "queue": "q", "after": [987654321]}], "no job 987654321"),
        ([{"name": "a", "queue": "nowhere"}], "no queue named 'nowhere'"),
        ([{"name": "a", "queue": "q", "on_failure": "stop"}], "must be cancel, run or wait"),
        ([{"name": "a", "queue": "q", "wait": 1}], "unknown option: wait"),
        ([{"name": "a", "queue": "q", "after": "b"}], "must be an array"),
        ([{"name": "a", "queue": "q", "after": [True]}], "must be an array"),
        ([{"name": "a", "queue": "q", "priority": "high"}], "does not fit"),
    ],
)
async def test_a_flow_that_cannot_be_is_refused_in_words_and_sends_nothing(ask, queue, jobs, message):
    with pytest.raises(psycopg.Error, match=message) as caught:
        await ask("select * from notifyq.send_flow(%s)", json.dumps(jobs))
    assert caught.value.sqlstate in ("NQ001", "NQ003")
    for table in ("job", "flow_job", "dependency", "ready"):
        assert await ask(f"select count(*) from notifyq.{table}") == [(0,)]


async def test_a_parent_that_has_failed_already_is_refused(ask, flow, end):
    [(failed,)] = await ask("select notifyq.send('q')")
    await end(failed, FAIL)
    with pytest.raises(psycopg.Error, match="would never run"):
        await flow(a=[failed])
    ids = await flow(a={"after": [failed], "on_failure": "wait"}, b={"after": [failed], "on_failure": "run"})
    await end(ids["b"])
    await ask("select notifyq.retry(%s)", failed)
    await end(failed)
    await end(ids["a"])


async def test_a_flow_that_a_policy_refuses_is_not_sent(ask, flow):
    await ask("select notifyq.update_queue('q', '{\"policy\": \"exclusive\"}')")
    await ask("select notifyq.send('q', key => 'k')")
    with pytest.raises(psycopg.Error, match="has its key"):
        await flow(a="", b={"key": "k", "after": ["a"]})
    assert await ask("select count(*) from notifyq.job") == [(1,)]


async def test_a_long_chain_is_cancelled_to_its_end(ask, flow, states):
    ids = await flow(j0="", **{f"j{n}": {"after": [f"j{n - 1}"]} for n in range(1, 500)})
    await ask("select notifyq.cancel(%s)", ids["j0"])
    assert set((await states(ids)).values()) == {"cancelled"}


async def test_what_waits_for_a_failed_parent_that_is_not_kept_is_cancelled_down_the_line(ask, flow, states, end):
    await ask("select notifyq.update_queue('q', '{\"retention\": 0}')")
    ids = await flow(
        a="",
        b={"after": ["a"], "on_failure": "wait"},
        c={"after": ["b"], "on_failure": "wait"},
        d={"after": ["c"], "on_failure": "run"},
    )
    await end(ids["a"], FAIL)
    assert await states(ids) == {"a": "gone", "b": "gone", "c": "gone", "d": "ready"}
