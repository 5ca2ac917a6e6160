-- Who may call what. A role with USAGE on the schema may send and publish, and nothing else; all other
-- functions are for roles that are granted them.
revoke all on all functions in schema notifyq from public;
grant execute on function
    notifyq.send(text, jsonb, int, interval, timestamptz, int, interval, interval, boolean, interval, interval, jsonb, text, text, interval, interval),
    notifyq.try_send(text, jsonb, int, interval, timestamptz, int, interval, interval, boolean, interval, interval, jsonb, text, text, interval, interval),
    notifyq.send_many(text, jsonb),
    notifyq.send_flow(jsonb),
    notifyq.publish(text, jsonb, jsonb, text)
to public;
