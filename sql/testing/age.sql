-- Not part of an installation: notifyq.testing runs this in a test's own database.

-- Lets time pass for every job, claim and lease, by moving their times into the past.
create or replace function notifyq.age(by interval) returns void
language sql
as $$
    update notifyq.job set sent_at = sent_at - age.by, expires_at = expires_at - age.by;
    update notifyq.scheduled set due_at = due_at - age.by;
    update notifyq.active set claimed_at = claimed_at - age.by, deadline = deadline - age.by;
    update notifyq.runtime set beat_at = beat_at - age.by, lease_until = lease_until - age.by;
    update notifyq.attempt set failed_at = failed_at - age.by, claimed_at = claimed_at - age.by;
    update notifyq.schedule set next_at = next_at - age.by, changed_at = changed_at - age.by;
    update notifyq.archive
    set sent_at = sent_at - age.by, finished_at = finished_at - age.by, claimed_at = claimed_at - age.by,
        leaves_on = case when leaves_on < 'infinity' then (leaves_on - age.by)::date else leaves_on end;
$$;
