"""Holds the ledger against the database: what is lost, what ran twice, and why."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .ledger import Incident, Ledger, Run, Send
    from .workers import Restart

__all__ = ["Found", "Verdict", "judge", "recoveries", "unexcused_restarts"]

SETTLING = 2.0
"""Seconds in which a completion has been stored if nothing is wrong just then: it waits for one write, under load."""

IN_HAND = 1.0
"""Seconds that a claimed job waits in a process before it begins, or is handed back: ``_shelf.STALE_SECONDS``."""

COMING_BACK = 1.0
"""Seconds in which a connection may break because of what was done to the server, or the network, and is over."""

CLOCKS = 0.01
"""Seconds that the server's clock and this process's may go apart while a delayed job waits."""

ENDED = ("completed", "failed", "cancelled")

SHOWN = 5
"""Job ids in a complaint."""


@attrs.frozen
class Found:
    """A job as the database has it at the end."""

    queue: str
    state: str | None
    """None: no ticket is left of it."""
    attempt: int | None
    retry_limit: int
    error: str | None
    """Of its last failed attempt."""
    origin: int | None = None
    """Of a dead letter: the job that failed."""


@attrs.define
class Verdict:
    """What became of the jobs."""

    sent: int = 0
    ran: int = 0
    lost: list[int] = attrs.Factory(list)
    stuck: list[int] = attrs.Factory(list)
    explained: Counter[str] = attrs.Factory(Counter)
    """Jobs that ran to their end more than once, by what was done to their worker or the server then."""
    unexplained: list[int] = attrs.Factory(list)
    complaints: list[str] = attrs.Factory(list)

    @property
    def good(self) -> bool:
        """Whether nothing is lost, stuck or unexplained, and nothing else is wrong."""
        return not (self.lost or self.stuck or self.unexplained or self.complaints)

    def complain(self, what: str, jobs: list[int] | None = None) -> None:
        """Add a complaint, if there are such jobs."""
        if jobs is None:
            self.complaints.append(what)
        elif jobs:
            self.complaints.append(f"{len(jobs)} jobs {what}: {', '.join(map(str, jobs[:SHOWN]))}")


def judge(ledger: Ledger, found: dict[int, Found], lease: float = 2.0) -> Verdict:
    """Account for every job. ``lease``: that of the workers."""
    verdict = Verdict(sent=len(ledger.sends), ran=len(ledger.runs))
    ended: dict[int, list[Run]] = defaultdict(list)
    for run in ledger.runs:
        if run.ended is not None:
            ended[run.job].append(run)
    for job, send in ledger.sends.items():
        _account(verdict, job, send, found.get(job), job in ended)
    for job, runs in ended.items():
        if len(runs) > 1:
            _explain(verdict, job, runs, ledger.incidents, lease)
    _check_strangers(verdict, ledger, found)
    _check_order(verdict, ledger, ended, found)
    _check_dead_letters(verdict, found)
    return verdict


def _account(verdict: Verdict, job: int, send: Send, found: Found | None, ran: bool) -> None:
    """Every acknowledged job has run to its end, or stands in a state that says why not."""
    if found is None:
        verdict.lost.append(job)
    elif found.state == "completed":
        if not ran:
            verdict.lost.append(job)
    elif found.state == "failed":
        if found.error is None or (found.attempt or 0) <= found.retry_limit:
            verdict.complain(f"job {job} failed without a reason: attempt {found.attempt}, {found.error}")
    elif found.state == "cancelled":
        if not send.after:
            verdict.complain(f"job {job} was cancelled by nobody")
    elif found.queue != "dead":
        verdict.stuck.append(job)


def _explain(verdict: Verdict, job: int, runs: list[Run], incidents: list[Incident], lease: float) -> None:
    """Each run but the last must have met with something that kept its completion from being stored."""
    runs = sorted(runs, key=lambda run: run.began)
    excuses = [incident for incident in incidents if incident.excuses]
    kinds = [
        next((one.kind for one in excuses if _cut_off(one, *two, lease) or _woke_up(one, *two)), None)
        for two in itertools.pairwise(runs)
    ]
    if None in kinds:
        verdict.unexplained.append(job)
    else:
        verdict.explained[str(kinds[0])] += 1


def _cut_off(incident: Incident, first: Run, second: Run, lease: float) -> bool:
    """Whether the first run's process was hit between its claim and the storing of its completion."""
    assert first.ended is not None
    # What ends sessions, or stops a process, costs at most what is in hand by then. What keeps all from the server costs
    # leases, and claims that were not durable: a process may go on with those until it knows.
    late = IN_HAND if incident.process or incident.kind.startswith("terminated ") else lease + IN_HAND
    return (
        incident.process in (None, first.process)
        and first.began <= incident.ended + late
        and incident.began <= min(second.began, first.ended + SETTLING)
    )


