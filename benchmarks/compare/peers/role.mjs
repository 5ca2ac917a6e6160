// One process of a Node peer: the commands of role.py, carried out in the same way.

import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

export const QUEUE = "compare";

const now = () => Number(process.hrtime.bigint() / 1000n);

/** Import a package from the peer's own environment, which is not above this file. */
export const load = async (name) => {
  const require = createRequire(`${process.env.COMPARE_ENVIRONMENT}/package.json`);
  return import(pathToFileURL(require.resolve(name)).href);
};

let pickups = [];
let first = null;

/** The whole of a job: note when it began, and return something to keep. */
export const handled = (sent) => {
  const at = now();
  first ??= at;
  pickups.push(at - sent);
  return sent;
};

const percentile = (sorted, p) => sorted[Math.ceil((sorted.length * p) / 100) - 1] / 1000;

const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

const seconds = (since) => (now() - since) / 1e6;

const commands = (peer) => ({
  ready: () => {},
  ran: () => ({ ran: pickups.length, first }),
  pickups: () => {
    const sorted = Float64Array.from(pickups).sort();
    const found = { ran: sorted.length };
    return sorted.length ? { ...found, p50_ms: percentile(sorted, 50), p99_ms: percentile(sorted, 99) } : found;
  },
  forget: () => {
    const told = { ran: pickups.length, first };
    pickups = [];
    first = null;
    return told;
  },
  paced: async ({ jobs, gap }) => {
    for (let done = 0; done < jobs; done++) {
      await sleep((0.5 + Math.random()) * gap);
      await peer.send(now());
    }
  },
  fill: async ({ jobs, chunk }) => {
    for (let begin = 0; begin < jobs; begin += chunk) {
      await peer.sendMany(Array(Math.min(chunk, jobs - begin)).fill(now()));
    }
  },
  singly: async ({ seconds: length, tasks }) => {
    let sent = 0;
    const started = now();
    const sender = async () => {
      while (seconds(started) < length) {
        await peer.send(now());
        sent++;
      }
    };
    await Promise.all(Array.from({ length: tasks }, sender));
    return { seconds: seconds(started), sent };
  },
  install: () => peer.install(),
  open: () => peer.open(),
  start: () => peer.start(),
});

/** Answer commands until stdin is closed. */
export const main = async (make) => {
  const { dsn, settings, queues } = JSON.parse(process.argv[2]);
  const own = commands(make(dsn, settings, queues));
  const say = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
  for await (const line of createInterface({ input: process.stdin })) {
    const said = JSON.parse(line);
    try {
      const answer = await own[said.do](said);
      say(["ran", "pickups", "forget", "singly"].includes(said.do) ? answer : { done: true });
    } catch (error) {
      say({ error: `${error}` });
    }
  }
  process.exit(0);
};