def _woke_up(incident: Incident, first: Run, second: Run) -> bool:
    """Whether the second run's process was stopped before the first one began, and woke up with an older claim."""
    return (
        incident.process == second.process
        and second.attempt < first.attempt
        and incident.began <= first.began <= incident.ended
        and second.began <= incident.ended + IN_HAND
    )


def _check_strangers(verdict: Verdict, ledger: Ledger, found: dict[int, Found]) -> None:
    """Jobs that no send returned are those of sends that did not return."""
    strangers = [job for job, one in found.items() if job not in ledger.sends and one.queue != "dead"]
    if len(strangers) > ledger.unknown:
        verdict.complain(f"that nobody sent (at most {ledger.unknown} may be)", strangers)
    verdict.stuck += [job for job in strangers if found[job].state not in ENDED]
    verdict.complain("ran and are not in the database", sorted({run.job for run in ledger.runs} - found.keys()))
    for key, jobs in ledger.id_keys.items():
        if len(jobs) > 1:
            verdict.complain(f"were made for the id_key {key}", sorted(jobs))


def _check_order(verdict: Verdict, ledger: Ledger, ended: dict[int, list[Run]], found: dict[int, Found]) -> None:
    """Nothing starts before it is due, or before the jobs that it comes after have ended."""
    early, hasty = [], []
    for run in ledger.runs:
        send = ledger.sends.get(run.job)
        if send is None:
            continue
        if send.delay and run.began < send.called + send.delay - CLOCKS:
            early.append(run.job)
        for parent in send.after:
            first = min((one.ended for one in ended[parent] if one.ended is not None), default=None)
            if first is None or first > run.began:
                hasty.append(run.job)
    verdict.complain("started before they were due", early)
    verdict.complain("started before the jobs that they come after had ended", hasty)


def _check_dead_letters(verdict: Verdict, found: dict[int, Found]) -> None:
    """One dead letter for each job that failed, and none else."""
    letters = Counter(one.origin for one in found.values() if one.queue == "dead")
    failed = {job for job, one in found.items() if one.queue == "luck" and one.state == "failed"}
    verdict.complain("failed without a dead letter", sorted(failed - letters.keys()))
    verdict.complain(
        "have a dead letter too many", sorted(job or 0 for job in letters if letters[job] > 1 or job not in failed)
    )


def recoveries(verdict: Verdict, ledger: Ledger, goal: float | None = None) -> list[float]:
    """Seconds until a job started again, of each incident that waits for one.

    A complaint of each that none came after, and if the longest is longer than the goal, or there is none.

    ``affected``: the one in the midst of which the worker was hit, from the incident's beginning, unless it had ended all
    the same; started at any worker (another fault may have kept the others from the server until the one that was stopped
    was back), or else, if it was left to that worker, ended there. ``sent``: one that was sent after its beginning; from
    there. ``next``: one that was sent after its end; from there.
    """
    runs = sorted(ledger.runs, key=lambda run: run.began)
    begins = [run.began for run in runs]
    waits = []
    for incident in ledger.incidents:
        since = incident.ended if incident.waits_for == "next" else incident.began
        later = itertools.islice(runs, bisect_right(begins, since), None)
        match incident.waits_for:
            case "sent" | "next":
                sends = ledger.sends
                again = next((run.began for run in later if run.job in sends and sends[run.job].called > since), None)
            case "affected":
                hit = _hit(runs, incident)
                if any(run.over is not None and run.over <= incident.ended for run in hit):
                    continue  # it had ended by itself until the incident was over
                again = next((run.began for run in later if run.job == incident.job), None)
                again = again or next((run.ended for run in hit if run.ended is not None), None)
            case _:
                continue
        if again is None:
            verdict.complain(f"no job started after {incident.kind} that says that it was got over")
        else:
            waits.append(again - since)
    if goal is not None and not waits:
        verdict.complain(f"no recovery was timed, and the goal is {goal:g} s")
    elif goal is not None and max(waits) > goal:
        verdict.complain(f"a recovery took {max(waits):.2f} s, longer than its goal, {goal:g} s")
    return waits


def _hit(runs: list[Run], incident: Incident) -> list[Run]:
    """The runs of the job in the midst of which the worker was hit that had begun there by then."""
    there = (run for run in runs if run.job == incident.job and run.process == incident.process)
    return [run for run in there if run.began < incident.began]


def unexcused_restarts(restarts: Iterable[Restart], incidents: Iterable[Incident]) -> Iterator[str]:
    """Workers whose connection broke while they started, though nothing was done then that breaks it."""
    breaking = [incident for incident in incidents if incident.process is None and incident.excuses]
    for restart in restarts:
        if not any(one.began < restart.ended and restart.began < one.ended + COMING_BACK for one in breaking):
            yield f"worker {restart.name} could not start, and nothing was done that explains it: {restart.words}"
